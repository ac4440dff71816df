"""Policy and engine together: what arrives is what was exported, and where nothing is quantised the two agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ais_megatron.batch import Bucket
from ais_megatron.config import RolloutConfig
from ais_megatron.distributed import all_reduce_sum
from ais_megatron.quantization.formats import FORMATS
from ais_megatron.quantization.fp8 import quantize_bucket
from ais_megatron.quantization.kv_scales import KVScales
from tests.helpers.policies import LAYOUTS, MOE_LAYOUTS, make_config, make_policy
from tests.helpers.ranks import RankPool
from tests.helpers.syncing import agreement, make_engine, pushed_state


@pytest.mark.parametrize("layout", ["TP1", "TP2", "TP2xPP2"])
@pytest.mark.parametrize(
    "quantization", ["none", "fp8_e4m3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp8_e5m2", "fp4_e2m1"))]
)
def test_the_engine_holds_exactly_the_quantised_export(ranks: RankPool, checkpoint: Path, layout: str, quantization: str) -> None:
    from safetensors.torch import load_file

    world, tp, pp, sp = LAYOUTS[layout]
    original = [(name, tensor.bfloat16()) for name, tensor in load_file(checkpoint / "model.safetensors").items()]
    expected = dict(quantize_bucket(original, FORMATS[quantization]) if quantization != "none" else original)
    for state, scales in ranks.run(world, pushed_state, path=checkpoint, quantization=quantization, tp=tp, pp=pp, sp=sp):
        assert state.keys() == (expected | scales).keys()
        for name, tensor in (expected | scales).items():
            assert state[name].dtype == tensor.dtype, name
            assert torch.equal(state[name].float(), tensor.float()), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["EP2", "TP2+ETP2+EP2", "PP2+EP2"])
def test_the_engine_holds_every_expert(ranks: RankPool, moe_checkpoint: Path, layout: str) -> None:
    from safetensors.torch import load_file

    world, parallel = MOE_LAYOUTS[layout]
    original = [(name, tensor.bfloat16()) for name, tensor in load_file(moe_checkpoint / "model.safetensors").items()]
    expected = dict(quantize_bucket(original))
    for state, scales in ranks.run(world, pushed_state, path=moe_checkpoint, quantization="fp8_e4m3", parallel=parallel):
        assert state.keys() == (expected | scales).keys()
        assert all(torch.equal(state[name].float(), tensor.float()) for name, tensor in (expected | scales).items())


def test_engine_and_trainer_agree_in_float32(ranks: RankPool, checkpoint: Path) -> None:
    ranks.run(1, agreement, path=checkpoint)


def refused_on_one_rank(rank: int, path: Path) -> str:
    from ais_megatron.weight_sync import WeightSync

    config = make_config(path, tp=2, dtype="bf16")
    policy, engine = make_policy(config, path), make_engine(config, torch.bfloat16)
    if rank == 1:
        engine._manifest._required.pop("model.norm.weight")
    try:
        WeightSync(policy, engine, config.rollout).push(None, version=0)
    except ValueError as error:
        return f"{error} / version {engine.version}"
    return "accepted"


def test_an_engine_that_refuses_stops_all_ranks(ranks: RankPool, untied_checkpoint: Path) -> None:
    first, second = ranks.run(2, refused_on_one_rank, path=untied_checkpoint)
    assert first == "[rank 1] model.norm.weight: the model has no such tensor / version 0"
    assert second == "[rank 1] model.norm.weight: the model has no such tensor / version -1", "the engine must ask to be refitted"


class CountedPolicy:
    """Exports three buckets, each of which is a collective."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.gathers = weight, 0

    def engine_has(self, scales: KVScales | None) -> None:
        pass

    def export_buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        for layer in range(3):
            all_reduce_sum(torch.zeros(1))
            self.gathers += 1
            yield [(f"model.layers.{layer}.self_attn.q_proj.weight", self.weight)]


class BreakingEngine:
    takes_updates_while_generating = False

    def __init__(self, breaks_after: int) -> None:
        self.breaks_after = breaks_after

    def update_weights(self, buckets: Iterable[Bucket], version: int) -> None:
        if self.breaks_after == 0:
            raise RuntimeError("broken")
        for number, _ in enumerate(buckets, start=1):
            if number == self.breaks_after:
                raise RuntimeError("broken")


def push_that_fails(rank: int, breaks_after: int, bad_weight: bool) -> tuple[str, int]:
    """What a rank raises, and how many gathers it took part in, when the second one's engine or weight is bad."""
    from ais_megatron.weight_sync import WeightSync

    weight = torch.full((128, 128), float("nan") if bad_weight and rank == 1 else 1.0)
    policy, engine = CountedPolicy(weight), BreakingEngine(breaks_after if rank == 1 else -1)
    try:
        WeightSync(policy, engine, RolloutConfig(quantization="fp8_e4m3")).push(None, version=1)
    except (RuntimeError, ValueError) as error:
        return str(error), policy.gathers
    return "no error", policy.gathers


@pytest.mark.parametrize("breaks_after", [0, 1, 3])
def test_a_rank_whose_engine_breaks_takes_part_in_every_gather(ranks: RankPool, breaks_after: int) -> None:
    assert ranks.run(2, push_that_fails, breaks_after=breaks_after, bad_weight=False) == [("[rank 1] broken", 3)] * 2


def test_a_rank_that_cannot_quantise_takes_part_in_every_gather(ranks: RankPool) -> None:
    for message, gathers in ranks.run(2, push_that_fails, breaks_after=-1, bad_weight=True):
        assert message.startswith("[rank 1] model.layers.0.self_attn.q_proj.weight: ") and gathers == 3


class FactorsPolicy:
    """Has one frozen weight and one factor."""

    config = SimpleNamespace(architecture=SimpleNamespace(num_hidden_layers=1))

    def engine_has(self, scales: KVScales | None) -> None:
        pass

    def export_frozen_buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        yield [("frozen", torch.ones(1))]

    def export_factor_buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        yield [("factor", torch.ones(1))]


class RestartedEngine:
    """Refuses the push number `refuses` if it has no frozen weights."""

    takes_updates_while_generating = True

    def __init__(self, refuses: int) -> None:
        self.refuses = refuses
        self.pushes: list[str] = []

    def update_weights(self, buckets: Iterable[Bucket], version: int) -> None:
        self.pushes.append(" ".join(name for bucket in buckets for name, _ in bucket))
        if len(self.pushes) == self.refuses and "frozen" not in self.pushes[-1]:
            raise RuntimeError("was restarted")

    def probe(self, *arguments: object) -> list[object]:
        return []


def pushes(rank: int) -> list[str]:
    from ais_megatron.weight_sync import WeightSync

    engine = RestartedEngine(refuses=3)
    sync = WeightSync(FactorsPolicy(), engine, RolloutConfig(engine="sglang", quantization="none", lora_sync="adapter"))
    for version in range(3):
        sync.push(None, version)
    sync.repeat()
    sync.push(None, 3)
    return engine.pushes


def test_frozen_weights_are_pushed_when_a_server_may_lack_them(ranks: RankPool) -> None:
    whole = "frozen factor"
    refused = ["factor", whole]
    assert ranks.run(1, pushes) == [[whole, "factor", *refused, whole, "factor"]]
