"""Masks of a diffusion model: pure functions of a seed, and each estimator's own tokens."""

from __future__ import annotations

import torch

from ais_megatron.algorithm.masking import mask_generator, one_step, supervised, trajectory

IS_RESPONSE = torch.tensor([True, True, True, False])  # three tokens to the end of the sequence, one behind it
STEPS = torch.tensor([1, 0, 1, 2])  # of two tokens per step, and one of the last


def test_masks_belong_to_a_response_and_an_update() -> None:
    masks = [one_step(200, IS_RESPONSE, 0.15, 3, mask_generator(*key)) for key in [(0, 5, 1), (0, 5, 1), (0, 5, 2), (0, 6, 1), (1, 5, 1)]]
    hidden = [torch.stack([mask.hidden for mask in of]) for of in masks]
    assert torch.equal(hidden[0], hidden[1])
    assert all(not torch.equal(hidden[0], other) for other in hidden[2:])
    assert not torch.equal(hidden[0][0], hidden[0][1]), "each update has a mask of its own"
    fewer = one_step(200, IS_RESPONSE, 0.15, 2, mask_generator(0, 5, 1))
    assert all(torch.equal(mask.hidden, same) for mask, same in zip(fewer, hidden[0], strict=False))


def test_one_step_hides_the_response_and_a_share_of_the_prompt() -> None:
    masks = one_step(4000, IS_RESPONSE, 0.15, 4, mask_generator(0, 0, 0))
    for mask in masks:
        assert mask.hidden[4000:].all() and torch.equal(mask.scored, IS_RESPONSE)
        assert abs(mask.hidden[:4000].float().mean() - 0.15) < 0.03  # five standard deviations
    assert not any(mask.hidden[:4000].any() for mask in one_step(4000, IS_RESPONSE, 0.0, 2, mask_generator(0, 0, 0)))


def test_a_trajectory_scores_what_a_step_revealed_given_what_was_there_before() -> None:
    masks, repeats = trajectory(2, STEPS, IS_RESPONSE, 2, mask_generator(0, 0, 0))
    by_tokens = {tuple(mask.scored.tolist()): mask.hidden.tolist() for mask in masks}
    assert repeats == 2 and by_tokens == {
        (False, True, False, False): [False, False, True, True, True, True],  # step 0
        (True, False, True, False): [False, False, True, False, True, True],  # step 1; step 2 revealed no token of the response
    }


def test_a_sum_over_some_states_is_unbiased() -> None:
    """Over all draws, each of T states counts equally often, and twice the states count as twice the sum."""
    steps, is_response = torch.arange(5), torch.ones(5, dtype=torch.bool)
    total, draws = torch.zeros(5), 3000
    for prompt in range(draws):
        masks, repeats = trajectory(1, steps, is_response, 2, mask_generator(0, prompt, 0))
        assert repeats == 5 and len(masks) == 2
        total += repeats * sum(mask.scored.float() for mask in masks)
    assert (total / draws - 2.0).abs().max() < 0.2  # 2 * 5 * 1/5, with a standard deviation of 0.045


def test_too_short_a_trajectory_is_filled_with_masks_that_score_nothing() -> None:
    masks, repeats = trajectory(1, torch.tensor([0, 0]), torch.ones(2, dtype=torch.bool), 3, mask_generator(0, 0, 0))
    assert repeats == 3 and [int(mask.scored.sum()) for mask in masks] == [2, 0, 0]


def test_supervised_masks_have_every_size() -> None:
    sizes = [int(supervised(3, 4, mask_generator(0, prompt, 0)).scored.sum()) for prompt in range(400)]
    assert all(abs(sizes.count(size) - 100) < 45 for size in (1, 2, 3, 4)) and len(set(sizes)) == 4  # five standard deviations
    mask = supervised(3, 4, mask_generator(0, 0, 0))
    assert not mask.hidden[:3].any() and torch.equal(mask.hidden[3:], mask.scored)
