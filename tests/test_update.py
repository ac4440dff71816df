"""Corrections and objectives through the real policy: one process on the whole batch is the truth for every split of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ais_megatron.batch import Batch
from tests.helpers.policies import LAYOUTS, TEMPERATURE, make_batch, make_config, make_policy, my_rows
from tests.helpers.ranks import RankPool

pytestmark = pytest.mark.slow  # every case under every split

MEASURED = {"coefficient": "measured", "caps": [1.05, 1.1, 1.3], "bands": [], "horizon": 0.1}
# A split of the rows between ranks must not split a group.
SINGLE_RESPONSES = {
    "rollout": {"max_response_tokens": 20, "temperature": TEMPERATURE, "group_size": 1, "prompts_per_step": 6},
    "objective": {"advantages": "reward"},
}
CASES = {
    "sequence TIS": dict(correction="tis", correction_options={"level": "sequence"}, ais={"weight_cap": 1.05}),
    "geo_rs": dict(correction="geo_rs", objective={"aggregation": "sequence"}),
    "batch_normalise": dict(correction="mis", correction_options={"batch_normalise": True, "low": 0.9, "high": 1.3}),
    "batch_normalise, responses": dict(
        correction="tis", correction_options={"level": "sequence", "batch_normalise": True}, ais={"weight_cap": 1.05}
    ),
    "gspo": dict(objective={"name": "gspo", "clip_low": 0.2, "clip_high": 0.2}),
    "dr_grpo": dict(objective={"name": "dr_grpo"}, ais={"coefficient": "oracle"}),
    "regularised": dict(objective={"name": "cispo", "kl_coefficient": 0.1, "entropy_bonus": 0.01}, ais={"coefficient": "product"}),
    "lagged": dict(ais={"coefficient": "product", "lag": 1, "alpha_min": 0.2, "tau": "auto", "ema": 0.5}),
    "measured": dict(ais=MEASURED, **SINGLE_RESPONSES),
    "lagged measured": dict(ais={**MEASURED, "lag": 1}, **SINGLE_RESPONSES),
    "tis": dict(correction="tis"),
    "lagged tis": dict(correction="tis", ais={"lag": 1}),
    "lagged geo_rs": dict(correction="geo_rs", ais={"lag": 1}),
}


def mismatch(batch: Batch) -> torch.Tensor:
    """log pi_old - log mu to give each token, a function of its place in the row alone; row by row of a different strength."""
    seq = batch.tokens.shape[1]
    wave = 0.15 * torch.sin(torch.arange(seq) * 1.7 + batch.lengths[:, None]) + 0.003 * (batch.lengths[:, None] - 11)
    return wave * batch.loss_mask


def updated(rank: int, path: Path, case: str, reverse: bool = False, **layout):  # noqa: ANN201
    """Two updates: every row of metrics and diagnostics, and all weights afterwards."""
    from ais_megatron.algorithm.ais import AISState
    from ais_megatron.runs.metrics import PhaseTimer
    from ais_megatron.update import lagged_update, update

    config = make_config(path, **CASES[case], **layout)
    policy = make_policy(config, path)
    batch = make_batch()
    if reverse:
        batch = batch.rows(torch.arange(len(batch)).flip(0))
    rows, _ = my_rows(batch)
    rows = Batch(**{**vars(rows), "rollout_logprobs": (policy.logprobs(rows) - mismatch(rows)) * rows.loss_mask})
    state, history = AISState(), []
    for number in range(2):
        outcome = (lagged_update if config.ais.lag else update)(policy, rows, state, PhaseTimer(), keep_logprobs=True)
        state = outcome.state
        if number == 0:  # on every rank of a model, whichever pass they come from
            expected = (rows.rollout_logprobs + mismatch(rows)) * rows.loss_mask
            torch.testing.assert_close(outcome.old_logprobs * rows.loss_mask, expected, rtol=1e-3, atol=1e-3)
        amax = {"k_amax": float(outcome.calibration.scales.k_amax.max())}
        noise = {f"noise {i}": value for i, value in enumerate(state.evidence.covariances)}
        choice = {"alpha": outcome.alpha, "weight_cap": outcome.correction.weight_cap}
        history.append({**choice, **noise, **vars(outcome.diagnostics), **outcome.metrics, **amax})
    return {name: tensor.clone() for bucket in policy.export_buckets(20_000) for name, tensor in bucket}, history


@pytest.fixture(scope="module")
def alone(ranks: RankPool, untied_checkpoint: Path):  # noqa: ANN201
    return {case: ranks.run(1, updated, path=untied_checkpoint, case=case)[0] for case in CASES}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("split", ["DP2", "TP1", "TP1 reversed", "TP2xPP2"])
def test_no_split_changes_an_update(ranks: RankPool, untied_checkpoint: Path, alone, case: str, split: str) -> None:
    world, tp, pp, sp = LAYOUTS[split.split()[0]]
    reverse = split.endswith("reversed")
    for result in ranks.run(world, updated, path=untied_checkpoint, case=case, reverse=reverse, tp=tp, pp=pp, sp=sp, budget=40):
        same_update(result, alone[case])


def same_update(result, expected) -> None:  # noqa: ANN001
    (weights, history), (expected_weights, expected_history) = result, expected
    for row, expected_row in zip(history, expected_history, strict=True):
        for name, value in row.items():
            assert value == pytest.approx(expected_row[name], rel=2e-3, abs=2e-5), name
    for name, tensor in weights.items():
        difference = (tensor - expected_weights[name]).abs()
        # Adam turns rounding in a vanishing gradient into a step of any size below lr: single elements move, their mean does not.
        assert difference.max() < 5e-4 and difference.mean() < 1e-6, name


def test_the_cases_exercise_what_they_are_for(alone) -> None:  # noqa: ANN001
    first = {case: history[0] for case, (_, history) in alone.items()}
    assert 0 < first["geo_rs"]["fraction_rejected"] < 1 and 0 < first["lagged geo_rs"]["fraction_rejected"] < 1
    assert 0 < first["batch_normalise"]["fraction_rejected"] < 1 and first["batch_normalise"]["mean_weight"] != 1.0
    assert 0 < first["sequence TIS"]["fraction_truncated"] < 1
    kl = [row["reference_kl"] for row in alone["regularised"][1]]
    assert kl[0] == pytest.approx(0.0, abs=1e-9) and kl[1] > 1e-5, "the reference is the starting policy, not the present one"
    measured, lagged = alone["measured"][1], alone["lagged measured"][1]
    assert measured[0]["noise 0"] > 0
    assert lagged[0]["noise 0"] == pytest.approx(measured[0]["noise 0"], rel=1e-4), "the training forward pass sees the same"
    choices = [[row[name] for name in ("alpha", "weight_cap")] for row in (lagged[0], lagged[1], measured[0])]
    assert choices[0] == [1.0, 2.0] and choices[1] == pytest.approx(choices[2], rel=1e-3), "and its choice is for the next batch"
    lagged = alone["lagged"][1]
    assert lagged[0]["alpha"] == 0.2, "alpha_min before anything is known"
    assert lagged[1]["alpha"] > 0.2 and lagged[0]["policy_ratio_mean"] == 1.0


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_lag_sees_what_the_extra_pass_would_have_seen(ranks: RankPool, untied_checkpoint: Path, alone, recompute: str) -> None:  # noqa: ANN001
    """With tis there is no alpha to wait for: lag 0 and lag 1 are the same update, with the same statistics and ranges."""
    result = ranks.run(2, updated, path=untied_checkpoint, case="lagged tis", pp=2, budget=24, model={"recompute": recompute})[0]
    same_update(result, alone["tis"])


def reference(rank: int, path: Path):  # noqa: ANN201
    from ais_megatron.algorithm.scaler import LossScaler

    policy = make_policy(make_config(path, objective={"kl_coefficient": 0.1}, dtype="bf16"), path)
    rows, _ = my_rows(make_batch())
    before = policy.logprobs(rows)
    policy.train_step(rows, before, LossScaler(alpha=0.0), before)
    after = policy.logprobs(rows)
    return before, after, policy.reference_logprobs(rows), policy.logprobs(rows)


def test_the_reference_is_borrowed_and_returned(ranks: RankPool, untied_checkpoint: Path) -> None:
    for before, after, reference_logprobs, again in ranks.run(2, reference, path=untied_checkpoint):
        assert torch.equal(reference_logprobs, before) and torch.equal(again, after) and not torch.equal(before, after)
