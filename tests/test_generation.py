"""Batches generated ahead: how old they get, what is dropped, and what a checkpoint keeps of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ais_megatron.batch import STALE, Prompt, Rollout
from ais_megatron.config import ConfigError, RolloutConfig, build_config, load_config
from ais_megatron.rollout.engine import SamplingParams, WeightsLost
from ais_megatron.rollout.occupancy import SLOTS, Occupancy
from tests.helpers.ranks import RankPool
from tests.helpers.runs import assert_same_rows, rows_of, small, trained, write

TWO = SamplingParams(2, 4)
PROMPTS = [Prompt(i, "", (5 + i,), {"i": i}) for i in range(8)]


class Canned:
    """Answers with tokens that tell prompt, sample and version. While `lost` is not empty, a call loses the weights instead."""

    takes_updates_while_generating = True

    def __init__(self, version: int = 0) -> None:
        self.version, self.asked, self.lost = version, [], []

    def generate(self, prompts, sampling):  # noqa: ANN001, ANN201
        self.asked.append([p.index for p in prompts])
        if self.lost:
            raise WeightsLost(self.lost.pop())
        return [Rollout(p, (p.index, s, self.version), (-1.0, -2.0, -3.0), "stop", self.version) for p in prompts for s in range(2)]


def generator_of(engine: Canned, pushes: list[int] | None = None, **rollout):  # noqa: ANN003, ANN201
    from ais_megatron.generation import Generator

    sync = SimpleNamespace(repeat=lambda: (pushes if pushes is not None else []).append(engine.version))
    return Generator(engine, sync, RolloutConfig(engine="sglang", **rollout))


def versions(rollouts: list[Rollout]) -> list[tuple[int, int, str]]:
    return [(r.prompt.index, r.weight_version, r.finish_reason) for r in rollouts[::2]]


def a_checkpoint_keeps_finished_batches(rank: int, folder: Path) -> None:
    engine = Canned()
    before = generator_of(engine, ahead=2)
    before.start(range(2), PROMPTS[:2], TWO)
    engine_thread_is_done(before)
    engine.version = 1
    before.start(range(2, 4), PROMPTS[2:4], TWO)
    engine_thread_is_done(before)
    before.save(folder)

    later = Canned(version=5)
    after = generator_of(later, ahead=2)
    moved = [PROMPTS[3], replace(PROMPTS[2], token_ids=(9, 9)), PROMPTS[4]]  # another layout, a prompt that changed, and a new one
    after.resume(folder, 1, [(range(2), PROMPTS[:2], TWO), (range(2, 5), moved, TWO)])
    assert versions(after.rollouts([], TWO, 2)) == [(0, 5, "stop"), (1, 5, "stop")], "those of version 0 are too old"
    got = after.rollouts([], TWO, 5)
    assert versions(got) == [(3, 1, "stop"), (2, 5, "stop"), (4, 5, "stop")]
    assert [r.token_ids for r in got[:2]] == [(3, 0, 1), (3, 1, 1)] and got[0].prompt is PROMPTS[3] and got[1].rollout_logprobs[2] == -3.0
    assert sorted(later.asked) == [[0, 1], [2, 4]]
    after.start(range(5, 7), [PROMPTS[2], PROMPTS[5]], TWO)
    engine_thread_is_done(after)
    assert sorted(later.asked)[1:] == [[2, 4], [2, 5]], "what was not used at once is forgotten"


def engine_thread_is_done(generator) -> None:  # noqa: ANN001
    for started in generator._ahead:
        started.future.result()


def test_a_checkpoint_keeps_finished_batches(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(1, a_checkpoint_keeps_finished_batches, folder=tmp_path)


def old_responses_are_dropped(rank: int) -> None:
    engine = Canned()
    generator = generator_of(engine, ahead=3, max_staleness=1)
    generator.start(range(1), PROMPTS[:1], TWO)
    engine_thread_is_done(generator)
    engine.version = 2
    with pytest.raises(RuntimeError, match=r"all 2 responses .* more than rollout.max_staleness=1 versions old; raise it, or lower"):
        generator.rollouts([], TWO, 1)
    assert versions(generator.rollouts(PROMPTS[:1], TWO, 1)) == [(0, 2, "stop")], "what is asked now is new"

    mixed = [Rollout(PROMPTS[i], (1, 2), (-1.0, -1.0), "stop", i, version_spans=((i, 1), (2, 1))) for i in (0, 1)]
    engine.generate = lambda prompts, sampling: mixed
    old, young = generator.rollouts(PROMPTS[:2], TWO, 3)
    assert (old.finish_reason, old.token_ids, old.rollout_logprobs, old.is_dropped) == (STALE, (5,), (0.0,), True)
    assert young is mixed[1]
    assert generator.rollouts(PROMPTS[:2], TWO) == mixed, "held-out prompts are not trained on"


def test_old_responses_are_dropped(ranks: RankPool) -> None:
    ranks.run(1, old_responses_are_dropped)


def lost_weights_reach_every_batch(rank: int) -> None:
    engine, pushes = Canned(), []
    generator = generator_of(engine, pushes, ahead=2)
    engine.lost = ["one", "two"] if rank else []
    for first in (0, 2):
        generator.start(range(first, first + 2), PROMPTS[first : first + 2], TWO)
    for started in generator._ahead:
        started.future.exception()
    for until in (2, 4):
        assert len(generator.rollouts([], TWO, until)) == 4
    assert pushes == [0], "one push serves all batches, on all ranks"
    assert sorted(engine.asked) == ([[0, 1], [0, 1], [2, 3], [2, 3]] if rank else [[0, 1], [2, 3]])


def test_lost_weights_reach_every_batch(ranks: RankPool) -> None:
    ranks.run(2, lost_weights_reach_every_batch)


def a_batch_uses_prompts_that_its_successors_started(rank: int, folder: Path) -> None:
    from ais_megatron.distributed import barrier

    engine = Canned()
    generator = generator_of(engine, ahead=2)
    generator.start(range(2), PROMPTS[:2], TWO)
    generator.start(range(2, 5), PROMPTS[2:4] if rank else [PROMPTS[4]], TWO)
    engine_thread_is_done(generator)
    engine.version = 1
    assert versions(generator.rollouts([], TWO, 2)) == [(0, 0, "stop"), (1, 0, "stop")] and generator.end == 5
    assert versions(generator.rollouts([], TWO, 3)) == ([(2, 0, "stop")] if rank else []), "a refill: the rank that started it has it"
    generator.save(folder)
    barrier()
    later = generator_of(Canned(version=7), ahead=1)
    later.resume(folder, 0, [(range(2, 6), PROMPTS[2:6], TWO)])
    assert versions(later._started_before(6)) == [(2, 7, "stop"), (3, 0, "stop"), (4, 0, "stop"), (5, 7, "stop")], "it has what was left"
    engine.lost = ["lost"] if rank else []
    next_batch = generator.rollouts([PROMPTS[5 + rank]], TWO, 7)
    assert versions(next_batch) == [(3 if rank else 4, 0, "stop"), (5 + rank, 1, "stop")], "what was started comes first, and is kept"
    assert generator.end == 7 and not generator._ahead


def test_a_batch_uses_prompts_that_its_successors_started(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, a_batch_uses_prompts_that_its_successors_started, folder=tmp_path)


def idle_shares(rank: int) -> None:
    engine = Canned()
    engine.occupancy = Occupancy(2)
    # Of a step from 10 to 20: rank 0 is at server 0 in the first half, rank 1 from 14 to 17.5. Nobody is at server 1 after the start.
    engine.occupancy._spans = [[(10.0, 15.0)] if rank == 0 else [(14.0, 17.5)], [(8.0, 9.0)]]
    assert generator_of(engine).idle_share(10.0, 20.0) == (0.25 + 1.0) / 2

    embedded = generator_of(engine)
    embedded._rollout = RolloutConfig()
    embedded._own._spans = [[(10.0, 15.0)] if rank == 0 else [(17.5, 22.5)]]
    assert embedded.idle_share(10.0, 20.0) == (0.5 + 0.75) / 2
    assert embedded.idle_share(20.0, 30.0) == (1.0 + 0.75) / 2, "what ended later is counted then"


def test_idle_shares(ranks: RankPool) -> None:
    ranks.run(2, idle_shares)


def test_work_that_goes_on_counts() -> None:
    occupancy = Occupancy(2)
    with occupancy.at(1), occupancy.at(1):
        start = occupancy._since[1]
        assert occupancy.take(start - 1.0, start + 1.0).sum(1).tolist() == [0, SLOTS // 2]
    assert len(occupancy._spans[1]) == 1, "two pieces of work at the same time are one span"


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"ahead": 2, "max_staleness": 1}, "rollout.max_staleness=1: rollout.engine=local .* rollout.ahead=2 every response"),
        ({"ahead": 17}, "rollout.ahead"),
        ({"max_staleness": -1}, "rollout.max_staleness"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path: Path, rollout: dict, message: str) -> None:
    data = small(tmp_path)
    with pytest.raises(ConfigError, match=message):
        build_config(data | {"rollout": data["rollout"] | rollout})


@pytest.mark.parametrize("objective", ["grpo", "dapo"])
def test_two_batches_ahead_and_a_resume(ranks: RankPool, tmp_path: Path, objective: str) -> None:
    """The embedded engine's responses are as old as they can get. A resumed run trains on the same ones, to the last bit. With dynamic
    sampling, batches use prompts that were started for the next ones."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    whole.mkdir(), again.mkdir()
    rollout = small(whole)["rollout"] | {"ahead": 2, "max_staleness": 2}
    changes = {"sft": {"steps": 0}, "rollout": rollout, "objective": {"name": objective, "entropy_bonus": 0.1}}
    steps = ["train.steps=4", "checkpoint.every=2"]
    ranks.run(2, trained, config=load_config(write(whole, **changes), steps))
    rows = rows_of(whole)
    assert all(0.0 <= row["idle/trainer"] < 1.0 and row["stale_fraction"] == 0 for row in rows)
    if objective == "grpo":
        assert [row["staleness"] for row in rows] == [0, 1, 2, 2]
        assert [row["idle/engine"] == 1.0 for row in rows] == [False, False, True, True], "the last two steps generate nothing"
    else:
        assert all(row["prompts_sampled"] > rollout["prompts_per_step"] for row in rows)
        assert rows[0]["staleness"] == 0 < rows[1]["staleness"] and all(row["staleness"] < 2 for row in rows), "so responses are younger"
    checkpoints = whole / "run" / "checkpoints"
    ahead = {folder.name: sorted(path.name for path in folder.glob("rollouts_ahead_*")) for folder in sorted(checkpoints.iterdir())}
    assert ahead == {"step_000002": [f"rollouts_ahead_{rank:04d}.safetensors" for rank in range(2)], "step_000004": []}
    shutil.copytree(whole / "run", again / "run")
    shutil.rmtree(again / "run" / "checkpoints" / "step_000004")
    ranks.run(2, trained, config=load_config(write(again, **changes), [*steps, "run.resume=true"]))
    assert [row["step"] for row in rows_of(again)] == [1, 2, 3, 4]
    assert_same_rows(again, whole)
