"""LoRA against PEFT and against itself, under every layout, with real processes over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ais_megatron.config import CheckpointConfig, ConfigError, build_config, dump_config
from ais_megatron.export.adapter import AdapterReader, factor_shapes, write_adapter
from ais_megatron.export.run import export_run
from ais_megatron.planning.parameters import factor_count
from ais_megatron.tokenizer import SentencePieceTokenizer
from tests.helpers.policies import LAYOUTS, MOE_LAYOUTS, TEMPERATURE, make_batch, make_config, make_policy, moe_config, my_rows, weights_of
from tests.helpers.ranks import RankPool

LORA = {"rank": 4, "alpha": 8.0}


def lora_config(path: Path, adapter: Path | None = None, lora: dict[str, object] | None = None, **layout: object):  # noqa: ANN201
    model = {"adapter": None if adapter is None else str(adapter), **layout.pop("model", {})}
    return make_config(path, policy={"lora": lora or LORA}, model=model, **layout)


def make_adapter(folder: Path, path: Path, lora: dict[str, object] | None = None) -> Path:
    """A PEFT folder with random factors."""
    config = lora_config(path, lora=lora)
    generator = torch.Generator().manual_seed(7)
    factors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in factor_shapes(config).items()}
    folder.mkdir()
    write_adapter(folder, config, str(path), factors.items())
    return folder


def peft_logprobs(path: Path, adapter: Path) -> Tensor:
    """Log-probabilities of the scored tokens, by PEFT around transformers' model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    batch = make_batch()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32), adapter)
    with torch.no_grad():
        logits = model(batch.tokens).logits.float() / TEMPERATURE
    result = torch.zeros(batch.tokens.shape)
    result[:, 1:] = logits.log_softmax(-1)[:, :-1].gather(2, batch.tokens[:, 1:, None]).squeeze(2)
    return result * batch.loss_mask


def started(rank: int, path: Path, adapter: Path, **layout: object):  # noqa: ANN201
    policy = make_policy(lora_config(path, adapter, **layout), path)
    rows, index = my_rows(make_batch())
    apart = [
        dict(part for bucket in export(2**14) for part in bucket) for export in (policy.export_frozen_buckets, policy.export_factor_buckets)
    ]
    return policy.logprobs(rows), index, weights_of(policy), *({name: tensor.clone() for name, tensor in part.items()} for part in apart)


@pytest.mark.parametrize("targets", [[], ["q_proj", "v_proj", "down_proj", "up_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_of_peft_gives_the_logprobs_of_peft(
    ranks: RankPool, checkpoint: Path, tmp_path: Path, layout: str, targets: list[str]
) -> None:
    """The factors also reach the export: with them merged, the weights are those that PEFT merges. Apart, both are what was loaded."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = {**LORA, "targets": targets}
    adapter = make_adapter(tmp_path / "adapter", checkpoint, lora)
    expected = peft_logprobs(checkpoint, adapter)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    plain = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    merged = PeftModel.from_pretrained(whole, adapter).merge_and_unload().state_dict()
    world, tp, pp, sp = LAYOUTS[layout]
    stored = {
        name.removeprefix("base_model.model.model."): tensor for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    results = ranks.run(world, started, path=checkpoint, adapter=adapter, lora=lora, tp=tp, pp=pp, sp=sp)
    for logprobs, index, weights, frozen, factors in results:
        assert factors.keys() == stored.keys() and all(torch.equal(factors[name], tensor) for name, tensor in stored.items())
        assert frozen.keys() == weights.keys() and all(torch.equal(frozen[name], plain[name]) for name in frozen)
        assert (logprobs - expected[index]).abs().max() < 1e-4
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
    changed = [name for name in weights if not torch.equal(plain[name], merged[name])]
    assert len(changed) == 4 * (len(targets) or 7), "four layers"


def trained(rank: int, path: Path, recompute: str = "none", **layout: object):  # noqa: ANN201
    """The factors and the exported weights after three steps, the last metrics, and the log-probabilities of the KL reference."""
    from dataclasses import replace

    from ais_megatron.algorithm.scaler import LossScaler

    config = lora_config(path, model={"recompute": recompute}, objective={"kl_coefficient": 0.01}, **layout)
    policy = make_policy(config, path)
    frozen = {name: p.detach().clone() for name, p in policy.model.named_parameters() if not p.requires_grad}
    rows, index = my_rows(make_batch())
    first = policy.logprobs(rows)
    rows = replace(rows, rollout_logprobs=(first - 0.2) * rows.loss_mask)
    for _ in range(3):
        reference = policy.reference_logprobs(rows)
        assert reference is not None
        metrics = policy.train_step(rows, policy.logprobs(rows), LossScaler(alpha=0.5, aggregation="token"), reference)
    torch.testing.assert_close(policy.reference_logprobs(rows), first)
    assert all(torch.equal(p, frozen[name]) for name, p in policy.model.named_parameters() if name in frozen)
    assert all(p.grad is None and not hasattr(p, "main_grad") for p in policy.model.parameters() if not p.requires_grad)
    in_optimizer = sum(p.numel() for group in policy.optimizer.param_groups for p in group["params"])
    return weights_of(policy), metrics, (policy.logprobs(rows) - first).abs().max().item(), in_optimizer


@pytest.fixture(scope="module")
def trained_alone(ranks: RankPool, untied_checkpoint: Path):  # noqa: ANN201
    return ranks.run(1, trained, path=untied_checkpoint)[0]


@pytest.mark.parametrize(
    ("layout", "recompute"), [*((name, "none") for name in LAYOUTS if name != "TP1"), ("TP1", "full"), ("PP2", "full")]
)
def test_training_is_independent_of_the_layout(
    ranks: RankPool, untied_checkpoint: Path, trained_alone, layout: str, recompute: str
) -> None:
    world, tp, pp, sp = LAYOUTS[layout]
    weights, metrics, moved, _ = trained_alone
    assert moved > 1e-3, "the factors must learn"
    for found, found_metrics, _, _ in ranks.run(
        world, trained, path=untied_checkpoint, recompute=recompute, tp=tp, pp=pp, sp=sp, budget=40
    ):
        for name in ("loss", "entropy", "grad_norm", "reference_kl"):
            assert found_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name
        for name, weight in weights.items():
            difference = (found[name] - weight).abs()
            assert difference.max() < 2e-4 and difference.mean() < 1e-6, name


def test_only_the_factors_are_trained(trained_alone, untied_checkpoint: Path) -> None:
    config = lora_config(untied_checkpoint)
    assert trained_alone[3] == sum(rows * columns for rows, columns in factor_shapes(config).values()) == factor_count(config)


@pytest.mark.parametrize("layout", ["one", "TP2+EP2", "PP2+EP2"])
def test_the_attention_of_a_moe_model(ranks: RankPool, moe_checkpoint: Path, layout: str) -> None:
    world, parallel = MOE_LAYOUTS[layout]
    expected = ranks.run(1, moe_trained, path=moe_checkpoint, parallel={})[0]
    for found in ranks.run(world, moe_trained, path=moe_checkpoint, parallel=parallel):
        for name, weight in expected.items():
            assert (found[name] - weight).abs().max() < 2e-4, name
    original = load_file(moe_checkpoint / "model.safetensors")
    changed = {name.split(".")[-2] for name, weight in expected.items() if not torch.equal(weight, original[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}


def moe_trained(rank: int, path: Path, parallel: dict[str, object]) -> dict[str, Tensor]:
    from dataclasses import replace

    from ais_megatron.algorithm.scaler import LossScaler

    config = moe_config(path, parallel)
    config = config.model_copy(update={"policy": lora_config(path).policy})
    policy = make_policy(config, path)
    rows, _ = my_rows(make_batch())
    for _ in range(2):
        old = policy.logprobs(rows)
        rows = replace(rows, rollout_logprobs=(old - 0.2) * rows.loss_mask)
        policy.train_step(rows, old, LossScaler(alpha=0.5, aggregation="token"))
    return weights_of(policy)


def saved(rank: int, path: Path, run: Path, resumed: bool, **layout: object):  # noqa: ANN201
    """A run folder after one step (or the checkpoint in it), and the weights after another."""
    from dataclasses import replace

    from ais_megatron.algorithm.scaler import LossScaler
    from ais_megatron.policy import checkpoint
    from ais_megatron.policy.saver import Saver
    from ais_megatron.policy.training_state import TrainingState

    config = lora_config(path, **layout)
    policy = make_policy(config, path)
    rows, _ = my_rows(make_batch())
    rows = replace(rows, rollout_logprobs=rows.loss_mask * -3.0)

    def step() -> None:
        policy.train_step(rows, policy.logprobs(rows), LossScaler(alpha=0.5, aggregation="token"))

    def tokenizer(folder: Path) -> None:
        SentencePieceTokenizer.train(["0 1 2 3 4 5 6 7 8 9"], 40, [], folder / "tokenizer.model")

    if resumed:
        checkpoint.load(policy, run / "checkpoints" / "step_000001", with_optimizer=True)
    else:
        step()
        Saver(policy, run / "checkpoints", CheckpointConfig(), None, add_files=tokenizer).save_now(TrainingState(step=1))
        if rank == 0:
            (run / "config.yaml").write_text(dump_config(config))
    before = weights_of(policy)
    step()
    return before, weights_of(policy)


def test_a_checkpoint_has_only_the_factors_and_resumes_exactly(ranks: RankPool, untied_checkpoint: Path, tmp_path: Path) -> None:
    (before, after), _ = ranks.run(2, saved, path=untied_checkpoint, run=tmp_path, resumed=False, tp=2)
    shapes = factor_shapes(lora_config(untied_checkpoint))
    metadata = FileSystemReader(str(tmp_path / "checkpoints" / "step_000001")).read_metadata().state_dict_metadata
    stored = {name: entry.size for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
    assert {name: tuple(size) for name, size in stored.items() if not name.startswith("optimizer.")} == {
        f"lora.{name}": shape for name, shape in shapes.items()
    }
    elements = sum(rows * columns for rows, columns in shapes.values())
    assert sum(size.numel() for name, size in stored.items() if name.startswith("optimizer.")) <= 4 * elements, "moments and master copies"
    (again, then), _ = ranks.run(2, saved, path=untied_checkpoint, run=tmp_path, resumed=True, tp=2)
    assert all(torch.equal(again[name], before[name]) and torch.equal(then[name], after[name]) for name in before)
    other = ranks.run(1, saved, path=untied_checkpoint, run=tmp_path, resumed=True)[0]  # another layout
    for name in before:
        torch.testing.assert_close(other[0][name], before[name], rtol=1e-5, atol=1e-6)
        assert (other[1][name] - after[name]).abs().max() < 2e-4

    export_run(tmp_path, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == before.keys()
    for name, weight in before.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-6)

    export_run(tmp_path, tmp_path / "adapter", adapter=True)
    adapter = tmp_path / "adapter"
    _, index, weights, *_ = ranks.run(1, started, path=untied_checkpoint, adapter=adapter)[0]
    for name in before:
        torch.testing.assert_close(weights[name], before[name], rtol=1e-5, atol=1e-6)
    ours = ranks.run(1, started, path=untied_checkpoint, adapter=adapter)[0][0]
    assert (ours - peft_logprobs(untied_checkpoint, adapter)).abs().max() < 1e-4


def test_an_adapter_that_does_not_fit_is_named(checkpoint: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", checkpoint)
    with pytest.raises(ValueError, match=r"has rank 4, but policy.lora.rank=8(.|\n)*has lora_alpha 8"):
        AdapterReader(adapter, lora_config(checkpoint, lora={"rank": 8, "alpha": 16.0}))
    with pytest.raises(ValueError, match=r"factors for \['down_proj'.*policy.lora.targets means \['q_proj'\]"):
        AdapterReader(adapter, lora_config(checkpoint, lora={**LORA, "targets": ["q_proj"]}))
    settings = adapter / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"inference_mode"', '"use_dora": true, "inference_mode"'))
    with pytest.raises(ValueError, match="only plain LoRA"):
        AdapterReader(adapter, lora_config(checkpoint))
    with pytest.raises(ValueError, match="not a PEFT folder"):
        AdapterReader(tmp_path, lora_config(checkpoint))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"policy": {"lora": {"rank": 4, "dropout": 0.1}}}, "policy.lora.dropout=0.1: must be 0"),
        ({"policy": {"lora": {"rank": 4, "targets": ["embed"]}}}, "policy.lora.targets"),
        ({"model": {"adapter": "x"}}, "model.adapter=x: needs LoRA"),
        ({"policy": {"lora": {"rank": 4}}, "model": {"adapter": "x"}, "sft": {"steps": 3}}, "set sft.steps=0"),
    ],
)
def test_settings_that_cannot_work(checkpoint: Path, sections: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(checkpoint, **sections)


def test_lora_needs_weights_to_freeze_and_leaves_experts_alone(moe_checkpoint: Path) -> None:
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    with pytest.raises(ConfigError, match="there are no weights to freeze"):
        build_config({"model": {"architecture": {**sizes, "head_dim": 16}}, "policy": {"lora": {"rank": 4}}})
    with pytest.raises(ConfigError, match="down_proj, up_proj belong to the experts .* use q_proj, k_proj, v_proj, o_proj"):
        make_config(moe_checkpoint, policy={"lora": {"rank": 4, "targets": ["q_proj", "up_proj", "down_proj"]}})


def test_export_says_that_a_run_has_no_adapter(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(make_config(checkpoint)))
    with pytest.raises(ConfigError, match="--adapter: .* trained all weights"):
        export_run(tmp_path, tmp_path / "out", adapter=True)
