"""The sums of responses' gradients that the policy takes in its forward pass, against transformers and in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ais_megatron.algorithm.gradients import Sketch
from ais_megatron.batch import Batch
from tests.helpers.policies import LAYOUTS, MOE_LAYOUTS, TEMPERATURE, make_batch, make_config, make_policy
from tests.helpers.ranks import RankPool

CAPS, BAND = [1.2, 2.0], (0.5, 1.5)
ROLLOUT = {"max_response_tokens": 20, "temperature": TEMPERATURE, "group_size": 2}


def rollouts() -> Batch:
    """rollout_logprobs that give weights on both sides of the caps."""
    batch = make_batch()
    noise = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(3))
    return Batch(**{**vars(batch), "rollout_logprobs": (-4.0 + noise) * batch.loss_mask})


def sums(rank: int, path: Path, parallel: dict[str, object], **sections: object) -> Tensor:
    """`GradientSums.flat` of this data-parallel rank. Rows are split by whole groups."""
    import torch.distributed as dist

    from ais_megatron.policy.parallel import data_parallel_group

    config = make_config(path, budget=40, rollout=ROLLOUT, ais={"coefficient": "measured", "caps": CAPS, "bands": [BAND]}, **sections)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})
    policy = make_policy(config, path)
    groups = torch.arange(6).view(3, 2)[dist.get_rank(data_parallel_group()) :: dist.get_world_size(data_parallel_group())]
    rows = rollouts().rows(groups.flatten())
    gradients = policy.response_gradients(rows)
    logprobs = policy.logprobs(rows, gradients)
    assert torch.equal(logprobs, policy.logprobs(rows)), "a sketch changes no log-probability"
    return policy.gradient_sums(gradients)


def by_transformers(path: Path) -> Tensor:
    """The same for the whole batch, token by token, from the hidden states and logits of transformers."""
    from transformers import AutoModelForCausalLM

    batch = rollouts()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        output = model(batch.tokens, output_hidden_states=True)
    hidden, logp = output.hidden_states[-1], (output.logits / TEMPERATURE).log_softmax(-1)
    sketch = Sketch.random(logp.shape[-1], hidden.shape[-1], torch.float32, torch.device("cpu"))
    phi = torch.zeros(6, 2 + len(CAPS), 128, dtype=torch.float64)
    for i, t in batch.loss_mask.nonzero().tolist():
        token, p = batch.tokens[i, t], logp[i, t - 1].exp()
        outer = torch.outer(sketch.signs[token] - p @ sketch.signs, hidden[i, t - 1] @ sketch.directions).flatten()
        w = float((logp[i, t - 1, token] - batch.rollout_logprobs[i, t]).exp())
        for k, s in enumerate([1.0, *(min(w, cap) - 1.0 for cap in CAPS), w * (BAND[0] <= w <= BAND[1]) - 1.0]):
            phi[i, k] += s * batch.advantages[i] * outer
    groups = phi.view(3, 2, 2 + len(CAPS), 128).sum(1)
    counts = torch.tensor([3.0, float(batch.loss_mask.sum())], dtype=torch.float64)
    return torch.cat([counts, groups.sum(0).flatten(), torch.einsum("gks,gls->kl", groups, groups).flatten()])


@pytest.mark.parametrize("layout", ["TP1", "DP2", "TP2+SP", "PP2", "TP2xPP2", "CP2", "CP2xTP2+SP"])
def test_dense(ranks: RankPool, untied_checkpoint: Path, layout: str) -> None:
    with_context = {"CP2": (2, 1, 1, False), "CP2xTP2+SP": (4, 2, 1, True)}
    world, tp, pp, sp = (LAYOUTS | with_context)[layout]
    cp = 2 if layout in with_context else 1
    found = ranks.run(world, sums, path=untied_checkpoint, parallel={"tp": tp, "pp": pp, "cp": cp, "sequence_parallel": sp})
    total = found[0] + found[1] if layout == "DP2" else found[0]
    torch.testing.assert_close(total, by_transformers(untied_checkpoint), rtol=2e-3, atol=2e-3)
    assert layout == "DP2" or all(torch.equal(other, found[0]) for other in found), "every rank must choose the same alpha"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "TP2+EP2"])
def test_moe(ranks: RankPool, moe_checkpoint: Path, layout: str) -> None:
    world, parallel = MOE_LAYOUTS[layout]
    for found in ranks.run(world, sums, path=moe_checkpoint, parallel=parallel, moe={"aux_coefficient": 0.0}):
        torch.testing.assert_close(found, by_transformers(moe_checkpoint), rtol=5e-3, atol=5e-3)
