"""Recording responses and training on them again without an engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ais_megatron.batch import DROPPED, Prompt, Rollout, assemble
from ais_megatron.config import ConfigError, build_config
from ais_megatron.rollout.engine import SamplingParams
from ais_megatron.rollout.recording import RecordingEngine, write_rollouts
from ais_megatron.rollout.replay import ReplayEngine
from tests.helpers.ranks import RankPool
from tests.helpers.runs import SMALL, assert_same_rows, refusal, rows_of, small

SAMPLING = SamplingParams(num_samples=2, max_tokens=5, seed=3)
PROMPTS = [Prompt(7, "a", (1, 2, 3), {}), Prompt(8, "b", (4,), {})]
HELD_OUT = [Prompt(-1, "c", (9,), {})]


def responses(prompts: list[Prompt], version: int) -> list[Rollout]:
    """Two to each prompt, no two alike; the last one dropped."""
    made = []
    for prompt in prompts:
        for sample in range(2):
            tokens = tuple(range(10 + prompt.index + version, 11 + prompt.index + version + sample))
            logprobs = tuple(torch.linspace(-0.1, -1.7, len(tokens)).tolist())
            experts = torch.arange((len(prompt.token_ids) + len(tokens) - 1) * 4, dtype=torch.int8).view(-1, 2, 2)
            made.append(Rollout(prompt, tokens, logprobs, "stop", version, experts, ((version, 1), (version + 1, 1)) if sample else ()))
    made[-1] = replace(made[-1], finish_reason=DROPPED, rollout_logprobs=(float("-inf"),) * len(made[-1].token_ids), routed_experts=None)
    return made


class Canned:
    """An engine whose answers are known."""

    takes_updates_while_generating = False
    version = 0

    def generate(self, prompts, sampling):  # noqa: ANN001, ANN201
        return responses(prompts, self.version)


def same(one: Rollout, other: Rollout) -> bool:
    experts = (one.routed_experts, other.routed_experts)
    plain = replace(one, routed_experts=None) == replace(other, routed_experts=None)
    return plain and (experts == (None, None) or (experts[0].dtype == experts[1].dtype and torch.equal(*experts)))


def test_what_is_replayed_is_what_was_recorded(tmp_path: Path) -> None:
    """Every field, whatever prompts are asked for together; held-out prompts by version."""
    engine, canned = RecordingEngine(canned := Canned(), tmp_path, rank=3, continues=True), canned
    first = engine.generate(PROMPTS, SAMPLING)
    at_zero = engine.generate(HELD_OUT, SAMPLING)
    canned.version = 1
    at_one = engine.generate(HELD_OUT, SAMPLING)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "version_000000_held_out_00000000_rank_0003.safetensors" and len(names) == 3
    replay = ReplayEngine(tmp_path)
    with pytest.raises(RuntimeError, match="no weight version yet"):
        replay.generate(PROMPTS, SAMPLING)
    drained = iter([[("x", torch.zeros(1))], []])
    replay.update_weights(drained, 0)
    assert replay.version == 0 and next(drained, None) is None and replay.probe(PROMPTS, SAMPLING) == []
    assert all(map(same, replay.generate(PROMPTS, SAMPLING), first))
    assert all(map(same, replay.generate(PROMPTS[1:], SAMPLING), first[2:]))
    assert all(map(same, replay.generate(HELD_OUT, SAMPLING), at_zero))
    replay.update_weights([], 1)
    assert all(map(same, replay.generate(HELD_OUT, SAMPLING), at_one)) and not same(at_zero[0], at_one[0])


def test_what_a_resumed_run_generated_again_counts(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "b.safetensors", PROMPTS, responses(PROMPTS, 0), SAMPLING, 0)
    write_rollouts(tmp_path / "a.safetensors", PROMPTS[1:], responses(PROMPTS[1:], 5), SAMPLING, 5)
    replay = ReplayEngine(tmp_path)
    replay.update_weights([], 5)
    assert [r.weight_version for r in replay.generate(PROMPTS, SAMPLING)] == [0, 0, 5, 5]


def test_recordings_of_earlier_versions_have_wider_routes(tmp_path: Path) -> None:
    """They were int16 whatever the number of experts; a batch of old and new ones is as wide as the old ones."""
    wide = [r if r.routed_experts is None else replace(r, routed_experts=r.routed_experts.short()) for r in responses(PROMPTS, 0)]
    write_rollouts(tmp_path / "old.safetensors", PROMPTS, wide, SAMPLING, 0)
    replay = ReplayEngine(tmp_path)
    replay.update_weights([], 0)
    old, new = replay.generate(PROMPTS, SAMPLING)[:3], responses(PROMPTS, 0)[:3]
    assert all(r.routed_experts.dtype == torch.int16 for r in old)
    assert all(torch.equal(o.routed_experts.long(), n.routed_experts.long()) for o, n in zip(old, new, strict=True))
    assert assemble([old[0], new[1]], torch.zeros(2), torch.zeros(2)).routed_experts.dtype == torch.int16
    assert assemble(new, torch.zeros(3), torch.zeros(3)).routed_experts.dtype == torch.int8


def test_what_does_not_fit_is_refused_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no recorded responses; give the rollout.save_dir"):
        ReplayEngine(tmp_path)
    RecordingEngine(Canned(), tmp_path, rank=0, continues=False).generate(PROMPTS, SAMPLING)
    with pytest.raises(ValueError, match="already holds the responses of a run"):
        RecordingEngine(Canned(), tmp_path, rank=0, continues=False)
    replay = ReplayEngine(tmp_path)
    replay.update_weights([], 0)
    with pytest.raises(ValueError, match="prompt 7: this run samples with temperature=0.5, but .* was recorded with 1.0"):
        replay.generate(PROMPTS, replace(SAMPLING, temperature=0.5))
    with pytest.raises(ValueError, match="prompt 7: its tokens in .* are different"):
        replay.generate([replace(PROMPTS[0], token_ids=(1, 2))], SAMPLING)
    with pytest.raises(ValueError, match="no responses to prompt 9, but to prompts 7 to 8; lower train.steps"):
        replay.generate([replace(PROMPTS[0], index=9)], SAMPLING)
    with pytest.raises(ValueError, match=r"held-out prompt 0 at weight version 0, but at versions \[\]"):
        replay.generate(HELD_OUT, SAMPLING)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{path.name}: not a recording of responses, or damaged"):
        ReplayEngine(tmp_path)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"engine": "replay"}, "set rollout.replay_dir"),
        ({"replay_dir": "x"}, "set rollout.engine=replay"),
        ({"engine": "replay", "replay_dir": "x", "save_dir": "x"}, "is the folder that is being replayed"),
    ],
)
def test_keys_that_contradict_each_other(tmp_path: Path, rollout: dict[str, str], message: str) -> None:
    data = small(tmp_path)
    data["rollout"] |= rollout
    with pytest.raises(ConfigError, match=message):
        build_config(data)


def run_of(ranks: RankPool, folder: Path, data: dict, num_ranks: int = 2, **rollout: str) -> None:
    folder.mkdir(exist_ok=True)
    parts = {"run": {"dir": str(folder / "run")}, "rollout": {**data["rollout"], **rollout}}
    assert ranks.run(num_ranks, refusal, config=build_config(data | parts), timeout=360) == ["finished"] * num_ranks


@pytest.mark.slow
def test_a_replayed_run_is_the_recorded_run(ranks: RankPool, tmp_path: Path) -> None:
    """The same rows to the last bit; and another correction, on one rank instead of two, sees the same samples."""
    data = small(tmp_path, **SMALL, eval={"num_prompts": 8, "every": 2}, ais={"coefficient": "product"})  # whose alpha needs no rewards
    recorded = str(tmp_path / "responses")
    run_of(ranks, tmp_path / "first", data, save_dir=recorded)
    run_of(ranks, tmp_path / "again", data, engine="replay", replay_dir=recorded)
    assert_same_rows(tmp_path / "again", tmp_path / "first")
    held_out = [[row.get("held_out_accuracy") for row in rows_of(tmp_path / name)] for name in ("first", "again")]
    assert held_out[0] == held_out[1]
    run_of(ranks, tmp_path / "none", data | {"correction": "none", "parallel": {"dp": 1}}, 1, engine="replay", replay_dir=recorded)
    ours, theirs = rows_of(tmp_path / "none"), rows_of(tmp_path / "first")
    for name in ("reward_mean", "response_length_mean", "num_response_tokens"):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in theirs], rel=1e-6)
    assert all(row["alpha"] == 0.0 for row in ours) and all(row["alpha"] > 0.0 for row in theirs)
