"""The variables that a GPU job starts with, and that it leaves alone where somebody has set them."""

from ais_megatron.cluster.cuda_environment import prepare_cuda
from ais_megatron.config import build_config, load_config
from tests.helpers.paths import ROOT
from tests.helpers.sglang import DENSE, sglang_config


def test_a_gpu_job_starts_with_what_cuda_reads_once():
    config = load_config(ROOT / "configs" / "qwen3_8b_ais.yaml")
    environment: dict[str, str] = {}
    prepare_cuda(config, environment)
    assert environment == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "NCCL_CUMEM_ENABLE": "0",
        "NCCL_NVLS_ENABLE": "0",
    }
    theirs = {"CUDA_DEVICE_MAX_CONNECTIONS": "4", "PYTORCH_CUDA_ALLOC_CONF": "backend:native", "NCCL_NVLS_ENABLE": "1"}
    environment = dict(theirs)
    prepare_cuda(config, environment)
    assert environment == theirs | {"NCCL_CUMEM_ENABLE": "0"}
    environment = {}
    prepare_cuda(load_config(ROOT / "configs" / "tiny_countdown.yaml"), environment)
    assert environment == {}


def test_transformer_engine_scales_like_an_fp8_engine():
    environment: dict[str, str] = {}
    prepare_cuda(build_config(dict(model=dict(architecture=DENSE), policy=dict(forward_precision="fp8_te"))), environment)
    assert environment["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] == "1"


def test_memory_that_servers_open_is_not_in_expandable_segments():
    environment: dict[str, str] = {}
    prepare_cuda(sglang_config(device="cuda", transport="cuda_ipc"), environment)
    assert environment == {}
