"""The aligned forward pass: the engine's numbers under every layout, and gradients straight through."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ais_megatron.batch import Prompt, assemble
from ais_megatron.config import CheckpointConfig, Config, ConfigError, OptimizerConfig, build_config, dump_config
from ais_megatron.config.policy import LoraConfig
from ais_megatron.export.adapter import factor_names, factor_shapes
from ais_megatron.export.run import export_run
from ais_megatron.models.registry import is_quantized_weight
from ais_megatron.quantization.formats import FORMATS, FP8_E4M3, INT4, Format
from ais_megatron.quantization.fp8 import dequantize_block, quantize_block, quantize_dequantize_groups
from ais_megatron.tokenizer import SentencePieceTokenizer
from tests.helpers.policies import LAYOUTS, MOE_LAYOUTS, TEMPERATURE, make_batch, make_config, make_policy, my_rows, weights_of
from tests.helpers.ranks import RankPool

BLOCK = 32  # smaller than the layers, of which some are no multiple: 64 and 96 rows, 16 to a head


def aligned_config(
    path: Path,
    precision: str | None = None,
    quantization: str = "fp8_e4m3",
    kv: str = "bf16",
    lora: int = 0,
    replay: bool = False,
    **layout: object,
) -> Config:
    """precision: None means the aligned one of the format. lora: the rank of LoRA. replay: of a MoE model's routes."""
    precision = precision or ("int4_aligned" if quantization == "int4" else "fp8_aligned")
    config = make_config(path, **layout)
    rollout = {
        "quantization": quantization,
        "weight_block": BLOCK,
        "kv_cache": kv,
        "max_response_tokens": 20,
        "return_routed_experts": replay,
    }
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update=rollout),
            "moe": config.moe.model_copy(update={"routing_replay": replay}),
            "policy": config.policy.model_copy(update={"forward_precision": precision, "lora": LoraConfig(rank=lora, alpha=2.0)}),
        }
    )


def random_factor(name: str, shape: tuple[int, int]) -> Tensor:
    """The same factor in every process. PEFT's first B is zero, and so would be the gradient of A."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + sum(name.encode()))) * 0.1


def with_factors(policy):  # noqa: ANN001, ANN201
    """The policy with `random_factor`s, if it has LoRA."""
    if policy.lora is not None:
        shapes = factor_shapes(policy.config)
        policy.lora.load_adapter(SimpleNamespace(read=lambda name, *part: random_factor(name, shapes[name])[part]))
    return policy


def in_parallel(config: Config, parallel: dict[str, object]) -> Config:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})


def quantized_weights(rank: int, path: Path, quantization: str, parallel: dict[str, object]) -> dict[str, Tensor]:
    """The quantised weights of a policy, gathered as an export would gather them."""
    policy = make_policy(in_parallel(aligned_config(path, quantization=quantization), parallel), path)
    assert policy.aligned is not None
    policy.aligned.refresh()
    for aligned in policy.aligned._linears:
        aligned.linear.weight.data.copy_(aligned.weight)
    return weights_of(policy)


@pytest.mark.parametrize("quantization", ["fp8_e4m3", "fp4_e2m1", "int4"])
@pytest.mark.parametrize("layout", ["one", "TP2", "PP2", "TP2+ETP2+EP2"])
def test_weights_are_quantised_in_the_blocks_of_whole_tensors(
    ranks: RankPool, untied_checkpoint: Path, moe_checkpoint: Path, layout: str, quantization: str
) -> None:
    """Bit for bit as the engine's, also where a block lies on two ranks, or Q, K and V are interleaved."""
    is_moe = layout in MOE_LAYOUTS and layout not in ("one", "PP2")
    path = moe_checkpoint if is_moe else untied_checkpoint
    world, parallel = (2, {"tp": 2}) if layout == "TP2" else MOE_LAYOUTS[layout]
    fmt = FP8_E4M3.with_block(BLOCK) if quantization == "fp8_e4m3" else FORMATS[quantization]
    original = load_file(path / "model.safetensors")
    for weights in ranks.run(world, quantized_weights, path=path, quantization=quantization, parallel=parallel):
        for name, weight in original.items():
            expected = dequantize_block(*quantize_block(weight, fmt), fmt=fmt) if is_quantized_weight(name) else weight
            assert torch.equal(weights[name], expected), name


def gradients(rank: int, path: Path, **options: object) -> tuple[Tensor, dict[str, Tensor], dict[str, tuple[Tensor, int | None]]]:
    """Log-probabilities, the gradients of one update by Megatron's names, and those of LoRA's factors with the dimension that TP splits."""
    policy = with_factors(make_policy(aligned_config(path, **options), path))
    rows = make_batch()
    logprobs = policy.logprobs(rows)
    seen: dict[str, Tensor] = {}
    policy.optimizer.step = lambda: seen.update(
        {name: p.main_grad.clone() for name, p in policy.model.named_parameters() if p.requires_grad}
    )
    policy.sft_step(rows)
    factors = policy.lora.named_factors() if policy.lora else ()
    return logprobs, seen, {name: (factor.main_grad.clone(), dim) for name, factor, dim in factors}


def straight_through_reference(path: Path, fmt: Format, lora: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities and gradients of transformers' model with every projection replaced by F.linear of x + (Q(x) - x) and
    W + (Q(W) - W), both without gradient in the bracket. lora: W has the product of LoRA's factors in it, and only these have gradients."""
    from transformers import AutoModelForCausalLM

    batch, factors = make_batch(), {}
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    shapes = factor_shapes(aligned_config(path, lora=lora)) if lora else {}

    def product(linear: torch.nn.Linear, names: tuple[str, str]):  # noqa: ANN202
        def forward(x: Tensor) -> Tensor:
            weight = linear.weight
            if lora:
                a, b = (factors.setdefault(name, random_factor(name, shapes[name]).requires_grad_()) for name in names)
                weight = weight.detach() + 2.0 / lora * b @ a
            quantized = dequantize_block(*quantize_block(weight.detach(), fmt), fmt=fmt)
            return F.linear(x + (quantize_dequantize_groups(x, fmt) - x).detach(), weight + (quantized - weight).detach())

        return forward

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and is_quantized_weight(f"{name}.weight"):
            module.forward = product(module, factor_names(f"{name.removeprefix('model.')}.weight"))
    logits = model(batch.tokens).logits / TEMPERATURE
    chosen = logits.log_softmax(-1)[:, :-1].gather(2, batch.tokens[:, 1:, None]).squeeze(2) * batch.loss_mask[:, 1:]
    (-chosen.sum() / batch.loss_mask.sum()).backward()
    return chosen.detach(), {name: p.grad for name, p in (factors or dict(model.named_parameters())).items() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp8_aligned", "fp8_weights_aligned", "int4_aligned"])
def test_gradients_are_those_of_a_plain_straight_through_estimator(ranks: RankPool, untied_checkpoint: Path, precision: str) -> None:
    """With the weights alone, inputs are not rounded, and neither are K and V for an FP8 cache."""
    fmt, mask = INT4 if precision == "int4_aligned" else FP8_E4M3.with_block(BLOCK), make_batch().loss_mask[:, 1:]
    rounded = replace(fmt, group=0) if precision == "fp8_weights_aligned" else fmt
    chosen, theirs = straight_through_reference(untied_checkpoint, rounded)
    cache = "fp8_e4m3" if precision == "fp8_weights_aligned" else "bf16"
    options = dict(path=untied_checkpoint, precision=precision, quantization=fmt.name, kv=cache)
    logprobs, seen, _ = ranks.run(1, gradients, **options)[0]
    assert ((logprobs[:, 1:] - chosen) * mask).abs().max() < 1e-4
    for ours, name in (
        ("decoder.layers.0.mlp.linear_fc2.weight", "model.layers.0.mlp.down_proj.weight"),
        ("decoder.layers.2.self_attention.linear_proj.weight", "model.layers.2.self_attn.o_proj.weight"),
        ("decoder.final_layernorm.weight", "model.norm.weight"),
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    ):
        expected = theirs[name]
        assert (seen[ours] - expected).norm() < 1e-3 * expected.norm(), name


@pytest.mark.parametrize(("layout", "recompute"), [("TP1", "none"), ("TP2", "none"), ("TP2+SP", "full"), ("PP2", "full")])
def test_factors_of_lora_have_the_gradients_of_the_merged_weight(
    ranks: RankPool, untied_checkpoint: Path, layout: str, recompute: str
) -> None:
    """The trainer has the engine's Q(W + s B A), and dA and dB are what the straight-through dW gives them. The rest is frozen."""
    mask = make_batch().loss_mask[:, 1:]
    chosen, theirs = straight_through_reference(untied_checkpoint, FP8_E4M3.with_block(BLOCK), lora=4)
    world, tp, pp, sp = LAYOUTS[layout]
    options = dict(path=untied_checkpoint, lora=4, model={"recompute": recompute}, tp=tp, pp=pp, sp=sp)
    results = ranks.run(world, gradients, **options)
    for number, (logprobs, seen, factors) in enumerate(results):
        assert ((logprobs[:, 1:] - chosen) * mask).abs().mean() < (1e-4 if world == 1 else 2e-3)
        assert seen and all(name.startswith("lora.") for name in seen)
        for name, (found, dim) in factors.items():
            expected = theirs[name] if dim is None else theirs[name].chunk(tp, dim)[number % tp]
            assert (found - expected).norm() < (1e-3 if world == 1 else 0.1) * expected.norm(), name
    assert {name for _, _, factors in results for name in factors} == theirs.keys()


def trained(rank: int, path: Path, recompute: str = "none", **layout: object):  # noqa: ANN201
    from ais_megatron.algorithm.scaler import LossScaler

    config = aligned_config(path, model={"recompute": recompute}, kv="fp8_e4m3", **layout)
    policy = make_policy(config, path)
    rows, index = my_rows(make_batch())
    first = policy.logprobs(rows)
    rows = replace(rows, rollout_logprobs=(first - 0.2) * rows.loss_mask)
    for _ in range(2):
        metrics = policy.train_step(rows, policy.logprobs(rows), LossScaler(alpha=0.5, aggregation="token"))
    return first, index, metrics, weights_of(policy)


@pytest.mark.parametrize(("layout", "recompute"), [*((name, "none") for name in LAYOUTS if name != "TP1"), ("TP2+SP", "full")])
def test_the_layout_changes_nothing(ranks: RankPool, untied_checkpoint: Path, layout: str, recompute: str) -> None:
    """But for rounding: a sum in another order can move a value to the next step of FP8."""
    expected, _, metrics, weights = ranks.run(1, trained, path=untied_checkpoint)[0]
    world, tp, pp, sp = LAYOUTS[layout]
    for first, index, found, after in ranks.run(world, trained, path=untied_checkpoint, recompute=recompute, tp=tp, pp=pp, sp=sp):
        assert (first - expected[index]).abs().mean() < 2e-3
        assert found["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=0.02)
        for name, weight in weights.items():
            assert (after[name] - weight).abs().mean() < 2e-4, name


def divergence(
    rank: int, path: Path, parallel: dict[str, object], dtype: str = "bf16", precision: str | None = None, **options
) -> tuple[float, float]:
    """D of the engine's responses under a BF16 trainer, and under an aligned one. precision: that of the latter."""
    from ais_megatron.policy.policy import Policy
    from ais_megatron.rollout.engine import SamplingParams
    from ais_megatron.weight_sync import WeightSync
    from tests.helpers.syncing import make_engine

    prompts = [Prompt(i, "", tuple((torch.arange(8) * (i + 3) % 67 + 3).tolist()), {}) for i in range(32)]
    found = []
    for each in ("bf16", precision):
        config = in_parallel(aligned_config(path, each, dtype=dtype, **options), parallel)
        policy = with_factors(Policy(config, OptimizerConfig(), 10, TEMPERATURE, str(path)) if found else make_policy(config, path))
        engine = make_engine(config, torch.bfloat16 if dtype == "bf16" else torch.float32)
        calibration = policy.calibrate(make_batch())
        WeightSync(policy, engine, config.rollout).push(calibration.scales if config.rollout.kv_cache_is_fp8 else None, version=0)
        rollouts = engine.generate(prompts, SamplingParams(num_samples=1, max_tokens=20, temperature=config.rollout.temperature))
        batch = assemble(rollouts, torch.zeros(len(prompts)), torch.zeros(len(prompts)))
        ratio = (policy.logprobs(batch) - batch.rollout_logprobs)[batch.loss_mask].double()
        found.append(float((ratio.exp() - 1 - ratio).mean()))
    return found[0], found[1]


@pytest.fixture(scope="module", params=[64, 128])
def wide_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BF16, with the head sizes of real models."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=71, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    config = Qwen3Config(**sizes, head_dim=request.param, max_position_embeddings=128, initializer_range=0.08)
    folder = tmp_path_factory.mktemp("wide")
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kv", "times"), [("bf16", 30.0), ("fp8_e4m3", 10.0)])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_mismatch_with_the_engine_falls(ranks: RankPool, wide_checkpoint: Path, tp: int, kv: str, times: float) -> None:
    plain, aligned = ranks.run(tp, divergence, path=wide_checkpoint, kv=kv, parallel={"tp": tp})[0]
    assert plain > times * aligned, (plain, aligned)


@pytest.mark.parametrize("options", [{"lora": 4, "kv": "bf16"}, {"quantization": "int4"}], ids=["lora", "int4"])
@pytest.mark.parametrize("tp", [1, 2])
def test_it_falls_as_much_with_lora_and_with_int4(ranks: RankPool, wide_checkpoint: Path, tp: int, options: dict[str, object]) -> None:
    """How many values are rounded another way is chance. with ten sets of factors and TP2, D fell 8 to 30,000 times, mostly over 100."""
    plain, aligned = ranks.run(tp, divergence, path=wide_checkpoint, parallel={"tp": tp}, **options)[0]
    assert plain > 30.0 * aligned, (plain, aligned)


@pytest.mark.parametrize(("kv", "times"), [("bf16", 30.0), ("fp8_e4m3", 10.0)])
@pytest.mark.parametrize("layout", ["one", "EP2", "ETP2"])
def test_the_mismatch_of_a_moe_model_falls(ranks: RankPool, moe_checkpoint: Path, layout: str, kv: str, times: float) -> None:
    """In BF16 too, because routers and the sum over experts round as the engine's do. So tokens go to the same experts without replay."""
    world, parallel = MOE_LAYOUTS[layout]
    for replay in (False, True) if layout == "one" else (False,):
        plain, aligned = ranks.run(world, divergence, path=moe_checkpoint, kv=kv, parallel=parallel, replay=replay)[0]
        assert plain > times * aligned, (plain, aligned)


def saved(rank: int, path: Path, run: Path, quantization: str) -> None:
    from ais_megatron.policy.saver import Saver
    from ais_megatron.policy.training_state import TrainingState

    def tokenizer(folder: Path) -> None:
        SentencePieceTokenizer.train(["0 1 2 3 4 5 6 7 8 9"], 40, [], folder / "tokenizer.model")

    config = aligned_config(path, quantization=quantization)
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config))
    Saver(make_policy(config, path), run / "checkpoints", CheckpointConfig(), None, add_files=tokenizer).save_now(TrainingState(step=1))


def test_the_export_is_the_quantised_model(ranks: RankPool, untied_checkpoint: Path, tmp_path: Path) -> None:
    original = load_file(untied_checkpoint / "model.safetensors")
    for quantization in ("fp8_e4m3", "fp4_e2m1", "int4"):
        fmt = FP8_E4M3.with_block(BLOCK) if quantization == "fp8_e4m3" else FORMATS[quantization]
        run, out = tmp_path / quantization, tmp_path / f"{quantization}_out"
        ranks.run(1, saved, path=untied_checkpoint, run=run, quantization=quantization)
        export_run(run, out)
        written, described = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
        for name, weight in original.items():
            if not is_quantized_weight(name):
                assert torch.equal(written[name], weight), name
            elif quantization == "fp8_e4m3":
                q, scale = quantize_block(weight, fmt)
                assert torch.equal(written[name].float(), q.float()) and written[name].dtype == torch.float8_e4m3fn, name
                assert torch.equal(written[name.removesuffix("weight") + "weight_scale_inv"], scale), name
            else:
                assert torch.equal(written[name], dequantize_block(*quantize_block(weight, fmt), fmt=fmt)), name
        block = described.get("quantization_config", {}).get("weight_block_size")
        assert block == ([BLOCK, BLOCK] if quantization == "fp8_e4m3" else None)


def test_an_aligned_pass_needs_an_engine_that_quantises(checkpoint: Path) -> None:
    aligned = {"policy": {"forward_precision": "fp8_aligned"}}
    with pytest.raises(ConfigError, match="rollout.quantization=none leaves nothing to align with"):
        build_config({"model": {"path": str(checkpoint)}, "rollout": {"quantization": "none"}, **aligned})
    with pytest.raises(ConfigError, match="set model.transformer_impl to local or auto"):
        build_config({"model": {"path": str(checkpoint), "transformer_impl": "transformer_engine"}, **aligned})
    for precision, quantization, fitting in (("fp8_aligned", "int4", "int4_aligned"), ("int4_aligned", "fp8_e5m2", "fp8_aligned")):
        message = f"{precision}: the engine does not use this format, because rollout.quantization={quantization}.*to {fitting}, or"
        with pytest.raises(ConfigError, match=message):
            make_config(checkpoint, policy={"forward_precision": precision}, rollout={"quantization": quantization})
