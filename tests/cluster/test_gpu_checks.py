"""Every reason why a GPU job could not run, with a pretended torch.cuda: what was found, and what to do."""

import importlib
import sys

import pytest

from ais_megatron.cluster import gpu_checks
from ais_megatron.cluster.gpu_checks import gpu_problems
from ais_megatron.config import build_config
from tests.helpers.sglang import DENSE

torch = pytest.importorskip("torch")


def config(backend="cuda", **parallel):
    return build_config(dict(model=dict(architecture=DENSE), run=dict(backend=backend), parallel=parallel))


@pytest.fixture
def gpus(monkeypatch):
    """``gpus(count)``: a CUDA build of torch that sees so many, with Transformer Engine."""

    def make(count):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(gpu_checks, "lacking_of_transformer_engine", lambda: None)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


def test_nothing_is_wrong(gpus):
    gpus(4)
    assert gpu_problems(config(tp=2, dp=2)) == [] and gpu_problems(config(tp=4, dp=4), local_ranks=4) == []


def test_only_backend_cuda_is_judged():
    assert gpu_problems(config("cpu")) == [] and gpu_problems(config("auto")) == []


def test_a_torch_without_cuda(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setattr(torch.version, "cuda", None)
    (problem,) = gpu_problems(config())
    assert f"torch {torch.__version__} is built without CUDA" in problem
    assert "pip install --no-build-isolation '.[cuda]'" in problem and "run.backend=cpu" in problem


@pytest.mark.parametrize("value", ["", "-1"])
def test_every_gpu_hidden(gpus, monkeypatch, value):
    gpus(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    (problem,) = gpu_problems(config())
    assert f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU; unset it" in problem


def test_no_driver(gpus, monkeypatch):
    gpus(0)

    def init():
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    monkeypatch.setattr(torch.cuda, "init", init)
    (problem,) = gpu_problems(config())
    assert "finds no usable GPU: Found no NVIDIA driver on your system.; run `nvidia-smi`" in problem


def test_fewer_gpus_than_ranks(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    (problem,) = gpu_problems(config(dp=2))
    assert "2 ranks on this node, but 1 GPUs (CUDA_VISIBLE_DEVICES=3)" in problem and "parallel.dp" in problem
    assert gpu_problems(config(dp=2), local_ranks=1) == [], "the other rank is on another node"


def test_transformer_engine(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setattr(gpu_checks, "lacking_of_transformer_engine", lambda: "its torch extension is missing")
    (problem,) = gpu_problems(config())
    assert "cannot be used, because its torch extension is missing; install it" in problem and "model.transformer_impl=local" in problem
    local = config()
    object.__setattr__(local.model, "transformer_impl", "local")
    assert gpu_problems(local) == []


def test_the_files_of_transformer_engine_are_looked_for(gpus, monkeypatch, tmp_path):
    from ais_megatron.cluster.doctor import lacking_of_transformer_engine

    # A test before this one may have loaded the CPU policy, which marks this package as absent.
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    importlib.invalidate_caches()
    assert "torch extension is missing" in lacking_of_transformer_engine()


def test_an_installation_that_raises_is_a_problem_and_no_crash(gpus, monkeypatch):
    gpus(1)

    def broken():
        raise OSError("libcudart.so.13: cannot open")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setattr(gpu_checks, "lacking_of_transformer_engine", broken)
    problems = gpu_problems(config())
    assert len(problems) == 2 and all("OSError: libcudart.so.13" in problem for problem in problems)


@pytest.mark.parametrize(
    ("version", "capability", "cuda", "reason"),
    [
        ("2.20.2", (9, 0), "13.0", None),
        ("2.2.0", (9, 0), "13.0", "Transformer Engine is 2.2.0"),
        ("2.20.2", (8, 9), "13.0", "a GPU has compute capability 8.9"),
        ("2.20.2", (9, 0), "12.8", "torch is built for CUDA 12.8"),
    ],
)
def test_what_blockwise_fp8_needs(gpus, monkeypatch, version, capability, cuda, reason):
    gpus(1)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)
    monkeypatch.setattr(gpu_checks.metadata, "version", lambda name: version)
    fp8 = build_config(dict(model=dict(architecture=DENSE), run=dict(backend="cuda"), policy=dict(forward_precision="fp8_te")))
    problems = gpu_problems(fp8)
    if reason is None:
        assert problems == []
        return
    (problem,) = problems
    assert f"policy.forward_precision=fp8_te: {reason}; it needs Transformer Engine 2.3, compute capability 9.0 and CUDA 12.9" in problem
