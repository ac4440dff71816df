"""Qwen3.5 against transformers: layers with a gated delta rule, gated attention, and checkpoints as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ais_megatron.config import Architecture, ConfigError, OptimizerConfig, build_config, load_config, read_architecture
from ais_megatron.config.hf_config import hf_config, read_eos_ids
from ais_megatron.export.hf_reader import HFReader
from ais_megatron.planning.cost import Assumptions
from ais_megatron.planning.parameters import total_parameters
from ais_megatron.planning.plan import make_plan, with_gpus
from ais_megatron.quantization.fp8 import quantize_bucket
from tests.helpers.engines import DENSE, RECURRENT
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

ATTENTION = (1, 3)  # of the four layers


# --- policy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["TP1", "TP2", "TP2+SP", "PP2", pytest.param("TP2xPP2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 2e-4), pytest.param("bf16", 3e-2, marks=pytest.mark.slow)])
def test_logprobs_equal_transformers(ranks: RankPool, qwen35: Path, layout: str, dtype: str, tolerance: float) -> None:
    """Rows of different lengths, padded on the right, several in a microbatch."""
    world, tp, pp, sp = LAYOUTS[layout]
    expected = reference_logprobs(qwen35, make_batch())
    for found, index in ranks.run(world, policy_logprobs, path=qwen35, tp=tp, pp=pp, sp=sp, dtype=dtype, budget=40):
        assert (found - expected[index]).abs().max() < tolerance


def gradients(rank: int, path: Path, **layout: Any) -> dict[str, Tensor]:
    """The gradients of a supervised step on this rank, by the names in the whole model, as Megatron has summed them."""
    from megatron.core import parallel_state

    policy = make_policy(make_config(path, **layout), path)
    found: dict[str, Tensor] = {}
    first = parallel_state.get_pipeline_model_parallel_rank() * (4 // parallel_state.get_pipeline_model_parallel_world_size())

    def keep() -> tuple[bool, float, int]:
        for name, parameter in policy.model.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + first)
            found[".".join(parts)] = parameter.main_grad.clone()
        return True, 1.0, 0

    policy.optimizer.step = keep
    policy.sft_step(make_batch())
    return found


@pytest.mark.parametrize("layout", ["TP1", "TP2", "TP2+SP", "PP2"])
def test_gradients_equal_transformers(ranks: RankPool, qwen35: Path, layout: str) -> None:
    """Of the tensors that every tensor-parallel rank has whole, among them the norm that all heads of a gated delta rule share."""
    batch = make_batch()
    model = transformers.AutoModelForCausalLM.from_pretrained(qwen35, attn_implementation="eager", dtype=torch.float32)
    logprobs = (model(batch.tokens).logits / 1.3).log_softmax(-1)[:, :-1].gather(2, batch.tokens[:, 1:, None]).squeeze(2)
    mask = batch.loss_mask[:, 1:]
    (-(logprobs * mask).sum() / mask.sum()).backward()
    expected = {
        f"decoder.layers.{layer}.{ours}": model.model.layers[layer].get_parameter(theirs).grad
        for layer in range(4)
        for ours, theirs in (
            ("input_layernorm.weight", "input_layernorm.weight"),
            *(
                [("self_attention.q_layernorm.weight", "self_attn.q_norm.weight")]
                if layer in ATTENTION
                else [("self_attention.out_norm.weight", "linear_attn.norm.weight")]
            ),
        )
    }
    world, tp, pp, sp = LAYOUTS[layout]
    compared = set()
    for found in ranks.run(world, gradients, path=qwen35, tp=tp, pp=pp, sp=sp, budget=40):
        for name in found.keys() & expected.keys():
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6, msg=name)
            compared.add(name)
    assert compared == expected.keys()


@pytest.mark.parametrize("layout", ["TP2", "TP2+SP", "PP2"])
def test_training_is_independent_of_layout(ranks: RankPool, qwen35: Path, layout: str) -> None:
    world, tp, pp, sp = LAYOUTS[layout]
    alone, metrics = ranks.run(1, trained_weights, path=qwen35)[0]
    start = load_file(qwen35 / "model.safetensors")
    for weights, found in ranks.run(world, trained_weights, path=qwen35, tp=tp, pp=pp, sp=sp, budget=40):
        assert weights.keys() == alone.keys() == start.keys()
        assert found["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-4)
        for name, tensor in weights.items():
            assert (tensor - alone[name]).abs().max() < 3e-4 and (tensor - alone[name]).abs().mean() < 4e-6, name
            assert not torch.equal(tensor, start[name]), f"{name} was not trained"


def test_recompute_changes_nothing(ranks: RankPool, qwen35: Path) -> None:
    (plain, _), (recomputed, _) = (ranks.run(1, trained_weights, path=qwen35, recompute=how)[0] for how in ("none", "full"))
    assert all((recomputed[name] - tensor).abs().mean() < 2e-6 for name, tensor in plain.items())


def padded_alone(rank: int, path: Path) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a short row by itself, and beside a longer one."""
    policy, batch = make_policy(make_config(path), path), make_batch()
    alone = policy.logprobs(batch.rows(torch.tensor([4]), 5))
    return alone, policy.logprobs(batch.rows(torch.tensor([4, 0])))[:1, :5]


def test_padding_on_the_right_changes_nothing(ranks: RankPool, qwen35: Path) -> None:
    alone, padded = ranks.run(1, padded_alone, path=qwen35)[0]
    assert (alone - padded).abs().max() < 1e-6 and alone.abs().max() > 0.1


def test_calibration_sees_layers_with_attention_only(ranks: RankPool, qwen35: Path) -> None:
    expected = reference_amax(qwen35, make_batch())
    for amax in ranks.run(2, calibrated, path=qwen35, tp=2, pp=1):
        torch.testing.assert_close(amax[:, list(ATTENTION)], expected, rtol=1e-4, atol=1e-5)
        assert (amax[:, [0, 2]] == 0).all()


def test_the_rule_in_chunks_is_the_rule_token_by_token() -> None:
    """The recurrence as it is written in `gated_delta_net`, in float64."""
    from ais_megatron.policy.gated_delta_net import chunked_delta_rule, unit_length

    generator = torch.Generator().manual_seed(3)
    query, key = (unit_length(torch.randn(2, 11, 3, 4, generator=generator)).double() for _ in range(2))
    value = torch.randn(2, 11, 3, 5, generator=generator, dtype=torch.float64)
    decay, beta = -torch.rand(2, 11, 3, generator=generator, dtype=torch.float64), torch.rand(2, 11, 3, generator=generator).double()
    state, expected = torch.zeros(2, 3, 4, 5, dtype=torch.float64), []
    for t in range(11):
        state = state * decay[:, t].exp()[..., None, None]
        error = value[:, t] - torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], key[:, t], error)
        expected.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) / 2.0)
    for chunk in (1, 4, 11, 64):
        found = chunked_delta_rule(query, key, value, decay, beta, chunk)
        torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-10, atol=1e-12)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def published(folder: Path, source: Path, only_vision: bool = False) -> dict[str, Tensor]:
    """Write the checkpoint as a whole model is published: the language model under a prefix, a vision tower, a head for more tokens."""
    others = {"model.visual.blocks.0.attn.proj.weight": torch.ones(3, 3), "mtp.fc.weight": torch.ones(2, 2)}
    text = load_file(source / "model.safetensors")
    nested = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in text.items()}
    folder.mkdir()
    save_file(others if only_vision else nested | others, folder / "model.safetensors", {"format": "pt"})
    whole = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "tie_word_embeddings": False,
        "text_config": json.loads((source / "config.json").read_text()) | {"eos_token_id": 7, "full_attention_interval": 2},
        "vision_config": {"model_type": "qwen3_5", "depth": 1},
    }
    (folder / "config.json").write_text(json.dumps(whole))
    return text


def imported(rank: int, path: Path, **layout: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a policy that has read `path` twice, and what was said meanwhile."""
    import logging

    from ais_megatron.policy.policy import Policy

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ais_megatron").addHandler(handler)
    try:
        weights = exported(rank, path, **layout)
        Policy(make_config(path, **layout), OptimizerConfig(lr=1e-3), 10, 1.0, str(path))
    finally:
        logging.getLogger("ais_megatron").removeHandler(handler)
    return weights, said


def test_a_published_checkpoint_is_read_and_what_is_left_aside_is_said_once(ranks: RankPool, qwen35: Path, tmp_path: Path) -> None:
    text = published(tmp_path / "whole", qwen35)
    architecture = read_architecture(tmp_path / "whole")
    assert architecture == read_architecture(qwen35) and read_eos_ids(tmp_path / "whole") == [7]
    assert architecture.attention_layers == ATTENTION and architecture.partial_rotary_factor == 0.25
    (weights, said), (others, silence) = ranks.run(2, imported, path=tmp_path / "whole", tp=2)
    for found in (weights, others):
        assert found.keys() == text.keys() and all(torch.equal(found[name], tensor) for name, tensor in text.items())
    assert silence == [] and len(said) == 1
    assert "2 tensors of model.visual. and mtp.* are left aside" in said[0]


def test_a_checkpoint_without_a_language_model_is_refused(qwen35: Path, tmp_path: Path) -> None:
    published(tmp_path / "vision", qwen35, only_vision=True)
    with pytest.raises(ValueError, match=r"has no language model, only 2 tensors such as .*model.language_model"):
        HFReader(tmp_path / "vision")


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_transformers_loads_the_export(ranks: RankPool, qwen35: Path, tmp_path: Path, tp: int, pp: int) -> None:
    original = load_file(qwen35 / "model.safetensors")
    for weights in ranks.run(tp * pp, exported, path=qwen35, out=tmp_path, tp=tp, pp=pp):
        assert weights.keys() == original.keys()
        assert all(torch.equal(weights[name], original[name]) for name in original)
    assert read_architecture(tmp_path) == read_architecture(qwen35)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["full_attention_interval"] == 2 and written["layer_types"][:2] == ["linear_attention", "full_attention"]
    tokens = make_batch().tokens
    with torch.no_grad():
        ours, theirs = (
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits for folder in (tmp_path, qwen35)
        )
    assert torch.equal(ours, theirs)


def saved(rank: int, path: Path, folder: Path, **layout: Any) -> dict[str, Tensor]:
    """Train two steps, save, train a third."""
    from ais_megatron.policy.checkpoint import PendingSave
    from ais_megatron.policy.training_state import STATE_FILE, TrainingState
    from tests.helpers.policies import weights_of

    policy = make_policy(make_config(path, **layout), path)
    for _ in range(2):
        policy.sft_step(make_batch())
    state = TrainingState(step=2).of(policy)
    folder.mkdir(exist_ok=True)
    pending = PendingSave(policy, folder, copies=True)
    pending.write()
    pending.finish()
    if rank == 0:
        (folder / STATE_FILE).write_text(state.to_json())
    policy.sft_step(make_batch())
    return weights_of(policy)


def resumed(rank: int, path: Path, folder: Path, **layout: Any) -> dict[str, Tensor]:
    from ais_megatron.policy.checkpoint import load
    from tests.helpers.policies import weights_of

    policy = make_policy(make_config(path, **layout), path)
    load(policy, folder, with_optimizer=True)
    policy.sft_step(make_batch())
    return weights_of(policy)


@pytest.mark.parametrize(("before", "after"), [("TP2+SP", "PP2"), ("PP2", "TP2"), ("TP1", "TP2xPP2")])
def test_a_checkpoint_of_unlike_layers_goes_to_another_layout(
    ranks: RankPool, qwen35: Path, tmp_path: Path, before: str, after: str
) -> None:
    """With Adam's moments: the third step would differ without them."""
    from ais_megatron.export.checkpoint_reader import CheckpointReader

    results = []
    for layout, function in ((before, saved), (after, resumed)):
        world, tp, pp, sp = LAYOUTS[layout]
        results.append(ranks.run(world, function, path=qwen35, folder=tmp_path / "step", tp=tp, pp=pp, sp=sp))
    (expected, *_), others = results
    for weights in others:
        assert all((weights[name] - tensor).abs().mean() < 2e-6 for name, tensor in expected.items())
    start = load_file(qwen35 / "model.safetensors")
    exported_alone = dict(CheckpointReader(tmp_path / "step", read_architecture(qwen35)).tensors())
    assert exported_alone.keys() == start.keys()
    for name, tensor in exported_alone.items():  # after two steps, between the start and the third
        assert tensor.shape == start[name].shape and 0 < (tensor - expected[name]).abs().max() < 3e-3, name


def with_factors(rank: int, path: Path, adapter: Path, **layout: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Factors as loaded, the merged export, and the factors after two steps."""
    config = make_config(path, policy={"lora": {"rank": 3, "alpha": 6.0}}, model={"adapter": str(adapter)}, **layout)
    policy = make_policy(config, path)

    def factors() -> dict[str, Tensor]:
        return {name: tensor.clone() for bucket in policy.export_factor_buckets(5_000) for name, tensor in bucket}

    loaded, merged = factors(), {name: tensor.clone() for bucket in policy.export_buckets(20_000) for name, tensor in bucket}
    for _ in range(2):
        policy.sft_step(make_batch())
    return loaded, merged, factors()


@pytest.mark.parametrize("layout", ["TP2", "TP2+SP", "PP2"])
def test_lora_on_projections_of_both_kinds_of_layers(ranks: RankPool, qwen35: Path, tmp_path: Path, layout: str) -> None:
    from ais_megatron.export.adapter import factor_shapes, write_adapter

    config = make_config(qwen35, policy={"lora": {"rank": 3, "alpha": 6.0}})
    generator = torch.Generator().manual_seed(5)
    factors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in factor_shapes(config).items()}
    assert "layers.0.linear_attn.in_proj_qkv.lora_B.weight" in factors and "layers.1.self_attn.q_proj.lora_B.weight" in factors
    assert not any("in_proj_a" in name or "in_proj_b" in name or "conv1d" in name for name in factors)
    write_adapter(tmp_path, config, str(qwen35), factors.items())
    original = load_file(qwen35 / "model.safetensors")
    world, tp, pp, sp = LAYOUTS[layout]
    ((_, _, alone),) = ranks.run(1, with_factors, path=qwen35, adapter=tmp_path)
    for loaded, merged, trained in ranks.run(world, with_factors, path=qwen35, adapter=tmp_path, tp=tp, pp=pp, sp=sp, budget=40):
        assert loaded.keys() == factors.keys() and all(torch.equal(loaded[name], factor) for name, factor in factors.items())
        for name, weight in original.items():
            a, b = (factors.get(name.removeprefix("model.").removesuffix("weight") + f"lora_{kind}.weight") for kind in "AB")
            expected = weight if a is None or b is None else weight + 2.0 * b @ a
            torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-5, msg=name)
        for name, factor in trained.items():
            assert (factor - alone[name]).abs().mean() < 5e-6 and not torch.equal(factor, factors[name]), name


def saved_factors(rank: int, path: Path, folder: Path, is_first: bool, **layout: Any) -> dict[str, Tensor]:
    """The factors after two steps and a save, or as a new policy has them after loading."""
    from ais_megatron.policy.checkpoint import PendingSave, load
    from ais_megatron.policy.training_state import STATE_FILE, TrainingState

    policy = make_policy(make_config(path, policy={"lora": {"rank": 3}}, **layout), path)
    if is_first:
        for _ in range(2):
            policy.sft_step(make_batch())
        folder.mkdir(exist_ok=True)
        pending = PendingSave(policy, folder, copies=False)
        pending.write()
        pending.finish()
        if rank == 0:
            (folder / STATE_FILE).write_text(TrainingState(step=2).of(policy).to_json())
    else:
        load(policy, folder, with_optimizer=True)
    return {name: tensor.clone() for bucket in policy.export_factor_buckets(5_000) for name, tensor in bucket}


def test_a_checkpoint_of_factors_goes_to_another_layout(ranks: RankPool, qwen35: Path, tmp_path: Path) -> None:
    from ais_megatron.export.checkpoint_reader import CheckpointReader

    expected, _ = ranks.run(2, saved_factors, path=qwen35, folder=tmp_path / "step", is_first=True, tp=2)
    for found in ranks.run(2, saved_factors, path=qwen35, folder=tmp_path / "step", is_first=False, pp=2):
        assert found.keys() == expected.keys() and all(torch.equal(found[name], factor) for name, factor in expected.items())
    reader = CheckpointReader(tmp_path / "step", read_architecture(qwen35))
    for name, factor in expected.items():
        assert torch.equal(reader.factor(name, (factor.shape[0], factor.shape[1])), factor), name
        assert factor.abs().max() > 0, f"{name} was not trained"


# --- configuration ----------------------------------------------------------------------------------------------------


def test_the_published_9b_configuration(tmp_path: Path) -> None:
    """transformers' defaults are those of Qwen3.5-9B, and so are the sizes in configs/."""
    whole = {"model_type": "qwen3_5", "text_config": transformers.Qwen3_5TextConfig().to_dict() | {"full_attention_interval": 4}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    architecture = read_architecture(tmp_path)
    with torch.device("meta"):
        model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig())
    assert total_parameters(architecture) == sum(parameter.numel() for parameter in model.parameters())
    assert len(architecture.attention_layers) == 8 and architecture.attention_layers[0] == 3
    shipped = load_config(ROOT / "configs" / "qwen3_5_9b_ais.yaml").architecture
    assert shipped.model_copy(update={"rope_theta": architecture.rope_theta}) == architecture  # transformers' own default is no model's


def test_the_shipped_9b_layout_fits_with_lora() -> None:
    """As slurm/qwen3_5_9b_ais.sbatch runs it; a warm start stands in for the model's files, which LoRA needs."""
    lora = ["policy.lora.rank=128", "policy.lora.alpha=64", "sft.steps=1"]
    assert " ".join(lora[:2]) in (ROOT / "slurm" / "qwen3_5_9b_ais.sbatch").read_text()
    config = load_config(ROOT / "configs" / "qwen3_5_9b_ais.yaml", lora)
    assert make_plan(with_gpus(config, 8), Assumptions()).problems == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_num_key_heads": 3}, "linear_num_value_heads=4 must be a multiple of linear_num_key_heads=3"),
        ({"full_attention_interval": 0}, "full_attention_interval=0: must be 1 or more with model_type=qwen3_5"),
        ({"partial_rotary_factor": 0.2}, "rotates 3 of head_dim=16 numbers"),
        ({"model_type": "qwen3"}, "linear_num_key_heads=2: must be 0 with model_type=qwen3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Architecture(**{**DENSE, "model_type": "qwen3_5", **RECURRENT, **changes})


def test_layers_in_an_irregular_order_are_refused(tmp_path: Path) -> None:
    raw = hf_config(Architecture(**DENSE, model_type="qwen3_5", **RECURRENT), "fp32")
    raw["layer_types"] = ["full_attention", "linear_attention"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="layer_types=.* is not supported; allowed: .*full_attention at regular intervals"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"tp": 4}}, r"parallel.tp=4: does not divide model.architecture.linear_num_key_heads=2; use one of \[1, 2\]"),
        ({"parallel": {"cp": 2}}, "parallel.cp=2: model_type=qwen3_5 has layers with a recurrent state"),
        ({"train": {"packing": True}}, "train.packing=true: model_type=qwen3_5 has layers with a recurrent state"),
        ({"policy": {"forward_precision": "fp8_te"}}, "policy.forward_precision=fp8_te: not supported for .*qwen3_5"),
        (
            {"rollout": {"engine": "sglang", "sglang": {"tp": 4}}},
            "rollout.sglang.tp=4: does not divide model.architecture.linear_num_key_heads=2",
        ),
        (
            {"rollout": {"engine": "sglang", "quantization": "fp8_e4m3"}},
            r"multiples of rollout.weight_block=128, but linear_num_key_heads \* linear_key_head_dim is 16; lower",
        ),
        (
            {"rollout": {"engine": "sglang", "lora_sync": "adapter"}},
            "rollout.lora_sync=adapter: not supported for .*qwen3_5; set it to merged",
        ),
    ],
)
def test_what_the_family_cannot_do_is_refused(sections: dict, message: str) -> None:
    model = {"architecture": {**DENSE, "model_type": "qwen3_5", **RECURRENT}}
    with pytest.raises(ConfigError, match=message):
        build_config({"model": model, "sft": {"steps": 1}, **sections})


# --- engine -----------------------------------------------------------------------------------------------------------


def test_engine_and_trainer_agree_in_float32(ranks: RankPool, qwen35: Path) -> None:
    """Prompts of different lengths, padded on the left, and rows that end at different steps."""
    ranks.run(1, agreement, path=qwen35)


def test_the_engine_holds_exactly_the_quantised_export(ranks: RankPool, qwen35: Path) -> None:
    original = [(name, tensor.bfloat16()) for name, tensor in load_file(qwen35 / "model.safetensors").items()]
    expected = dict(quantize_bucket(original))
    quantized = {name.removesuffix("_scale_inv").rpartition("layers.")[2].partition(".")[2] for name in expected if "scale_inv" in name}
    projections = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")} | {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    assert quantized == projections | {f"linear_attn.{name}.weight" for name in ("in_proj_qkv", "in_proj_z", "out_proj")}
    for state, scales in ranks.run(4, pushed_state, path=qwen35, quantization="fp8_e4m3", tp=2, pp=2, layers=ATTENTION):
        assert len(scales) == 4 and state.keys() == (expected | scales).keys()
        for name, tensor in (expected | scales).items():
            assert state[name].dtype == tensor.dtype and torch.equal(state[name].float(), tensor.float()), name
