"""LLaDA's policy against transformers' Llama model without its causal mask, its files, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ais_megatron.batch import Batch
from ais_megatron.config import Architecture, Config, ConfigError, DiffusionConfig, build_config, read_architecture
from ais_megatron.models.family import names_of_twin, tensors_of
from ais_megatron.models.registry import is_quantized_weight
from ais_megatron.planning.parameters import total_parameters
from tests.helpers.llada import MASK, SIZES, make_llada, masked_batch, reference_logits
from tests.helpers.policies import LAYOUTS, TEMPERATURE, exported, make_config, make_policy, my_rows, weights_of
from tests.helpers.ranks import RankPool

PUBLISHED = """{"activation_type": "silu", "alibi": false, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
"attention_dropout": 0.0, "attention_layer_norm": false, "attention_layer_norm_with_affine": true, "bias_for_layer_norm": false,
"block_group_size": 1, "block_type": "llama", "d_model": 4096, "embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081,
"flash_attention": false, "include_bias": false, "include_qkv_bias": false, "init_device": "meta", "init_fn": "mitchell",
"init_std": 0.02, "input_emb_norm": false, "layer_norm_type": "rms", "layer_norm_with_affine": true, "mask_token_id": 126336,
"max_sequence_length": 4096, "mlp_hidden_size": 12288, "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": null,
"n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0,
"rms_norm_eps": 1e-05, "rope": true, "rope_full_precision": true, "rope_theta": 500000.0, "scale_logits": false, "use_cache": false,
"vocab_size": 126464, "weight_tying": false}"""


DIFFUSION = {"block_length": 20, "steps": 10}  # `make_config` has responses of 20 tokens


def expected_logprobs(folder: Path, batch: Batch) -> Tensor:
    logits = reference_logits(folder, batch.read, batch.lengths) / TEMPERATURE
    return logits.log_softmax(-1).gather(2, batch.tokens[..., None]).squeeze(2) * batch.loss_mask


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llada(tmp_path_factory.mktemp("llada"))


def logprobs(rank: int, path: Path, **layout: object) -> tuple[Tensor, Tensor]:
    policy = make_policy(make_config(path, diffusion=DIFFUSION, **layout), path)
    rows, index = my_rows(masked_batch())
    return policy.logprobs(rows), index


def trained(rank: int, path: Path, **layout: object) -> dict[str, Tensor]:
    from ais_megatron.algorithm.scaler import LossScaler

    policy = make_policy(make_config(path, diffusion=DIFFUSION, **layout), path)
    rows, _ = my_rows(masked_batch())
    rows = replace(rows, rollout_logprobs=(policy.logprobs(rows) - 0.2) * rows.loss_mask)
    for _ in range(3):
        policy.train_step(rows, policy.logprobs(rows), LossScaler(alpha=0.5))
    return weights_of(policy)


@pytest.mark.parametrize("layout", ["TP1", "TP2", "TP2+SP", "PP2"])
def test_logprobs_equal_the_twin_without_its_causal_mask(ranks: RankPool, llada: Path, layout: str) -> None:
    """Rows of several lengths in a microbatch, so padding must not be seen. A position predicts its own token."""
    world, tp, pp, sp = LAYOUTS[layout]
    expected = expected_logprobs(llada, masked_batch())
    for found, index in ranks.run(world, logprobs, path=llada, tp=tp, pp=pp, sp=sp, budget=40):
        assert (found - expected[index]).abs().max() < 1e-4


@pytest.mark.parametrize("layout", ["DP2", "TP2+SP", "PP2"])
def test_training_is_independent_of_the_layout(ranks: RankPool, llada: Path, layout: str) -> None:
    world, tp, pp, sp = LAYOUTS[layout]
    alone = ranks.run(1, trained, path=llada)[0]
    start = load_file(llada / "model.safetensors")
    for weights in ranks.run(world, trained, path=llada, tp=tp, pp=pp, sp=sp, budget=40):
        assert weights.keys() == alone.keys() == start.keys()
        for name, tensor in weights.items():
            assert (tensor - alone[name]).abs().max() < 2e-4 and (tensor - alone[name]).abs().mean() < 2e-6, name
            assert not torch.equal(tensor, start[name]), f"{name} was not trained"


def test_import_then_export_is_the_identity(ranks: RankPool, llada: Path, tmp_path: Path) -> None:
    original = load_file(llada / "model.safetensors")
    for weights in ranks.run(4, exported, path=llada, out=tmp_path, tp=2, pp=2, diffusion=DIFFUSION):
        assert weights.keys() == original.keys()
        assert all(torch.equal(weights[name], original[name]) for name in original)
    assert read_architecture(tmp_path) == read_architecture(llada)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LLaDAModelLM"] and config["d_model"] == 64 and config["mask_token_id"] == MASK


def test_the_table_has_the_names_of_the_published_checkpoints() -> None:
    names = [tensor.name for tensor in tensors_of(Architecture(**SIZES))]
    layer = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")
    ends = {"model.transformer.wte.weight", "model.transformer.ln_f.weight", "model.transformer.ff_out.weight"}
    assert len(names) == len(set(names))
    assert set(names) == ends | {f"model.transformer.blocks.{number}.{part}.weight" for number in range(4) for part in layer}
    quantized = {name.split(".")[-2] for name in names if is_quantized_weight(name)}
    assert quantized == {part for part in layer if "norm" not in part} and not is_quantized_weight("model.transformer.ff_out.weight")
    assert names_of_twin(Architecture(**SIZES))["model.layers.3.mlp.gate_proj.weight"] == "model.transformer.blocks.3.ff_proj.weight"


def test_the_published_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(PUBLISHED)
    architecture = read_architecture(tmp_path)
    assert total_parameters(architecture) == 8_015_581_184
    assert (architecture.head_dim, architecture.rope_theta, architecture.mask_token_id) == (128, 500_000.0, 126_336)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"alibi": True}, "alibi=True in its config.json is not supported; allowed: False"),
        ({"weight_tying": True}, "weight_tying=True in its config.json is not supported"),
        ({"mask_token_id": None}, "mask_token_id=None: must be a token below vocab_size=126464 with model_type=llada"),
        ({"mask_token_id": 126_464}, "mask_token_id=126464: must be a token below"),
    ],
)
def test_other_variants_are_refused(tmp_path: Path, raw: dict[str, object], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(PUBLISHED), **raw}))
    with pytest.raises(ConfigError, match=message):
        read_architecture(tmp_path)


def test_a_causal_model_has_no_mask_token() -> None:
    with pytest.raises(ValueError, match="mask_token_id=5: must be left out with model_type=llama"):
        Architecture(**SIZES | {"model_type": "llama", "mask_token_id": 5})


def config_of(llada: Path, **sections: object) -> Config:
    return make_config(llada, **{"diffusion": DIFFUSION, **sections})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"engine": "sglang"}}, "rollout.engine=sglang: cannot sample from model_type=llada.*; set rollout.engine=local"),
        ({"rollout": {"kv_cache": "fp8_e4m3"}}, "rollout.kv_cache=fp8_e4m3: not supported for model_type=llada: .* there is no KV cache"),
        ({"rollout": {"top_p": 0.9}}, "rollout.top_p=0.9: not supported"),
        ({"rollout": {"save_dir": "recordings"}}, "rollout.save_dir=recordings: not supported"),
        ({"rollout": {"max_response_tokens": 30}}, "max_response_tokens=30: not a multiple of diffusion.block_length=20; use 20"),
        ({"diffusion": {"block_length": 10, "steps": 5}}, "diffusion.steps=5: must be a multiple of the 2 blocks of a response"),
        ({"diffusion": {"block_length": 20, "steps": 21}}, "diffusion.steps=21: .* at most 20"),
        ({"diffusion": DIFFUSION | {"guidance": 1.5}}, "diffusion.guidance=1.5: not supported"),
        ({"diffusion": DIFFUSION | {"rollout_likelihood": "trajectory"}}, "rollout_likelihood=trajectory: differs from .*=one_step"),
        ({"diffusion": DIFFUSION | {"likelihood": "trajectory"}, "objective": {"name": "gspo"}}, "scores only some tokens of a response"),
        ({"diffusion": DIFFUSION | {"likelihood": "trajectory", "masks": 2}}, "diffusion.masks=2: only diffusion.likelihood=one_step"),
        ({"diffusion": DIFFUSION | {"likelihood": "trajectory"}, "correction": "k3_rs"}, "correction=k3_rs: rejects whole responses"),
        ({"policy": {"forward_precision": "fp8_aligned"}}, "policy.forward_precision=fp8_aligned: not supported"),
        ({"train": {"packing": True}}, "train.packing=True: not supported for model_type=llada"),
        ({"eval": {"sets": {"long": {"max_response_tokens": 50}}}}, "eval.sets.long.max_response_tokens=50: not a multiple"),
        (
            {"policy": {"lora": {"rank": 4, "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]}}},
            "down_proj, gate_proj, o_proj are no projections of model_type=llada.*; use q_proj, .*, ff_out",  # d1's list
        ),
    ],
)
def test_what_it_cannot_do_is_refused(llada: Path, sections: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(llada, **sections)


def test_a_causal_model_has_no_settings_of_diffusion_models(untied_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="diffusion.steps=8: only masked diffusion models read it, and model_type=qwen3 is none"):
        make_config(untied_checkpoint, diffusion={"steps": 8})
    with pytest.raises(ConfigError, match="rollout.kv_cache=none: model_type=qwen3 needs a KV cache"):
        make_config(untied_checkpoint, rollout={"kv_cache": "none"})


def test_what_follows_from_the_configuration(llada: Path) -> None:
    config = config_of(llada, rollout={"quantization": "fp8_e4m3", "max_response_tokens": 40})
    assert config.rollout.kv_cache == "none" and not config.rollout.kv_cache_is_fp8
    assert config_of(llada, rollout={"kv_cache": "auto"}).rollout.kv_cache == "none", "auto is what the model needs"
    assert config.diffusion.steps_per_block(40) == 5 and DiffusionConfig().steps_per_block(256) == 16
    assert (config.rows_per_response, config.likelihood_temperature, config.measures_gradients) == (1, 1.0, True)
    stepwise = config_of(llada, diffusion=DIFFUSION | {"likelihood": "trajectory", "states": 3})
    assert (stepwise.rows_per_response, stepwise.likelihood_temperature, stepwise.measures_gradients) == (3, TEMPERATURE, True)
    assert build_config(config.model_dump()) == config
