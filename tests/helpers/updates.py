"""One update of a policy and all that it computes, to compare two ways to compute it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ais_megatron.batch import Batch
from ais_megatron.config import Config
from ais_megatron.shapes import Shapes
from tests.helpers.policies import make_batch, make_policy, moe_config, my_rows, weights_of


def batch_with_routes() -> Batch:
    """`make_batch` with two random experts of eight for every token, as an engine would report them."""
    batch = make_batch()
    chosen = torch.randint(0, 8, (6, 17, 4, 2), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    chosen[..., 1] = (chosen[..., 0] + 1 + chosen[..., 1] % 7) % 8  # two experts, not the same twice
    chosen[torch.arange(17) >= batch.lengths[:, None] - 1] = -1
    return replace(batch, routed_experts=chosen)


def one_update(
    rank: int,
    path: Path,
    parallel: dict,
    is_moe: bool,
    shapes: Shapes | None = None,
    recompute: str = "none",
    packing: bool = False,
    budget: int = 40,
    aggregation: str = "sequence",
    **sections: object,
) -> dict[str, object]:
    """What one update sees and makes, with the shapes of a GPU (in small) or this machine's own; and the shapes it met."""
    from megatron.core import parallel_state

    from ais_megatron.algorithm.correction import Correction
    from ais_megatron.algorithm.scaler import LossScaler
    from ais_megatron.policy import microbatches as module

    config = moe_config(path, parallel, budget=budget, **(dict(aux_coefficient=0.02, z_coefficient=1e-3) if is_moe else {}))
    if is_moe:
        config = config.model_copy(update={"moe": config.moe.model_copy(update={"routing_replay": True})})
    train = config.train.model_copy(update={"share_prefixes": False, "packing": packing})  # as on a GPU
    config = config.model_copy(update={"model": config.model.model_copy(update={"recompute": recompute}), "train": train})
    config = Config(**{**config.model_dump(), **sections}) if sections else config
    own = module.Shapes
    if shapes is not None:
        module.Shapes = type("Chosen", (), {"on": staticmethod(lambda device, multiple, ranks: shapes)})
    try:
        policy = make_policy(config, path)
    finally:
        module.Shapes = own
    rows, _ = my_rows(batch_with_routes() if is_moe else make_batch())
    rows = replace(rows, rollout_logprobs=-2.0 * rows.loss_mask)
    met: set[tuple[int, ...]] = set()
    policy.model.register_forward_pre_hook(lambda _, args: met.add(tuple(args[0].shape)))
    old, calibration = policy.logprobs_and_calibration(rows)
    gradients: list[torch.Tensor] = []
    step, metrics_of_routing = policy.optimizer.step, dict(policy.routing_metrics)

    def observed_step():  # noqa: ANN202
        gradients.extend(whole_gradients(policy))
        return step()

    policy.optimizer.step = observed_step
    scaler = LossScaler(0.5, aggregation, Correction("ais"))
    metrics = policy.train_step(rows, old, scaler)
    return {
        "logprobs": old * rows.loss_mask,
        "amax": torch.stack([calibration.scales.q_amax, calibration.scales.k_amax, calibration.scales.v_amax]),
        "saturated": calibration.saturated_fraction,
        "gradients": gradients,
        "metrics": metrics | metrics_of_routing,
        "work": policy.work_metrics,
        "met": met,
        "weights": weights_of(policy),
        "place": (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()),
    }


def whole_gradients(policy) -> list[torch.Tensor]:  # noqa: ANN001
    """The reduced gradient of every parameter that is trained. After the reduction a rank has only its part of each bucket."""
    import torch.distributed as dist

    for buffer in (*policy.ddp.buffers, *policy.ddp.expert_parallel_buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            parts = list(bucket.grad_data.clone().chunk(dist.get_world_size(group)))
            dist.all_gather(parts, parts[dist.get_rank(group)].clone(), group=group)
            bucket.grad_data.copy_(torch.cat(parts))
    return [p.main_grad.float().clone() for p in policy.model.parameters() if p.requires_grad]


def assert_same(first: list[dict], second: list[dict], tolerance: float = 1e-6) -> None:
    """The same figures rank by rank, or if there are more ranks in `second`, on all ranks with the same part of the model."""
    if len(first) < len(second):
        first = [next(one for one in first if one["place"] == other["place"]) for other in second]
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(other["logprobs"], one["logprobs"], rtol=0, atol=2 * tolerance)
        torch.testing.assert_close(other["amax"], one["amax"], rtol=tolerance, atol=tolerance)
        assert other["saturated"] == one["saturated"]
        assert len(one["gradients"]) > 0
        if len(one["gradients"]) == len(other["gradients"]):  # (with expert parallelism a rank has only some experts)
            largest = max(float(g.abs().max()) for g in one["gradients"])
            for name, (g, h) in enumerate(zip(one["gradients"], other["gradients"], strict=True)):
                assert (g - h).abs().max() <= tolerance * max(1.0, largest), name
        for name, value in one["metrics"].items():
            assert other["metrics"][name] == pytest.approx(value, rel=10 * tolerance, abs=tolerance), name
        for name, weight in one["weights"].items():  # Adam's first step is nearly the sign of the gradient, also where it is nearly 0
            difference = (other["weights"][name] - weight).abs()
            assert difference.max() < 2e-4 and difference.mean() < tolerance, name
