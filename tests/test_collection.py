"""Dynamic sampling: which groups train is a matter of the prompt stream, not of who generated them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ais_megatron.batch import Rollout
from ais_megatron.config import Config
from ais_megatron.tasks import Problem, Reward
from tests.helpers.batches import config_with
from tests.helpers.ranks import RankPool

LAYOUTS = {  # (ranks, tp, pp, cp)
    "1": (1, 1, 1, 1),
    "DP2": (2, 1, 1, 1),
    "TP2": (2, 2, 1, 1),
    "DP2xPP2": (4, 1, 2, 1),
    "DP2xCP2": (4, 1, 1, 2),
}


def rewards_of(position: int) -> tuple[float, float]:
    """Every third group of two has a signal."""
    return (1.0, 0.0) if position % 3 == 0 else (1.0, 1.0)


class Engine:
    """Two responses per prompt whose tokens tell the prompt's position and the sample's number; some run to the limit."""

    def generate(self, prompts, sampling):  # noqa: ANN001, ANN201
        return [
            Rollout(p, (p.index + 1, i + 1), (-0.5, -0.1 * i), "length" if p.index % 2 and i else "stop", 0)
            for p in prompts
            for i in (0, 1)
        ]


def fails_on(truth, response: str, options) -> float:  # noqa: ANN001
    """Judges responses that are named "position/sample"."""
    if response in options["raises"]:
        raise KeyError(response)
    return float("nan") if response in options["nan"] else 1.0 - int(response[-1])


def collected(rank: int, config: Config, tp: int, pp: int, first: int, own_reward: bool = False):  # noqa: ANN201
    from ais_megatron.collection import collect
    from ais_megatron.generation import Generator
    from ais_megatron.policy.parallel import initialize_parallel
    from ais_megatron.runs.metrics import PhaseTimer
    from ais_megatron.session import Session, share_of_this_rank
    from ais_megatron.tasks.own_reward import RewardedTask

    initialize_parallel(config)
    problems = SimpleNamespace(train_problem=lambda i: Problem("x" * (1 + i % 2), {}, None, where=f"file:{i}"))
    session = SimpleNamespace(
        config=config,
        generator=Generator(Engine(), None, config.rollout),
        share=share_of_this_rank(),
        sampling=None,
        tokenizer=SimpleNamespace(encode_prompt=lambda text: [1] * len(text), decode=lambda ids: "/".join(str(i - 1) for i in ids)),
        task=RewardedTask(problems, fails_on, "task.reward=mine:judge", config.task) if own_reward else problems,
        score=(lambda rollouts: Session.score(session, rollouts))
        if own_reward
        else lambda rollouts: [Reward(rewards_of(r.prompt.index)[r.token_ids[1] - 1], True, True) for r in rollouts],
    )
    result = collect(session, first, PhaseTimer())
    responses = [tuple(row[length - 2 : length].tolist()) for row, length in zip(result.batch.tokens, result.batch.lengths, strict=True)]
    generated = [r.prompt.index for r in result.rollouts[::2]]
    for rollout, row in zip(result.rollouts, result.rows, strict=True):
        assert responses[row] == rollout.token_ids if row is not None else rollout.token_ids not in responses
    return session.share.dp_rank, responses, result.batch.advantages, result.batch.loss_mask.any(1), result.next_prompt, generated


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("refills", "groups", "next_prompt"),
    # From position 2 on, 3, 6, 9, 12, ... have a signal. Rounds: 2-5 (one signal), then 3 more prompts (one), 2 more (one), ...
    [(1, [2, 3, 4, 6], 9), (3, [2, 3, 6, 9], 12), (9, [3, 6, 9, 12], 13)],
)
def test_groups_without_a_signal_make_room(ranks: RankPool, layout: str, refills: int, groups: list[int], next_prompt: int) -> None:
    world, tp, pp, cp = LAYOUTS[layout]
    config = config_with(
        objective={"name": "dapo", "max_refills": refills},
        rollout={"prompts_per_step": 4, "group_size": 2},
        parallel={"tp": tp, "pp": pp, "cp": cp},
        train={"updates_per_batch": 2},
    )
    results = ranks.run(world, collected, config=config, tp=tp, pp=pp, first=2)
    dp = world // (tp * pp * cp)
    for dp_rank, responses, advantages, in_loss, position, _ in results:
        mine = groups[4 * dp_rank // dp : 4 * (dp_rank + 1) // dp]
        assert responses == [(group + 1, sample) for group in mine for sample in (1, 2)]
        assert position == next_prompt
        half = 0.5**0.5 * (1 - 1.5e-6)
        expected = torch.tensor([sign * half * (group % 3 == 0) for group in mine for sign in (1, -1)])
        torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-6)
        assert in_loss.tolist() == [not (group % 2 and sample) for group in mine for sample in (0, 1)], "cut responses leave the loss"
    assert sorted(index for result in results for index in result[-1]) == list(range(2, next_prompt)), "every prompt exactly once"


def test_without_dynamic_sampling_the_stream_moves_evenly(ranks: RankPool) -> None:
    config = config_with(rollout={"prompts_per_step": 4, "group_size": 2})
    for dp_rank, responses, _, in_loss, position, generated in ranks.run(2, collected, config=config, tp=1, pp=1, first=8):
        assert generated == [8 + 2 * dp_rank, 9 + 2 * dp_rank] and position == 12
        assert len(responses) == 4 and in_loss.all()


def failure(rank: int, **arguments):  # noqa: ANN003, ANN201
    try:
        collected(rank, tp=1, pp=1, first=2, own_reward=True, **arguments)
    except (RuntimeError, ValueError) as error:
        return type(error).__name__, str(error)
    return None


def rewarded(raises: list[str], nan: list[str], errors: str, **sections) -> Config:  # noqa: ANN003
    return config_with(
        rollout={"prompts_per_step": 4, "group_size": 2},
        task={"reward": "tests.test_collection:fails_on", "reward_errors": errors, "options": {"raises": raises, "nan": nan}},
        **sections,
    )


def test_a_reward_that_fails_on_one_rank_ends_all_ranks(ranks: RankPool) -> None:
    message = "[rank 1] task.reward=mine:judge: raised KeyError: '5/1' for the response '5/1' to prompt 5 (file:5); it must accept"
    for kind, text in ranks.run(2, failure, config=rewarded(["5/1"], [], "stop")):
        assert kind == "RuntimeError" and text.startswith(message)
    message = "[rank 0] task.reward=mine:judge: returned nan for the response '2/0' to prompt 2 (file:2); return a finite number"
    for kind, text in ranks.run(2, failure, config=rewarded(["5/1"], ["2/0"], "stop")):
        assert kind == "ValueError" and text.startswith(message)


def test_responses_that_cannot_be_judged_are_in_neither_loss_nor_baseline(ranks: RankPool) -> None:
    config = rewarded(["5/1"], ["2/0"], "drop")
    half = 0.5**0.5 * (1 - 1.5e-6)
    for dp_rank, responses, advantages, in_loss, *_ in ranks.run(2, collected, config=config, tp=1, pp=1, first=2, own_reward=True):
        left_out = [[True, False, False, False], [False, False, False, True]][dp_rank]
        assert [(group - 1, sample - 1) for group, sample in responses] == [
            (g, s) for g in (2 + 2 * dp_rank, 3 + 2 * dp_rank) for s in (0, 1)
        ]
        assert in_loss.tolist() == [not out for out in left_out]
        # What is left of the group has no one to be compared with.
        expected = [[0.0, 0.0, half, -half], [half, -half, 0.0, 0.0]][dp_rank]
        torch.testing.assert_close(advantages, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_a_run_whose_rewards_all_fail_stops(ranks: RankPool) -> None:
    everything = [f"{position}/{sample}" for position in range(2, 6) for sample in (0, 1)]
    for kind, text in ranks.run(2, failure, config=rewarded(everything, [], "drop")):
        assert kind == "RuntimeError" and text.startswith(
            "[rank 0] task.reward_errors=drop: none of 8 responses could be judged; the first error: task.reward=mine:judge: raised Key"
        )
