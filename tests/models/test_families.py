"""Every model family against transformers: its table, the policy under each kind of layout, and the embedded engine.

The Qwen3 families have tests of their own all over the suite. What is here goes for the others, and shows what a new one needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from ais_megatron.config import Architecture, ConfigError, read_architecture
from ais_megatron.config.hf_config import hf_config
from ais_megatron.models.family import tensors_of
from ais_megatron.models.registry import FAMILIES, is_quantized_weight
from ais_megatron.planning.parameters import total_parameters
from ais_megatron.quantization.fp8 import quantize_bucket
from ais_megatron.quantization.kv_scales import KVScales
from ais_megatron.rollout.engine import SamplingParams
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.engines import BF16, DENSE, FP8, LAYERS, RECURRENT, Engines, make_prompts
from tests.helpers.paths import ROOT
from tests.helpers.policies import (
    LAYOUTS,
    calibrated,
    exported,
    make_batch,
    make_config,
    make_policy,
    policy_logprobs,
    reference_amax,
    reference_logprobs,
    trained_weights,
)
from tests.helpers.ranks import RankPool
from tests.helpers.syncing import agreement, pushed_state

LLAMA3_ROPE = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
# Of 4 layers and 64 columns. The head of llama is tied, so that PP has to keep two copies of it alike.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": dict(rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3_ROPE}, tie_word_embeddings=True),
    "qwen2": dict(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, tie_word_embeddings=False),
}
OF_TRANSFORMERS = [name for name, family in FAMILIES.items() if family.twin is None]  # the others have tests of their own
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
# What an architecture has beside the sizes that all families have.
EXTRA: dict[str, dict[str, Any]] = {"qwen3_moe": EXPERTS, "qwen3_5": RECURRENT}


@pytest.fixture(scope="session", params=CHECKPOINTS)
def family_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint written by transformers, with weights and biases far from their initial values."""
    return write_checkpoint(
        tmp_path_factory.mktemp(request.param),
        getattr(transformers, FAMILIES[request.param].hf_class),
        lambda name: 0.3 if name.endswith("bias") else 0.05,
        **CHECKPOINTS[request.param],
    )


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", OF_TRANSFORMERS)
def test_a_table_names_transformers_own_tensors(model_type: str, tmp_path: Path) -> None:
    """Names and shapes of a checkpoint as transformers writes it, each once, and as many numbers as `plan` counts."""
    family = FAMILIES[model_type]
    architecture = Architecture(**DENSE, model_type=model_type, **EXTRA.get(model_type, {}))
    model_class = getattr(transformers, family.hf_class)
    model = model_class(model_class.config_class(**{k: v for k, v in hf_config(architecture, "fp32").items() if k != "architectures"}))
    model.save_pretrained(tmp_path)
    written = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    ours = [(tensor.name, tensor.shape) for tensor in tensors_of(architecture)]
    assert len(ours) == len(dict(ours)) and dict(ours) == written
    assert total_parameters(architecture) == sum(parameter.numel() for parameter in model.parameters())
    for name, shape, quantized in tensors_of(architecture):
        assert quantized == is_quantized_weight(name), f"{name}: another family quantises a tensor of this name, or does not"
        assert not quantized or len(shape) == 2, name


@pytest.mark.parametrize("model_type", OF_TRANSFORMERS)
def test_a_written_config_is_read_back_and_is_transformers_own(model_type: str, tmp_path: Path) -> None:
    extra = EXTRA.get(model_type, {})
    if model_type == "llama":
        extra = {"rope_scaling": LLAMA3_ROPE}
    architecture = Architecture(**DENSE, model_type=model_type, **extra)
    assert hf_config(architecture, "bf16", eos_ids=(2,))["eos_token_id"] == 2
    (tmp_path / "config.json").write_text(json.dumps(hf_config(architecture, "bf16", eos_ids=(2, 3))))
    assert read_architecture(tmp_path) == architecture
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.head_dim == 16 if hasattr(theirs, "head_dim") else model_type == "qwen2"
    assert theirs.rope_parameters["rope_theta"] == architecture.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("llama3" if model_type == "llama" else "default")


# What is published, as it was written (by transformers 4).
LLAMA31_8B = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
"eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
"intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
"num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0,
"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
"rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 128256}"""
QWEN25_7B = """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
"hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 32768,
"max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
"rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
"use_cache": true, "use_sliding_window": false, "vocab_size": 152064}"""


@pytest.mark.parametrize(("published", "parameters"), [(LLAMA31_8B, 8_030_261_248), (QWEN25_7B, 7_615_616_512)])
def test_published_configurations(tmp_path: Path, published: str, parameters: int) -> None:
    (tmp_path / "config.json").write_text(published)
    architecture = read_architecture(tmp_path)
    assert architecture.head_dim == 128 and total_parameters(architecture) == parameters
    stretched = architecture.rope_scaling
    assert (stretched is not None and stretched.factor) == (8.0 if architecture.model_type == "llama" else False)


@pytest.mark.parametrize(
    ("model_type", "raw", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True in its config.json is not supported; allowed: False"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"scaled RoPE .* is not supported for qwen2; allowed: default"),
        ("llama", {"attention_bias": True}, "attention_bias=True in its config.json"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE, "factor": 0.5}}, "rope_scaling.factor=0.5"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' in its config.json is not supported; allowed: 'silu'"),
    ],
)
def test_variants_that_would_compute_something_else_are_refused(tmp_path: Path, model_type: str, raw: dict, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**DENSE, "model_type": model_type, **raw}))
    with pytest.raises(ConfigError, match=message):
        read_architecture(tmp_path)


def test_an_unknown_family_and_a_scaling_that_nothing_reads() -> None:
    with pytest.raises(ValueError, match="model_type='qwen_2': unknown model family; allowed: qwen3, .*; did you mean qwen2"):
        Architecture(**DENSE, model_type="qwen_2")
    with pytest.raises(ValueError, match="rope_scaling: model_type=qwen3 has no scaled rotary embedding"):
        Architecture(**DENSE, rope_scaling=LLAMA3_ROPE)


def test_tables_need_no_torch() -> None:
    """They are imported in every SGLang process, and by `plan`."""
    code = "import sys; import ais_megatron.rollout.sglang.plugin; sys.exit(any(m in sys.modules for m in ('torch', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=240, check=False).returncode == 0


def of_the_example(rank: int, path: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities and export of a Mistral checkpoint, in a process that has read examples/mistral_family.py."""
    from examples.mistral_family import MISTRAL

    FAMILIES[MISTRAL.model_type] = MISTRAL
    try:
        policy, batch = make_policy(make_config(path, tp=2), path), make_batch()
        weights = {name: tensor.clone() for bucket in policy.export_buckets(30_000) for name, tensor in bucket}
        return policy.logprobs(batch) * batch.loss_mask, weights
    finally:
        del FAMILIES[MISTRAL.model_type]  # other tests use this process too


def test_the_example_family_runs_as_it_stands(ranks: RankPool, tmp_path: Path) -> None:
    """What docs/extending.md says of a new family: one table and one line."""
    done = subprocess.run([sys.executable, "-m", "examples.mistral_family"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "all 21 tensors have transformers' names and shapes\n"
    torch.manual_seed(0)
    sizes = dict(vocab_size=71, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, head_dim=16, sliding_window=None))
    model.save_pretrained(tmp_path)
    assert "mistral" not in FAMILIES
    expected = reference_logprobs(tmp_path, make_batch())
    for found, weights in ranks.run(2, of_the_example, path=tmp_path):
        assert (found - expected).abs().max() < 1e-4
        assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


# --- policy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["TP1", "TP2+SP", "PP2", pytest.param("TP2xPP2", marks=pytest.mark.slow)])
def test_logprobs_equal_transformers(ranks: RankPool, family_checkpoint: Path, layout: str) -> None:
    world, tp, pp, sp = LAYOUTS[layout]
    expected = reference_logprobs(family_checkpoint, make_batch())
    for found, index in ranks.run(world, policy_logprobs, path=family_checkpoint, tp=tp, pp=pp, sp=sp, budget=40):
        assert (found - expected[index]).abs().max() < 1e-4


@pytest.mark.parametrize("layout", ["TP2+SP", "PP2"])
def test_training_is_independent_of_layout(ranks: RankPool, family_checkpoint: Path, layout: str) -> None:
    """With the biases' gradients summed over what sequence parallelism cuts, and both copies of a tied head alike."""
    world, tp, pp, sp = LAYOUTS[layout]
    alone, _ = ranks.run(1, trained_weights, path=family_checkpoint)[0]
    start = load_file(family_checkpoint / "model.safetensors")
    for weights, _ in ranks.run(world, trained_weights, path=family_checkpoint, tp=tp, pp=pp, sp=sp, budget=40):
        assert weights.keys() == alone.keys() == start.keys()
        for name, tensor in weights.items():
            assert (tensor - alone[name]).abs().max() < 2e-4 and (tensor - alone[name]).abs().mean() < 2e-6, name
            assert not torch.equal(tensor, start[name]), f"{name} was not trained"


def test_import_then_export_is_the_identity(ranks: RankPool, family_checkpoint: Path, tmp_path: Path) -> None:
    original = load_file(family_checkpoint / "model.safetensors")
    for weights in ranks.run(4, exported, path=family_checkpoint, out=tmp_path, tp=2, pp=2):
        assert weights.keys() == original.keys()
        assert all(torch.equal(weights[name], original[name]) for name in original)
    assert read_architecture(tmp_path) == read_architecture(family_checkpoint)
    tokens = make_batch().tokens
    with torch.no_grad():
        ours, theirs = (
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
            for folder in (tmp_path, family_checkpoint)
        )
    assert torch.equal(ours, theirs)


def test_calibration_sees_the_ranges_that_transformers_sees(ranks: RankPool, family_checkpoint: Path) -> None:
    expected = reference_amax(family_checkpoint, make_batch())
    for amax in ranks.run(2, calibrated, path=family_checkpoint, tp=2, pp=1):
        torch.testing.assert_close(amax, expected, rtol=1e-4, atol=1e-5)


# --- engine -----------------------------------------------------------------------------------------------------------


def test_engine_and_trainer_agree_in_float32(ranks: RankPool, family_checkpoint: Path) -> None:
    """Which also says that the engine's own attention, bias and rotation are transformers'."""
    ranks.run(1, agreement, path=family_checkpoint)


def test_the_engine_holds_exactly_the_quantised_export(ranks: RankPool, family_checkpoint: Path) -> None:
    original = [(name, tensor.bfloat16()) for name, tensor in load_file(family_checkpoint / "model.safetensors").items()]
    expected = dict(quantize_bucket(original))
    for state, scales in ranks.run(4, pushed_state, path=family_checkpoint, quantization="fp8_e4m3", tp=2, pp=2):
        assert len(scales) == 8 and state.keys() == (expected | scales).keys()
        for name, tensor in (expected | scales).items():
            assert state[name].dtype == tensor.dtype and torch.equal(state[name].float(), tensor.float()), name


@pytest.mark.parametrize("model_type", [*CHECKPOINTS, "qwen3_5"])
def test_fp8_engine_is_close_to_float32_but_not_equal(model_type: str) -> None:
    engines = Engines(DENSE | {"model_type": model_type, **EXTRA.get(model_type, {})})
    fp8, exact = engines.make(FP8, torch.bfloat16), engines.fitted(BF16)
    scales = KVScales(torch.full((LAYERS,), 8.0), torch.full((LAYERS,), 8.0), torch.ones(LAYERS))
    fp8.update_weights(
        [quantize_bucket(engines.weights(torch.bfloat16)), list(scales.named_tensors(exact._architecture.attention_layers))], 0
    )
    prompts, sampling = make_prompts([5, 9, 3]), SamplingParams(4, 12, seed=1)
    settings = {key: value for key, value in hf_config(exact._architecture, "fp32").items() if key not in ("architectures", "dtype")}
    model_class = getattr(transformers, FAMILIES[model_type].hf_class)
    model = model_class(model_class.config_class(**settings, attn_implementation="eager")).eval()
    model.load_state_dict(exact.state_tensors())
    for engine, low, high in ((exact, 0.0, 1e-5), (fp8, 1e-4, 0.25)):  # without norms on Q and K attention is sharper
        gaps = []
        for rollout in engine.generate(prompts, sampling):
            ids = rollout.prompt.token_ids + rollout.token_ids
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0, len(rollout.prompt.token_ids) - 1 : -1].log_softmax(-1)
            gaps.append(torch.tensor(rollout.rollout_logprobs) - log_probs.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0])
        assert low <= torch.cat(gaps).abs().mean() < high
