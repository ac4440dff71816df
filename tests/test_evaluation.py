"""Sets of held-out problems: their scores, on any number of ranks, in runs that wait and in runs that go on meanwhile."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ais_megatron.batch import DROPPED, Prompt, Rollout
from ais_megatron.config import Config, EvaluationSet, TaskConfig, build_config
from ais_megatron.config.engines import EngineTraits
from ais_megatron.rollout.engine import SamplingParams, WeightsLost
from ais_megatron.rollout.local.engine import LocalEngine
from ais_megatron.runs.metrics import read_evaluations, read_metrics
from ais_megatron.runs.summary import scores_table
from ais_megatron.tasks import Reward
from tests.helpers.paths import ROOT
from tests.helpers.ranks import RankPool
from tests.helpers.runs import small, trained

KS = (1, 2, 4)
# For each problem its responses: c for a correct one, w for a well-formed one, x for neither, d for a dropped one.
PROBLEMS = ("cwxx", "cccc", "xxxx", "ccxw", "wcdd", "xxxx")
JUDGED = {"c": Reward(1.0, True, True), "w": Reward(0.1, True, False), "x": Reward(0.0, False, False)}
JUDGED["d"] = Reward(math.nan, False, False)  # as `Session.score` says that there is no reward


def scored(rank: int, parts: int) -> dict[str, float]:
    from ais_megatron.evaluation import _Part, _scores

    task = TaskConfig()
    chosen = EvaluationSet("a", task, len(PROBLEMS), 4, 8, 1.0, 1.0, KS)
    mine = range(len(PROBLEMS) * rank // parts, len(PROBLEMS) * (rank + 1) // parts)
    rollouts = []
    for i in mine:
        for letter in PROBLEMS[i]:
            reason = {"d": DROPPED, "x": "length"}.get(letter, "stop")
            tokens = tuple(range(1 + i))
            rollouts.append(Rollout(Prompt(-1 - i, letter, (1,), {"letter": letter}), tokens, (0.0,) * len(tokens), reason, 0))
    session = SimpleNamespace(score=lambda rollouts: [JUDGED[r.prompt.truth["letter"]] for r in rollouts])
    part = _Part(chosen, session, [], SamplingParams(4, 8))
    return _scores(part, rollouts).figures


def test_scores_by_hand_and_on_any_number_of_ranks(ranks: RankPool) -> None:
    (alone,) = ranks.run(1, scored, parts=1)
    # Every response has its own Prompt object, but the same index: 22 responses to 6 problems, of which 1, 4, 0, 2, 1 and 0 are right.
    assert (alone["problems"], alone["responses"], alone["dropped"]) == (6, 22, 2)
    assert alone["pass@1"] == 8 / 22 and alone["well_formed"] == 11 / 22 and alone["truncated_fraction"] == 11 / 22
    assert alone["pass@2"] == pytest.approx((1 / 2 + 1 + 0 + 5 / 6 + 1 + 0) / 6, rel=1e-12)
    assert alone["pass@4"] == pytest.approx((1 + 1 + 0 + 1 + 0) / 5, rel=1e-12), "a problem with two responses says nothing about four"
    assert alone["pass@4_se"] == pytest.approx(math.sqrt(0.3 / 5), rel=1e-12)
    assert alone["reward_mean"] == pytest.approx(8.3 / 22, rel=1e-12)
    assert alone["response_length_mean"] == (4 * 1 + 4 * 2 + 4 * 3 + 4 * 4 + 2 * 5 + 4 * 6) / 22
    squares = sum((s - n * 8 / 22) ** 2 for s, n in ((1, 4), (4, 4), (0, 4), (2, 4), (1, 2), (0, 4)))
    assert alone["pass@1_se"] == pytest.approx(math.sqrt(6 / 5 * squares) / 22, rel=1e-12)
    for figures in ranks.run(2, scored, parts=2):
        assert figures.keys() == alone.keys() and figures == pytest.approx(alone, rel=1e-12)
    table = scores_table({"a": alone, "b": {"problems": 3}})
    assert table.splitlines()[1].split()[:3] == ["a", "6", "22"] and "36.4% ± " in table and "pass@4" in table.splitlines()[0]


class Beside:
    """An engine that answers two threads, one after the other."""

    takes_updates_while_generating = True
    loses_weights_at: int | None = None  # a version at which held-out prompts get no answer

    def __init__(self, config: Config, *, eos_ids: tuple[int, ...], pad_id: int) -> None:
        self._engine = LocalEngine(config.architecture, config.rollout, eos_ids=eos_ids, pad_id=pad_id, device="cpu", dtype=torch.bfloat16)
        self._lock = threading.Lock()
        self.update_weights, self.probe, self.close = self._engine.update_weights, self._engine.probe, self._engine.close

    @property
    def version(self) -> int:
        return self._engine.version

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        with self._lock:
            if prompts[0].index < 0 and self.version == Beside.loses_weights_at:
                raise WeightsLost("the servers were restarted")
            return self._engine.generate(prompts, sampling)

    update_weights, probe, close = LocalEngine.update_weights, LocalEngine.probe, LocalEngine.close


Beside.traits = EngineTraits()

SETS = {
    "short": {"num_prompts": 6},
    "long-2": {"num_prompts": 5, "samples": 4, "ks": [2, 4], "max_response_tokens": 20, "temperature": 0.7, "top_p": 0.9},
    "sudoku": {"num_prompts": 3, "task": {"empty_cells": 2}, "temperature": 0.0},
}


def config_of(folder: Path, beside: bool = False, **changes: object) -> Config:
    rollout = {"prompts_per_step": 4, "group_size": 2, "max_response_tokens": 12}
    if beside:
        rollout |= {"engine": "tests.test_evaluation:Beside"}
    data = small(folder, rollout=rollout, eval={"every": 1, "sets": SETS, "blocking": not beside}, checkpoint={"every": 1, "keep": 9})
    data["sft"] |= {"cache_dir": str(folder.parent / "cache")}
    return build_config(data | changes)


def trained_with_trouble(rank: int, config: Config, loses_weights_at: int | None = None, stop_after: int | None = None) -> str:
    """`train`, with an engine that loses its weights during an evaluation, or a signal as soon as one has begun."""
    import os

    from ais_megatron import interruption
    from ais_megatron.cluster.exits import Preempted
    from ais_megatron.evaluation import Evaluator

    os.chdir(ROOT)
    from tests.test_evaluation import Beside as engine_class

    start = Evaluator.start

    def start_and_stop(self: Evaluator, step: int) -> None:
        start(self, step)
        if step == stop_after and rank == 1:
            interruption._received.append(signal.SIGTERM)

    interruption._received.clear()
    engine_class.loses_weights_at, Evaluator.start = loses_weights_at, start_and_stop
    try:
        trained(rank, config)
    except Preempted:
        return "stopped"
    finally:
        engine_class.loses_weights_at, Evaluator.start = None, start
        interruption._received.clear()
    return "finished"


@pytest.fixture(scope="module")
def waited(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps whose evaluations are waited for."""
    folder = tmp_path_factory.mktemp("runs") / "waited"
    folder.mkdir()
    ranks.run(2, trained, config=config_of(folder), timeout=360)
    return folder


def test_a_run_measures_every_set_at_every_step(waited: Path) -> None:
    rows = read_evaluations(waited / "run")
    assert [(row["step"], row["set"]) for row in rows] == [(step, name) for step in range(4) for name in SETS]
    for row in rows:
        settings = SETS[row["set"]]
        assert row["problems"] == settings["num_prompts"] and row["responses"] == row["problems"] * settings.get("samples", 1)
        assert ("held_out_accuracy" in row) == (row["set"] == "short")
        assert 0.0 < row["response_length_mean"] <= settings.get("max_response_tokens", 12) and row["dropped"] == 0
    longest = max(row["response_length_mean"] for row in rows if row["set"] == "long-2")
    assert longest > 12, "its limit is above that of the run's own responses"
    metrics = [json.loads(line) for line in (waited / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        by_set = {r["set"]: r for r in rows if r["step"] == row["step"]}
        assert row["eval/long-2/pass@4"] == by_set["long-2"]["pass@4"] and row["eval/short/pass@1_se"] == by_set["short"]["pass@1_se"]
        assert row["held_out_accuracy"] == by_set["short"]["pass@1"]
    summary = json.loads((waited / "run" / "summary.json").read_text())
    assert summary["start_accuracy"] == rows[0]["pass@1"] and summary["final_accuracy"] == metrics[-1]["held_out_accuracy"]


def test_a_run_that_does_not_wait_measures_the_same(waited: Path, ranks: RankPool) -> None:
    """The responses to the weights of step 1 are generated while step 2 goes on, and are those of step 1."""
    folder = waited.with_name("beside")
    assert ranks.run(2, trained_with_trouble, config=config_of(folder, beside=True), timeout=360) == ["finished"] * 2
    assert read_evaluations(folder / "run") == read_evaluations(waited / "run")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["held_out_accuracy" in line for line in lines] == [False, False, True], "logged before their evaluation had ended"
    theirs = [{key: row[key] for key in row if key.startswith("eval/")} for row in read_metrics(waited / "run")]
    assert [{key: row[key] for key in row if key.startswith("eval/")} for row in read_metrics(folder / "run")] == theirs


def test_a_signal_during_an_evaluation(waited: Path, ranks: RankPool) -> None:
    """The run is saved without waiting, and measures these weights when it is resumed."""
    folder = waited.with_name("stopped")
    config = config_of(folder, beside=True)
    assert ranks.run(2, trained_with_trouble, config=config, stop_after=1, timeout=360) == ["stopped"] * 2
    assert {row["step"] for row in read_evaluations(folder / "run")} == {0}
    again = config_of(folder, beside=True, run={"dir": config.run.dir, "resume": True})
    assert ranks.run(2, trained_with_trouble, config=again, timeout=360) == ["finished"] * 2
    assert read_evaluations(folder / "run") == read_evaluations(waited / "run")


def test_weights_that_are_lost_during_an_evaluation(waited: Path, ranks: RankPool) -> None:
    folder = waited.with_name("lost")
    config = config_of(folder, beside=True)
    assert ranks.run(2, trained_with_trouble, config=config, loses_weights_at=1, timeout=360) == ["finished"] * 2
    expected = [row for row in read_evaluations(waited / "run") if row["step"] != 1]
    assert read_evaluations(folder / "run") == expected


def test_a_resumed_run_measures_nothing_twice(waited: Path, ranks: RankPool, tmp_path: Path) -> None:
    """Resumed from step 2 with the evaluations of all steps in the file, and from an older run without this file."""
    for has_file in (True, False):
        folder = tmp_path / str(has_file)
        shutil.copytree(waited, folder)
        shutil.rmtree(folder / "run" / "checkpoints" / "step_000003")
        if not has_file:
            (folder / "run" / "evaluations.jsonl").unlink()
        data = config_of(waited, run={"dir": str(folder / "run"), "resume": True})
        ranks.run(2, trained, config=data, timeout=360)
        expected = [row for row in read_evaluations(waited / "run") if has_file or row["step"] == 3]
        assert read_evaluations(folder / "run") == expected
        assert [row["step"] for row in read_metrics(folder / "run")] == [1, 2, 3]


def too_long(rank: int, config: Config) -> str:
    try:
        trained(rank, config)
    except ValueError as error:
        return str(error)
    return "finished"


def test_a_set_that_does_not_fit_is_refused_on_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    sets = {"a": {"max_response_tokens": 60, "num_prompts": 3}}
    answers = ranks.run(
        2, too_long, config=config_of(tmp_path / "a", eval={"sets": sets}, sft={"steps": 0, "cache_dir": str(tmp_path)}), timeout=360
    )
    assert answers[0] == answers[1]
    assert "eval.sets.a.max_response_tokens=60: too large for a prompt of 1" in answers[0]
    assert "max_position_embeddings=64; lower it to at most" in answers[0]
