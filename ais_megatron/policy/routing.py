"""Routing in a MoE policy: load balancing, routing replay, and their metrics.

    auxiliary loss = aux_coefficient * E * sum_i f_i P_i,     z-loss = z_coefficient * mean(logsumexp(logits)^2)

Source: Switch Transformer (arXiv 2101.03961, equation 4) with f over the global batch (arXiv 2501.11873), ST-MoE (arXiv 2202.08906) for
the z-loss. Megatron computes f_i, the share of tokens sent to expert i, per microbatch, so its gradient depends on the split. Here f
comes from a pass over the whole batch, which runs before the training pass anyway. With f given, both losses are sums over tokens, so
their gradient is the same for any number of microbatches or ranks. It is added by Megatron's own `MoEAuxLossAutoScaler`, so alpha does
not scale it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from ais_megatron.batch import Batch
from ais_megatron.distributed import device
from ais_megatron.policy.arranged import Arranged
from ais_megatron.policy.straight_through import straight_through


@dataclass
class Routing:
    """What the routers of one model share. Call `see` with each microbatch before its forward pass."""

    num_layers: int
    num_experts: int
    top_k: int
    aux_coefficient: float
    z_coefficient: float
    replay: bool
    tokens_scale: float = 1.0
    """Loss tokens / real tokens of the update. Megatron divides every gradient by the number of loss tokens, but the losses here are
    means over all real tokens."""
    fractions: Tensor | None = None
    """float32 ``[num_layers, num_experts]``, f of the last recorded batch; None before the first."""
    _rows: Batch | None = None
    _arranged: Arranged | None = None
    _recording: bool = False
    _counts: Tensor = field(default_factory=lambda: torch.zeros(0))
    _compared: Tensor = field(default_factory=lambda: torch.zeros(3))

    def see(self, rows: Batch, arranged: Arranged) -> None:
        """The microbatch in the forward pass."""
        self._rows, self._arranged = rows, arranged

    @property
    def _seen(self) -> tuple[Batch, Arranged]:
        assert self._rows is not None and self._arranged is not None, "call see before the forward pass"
        return self._rows, self._arranged

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within this context, count which experts get the tokens of forward passes."""
        self._counts = torch.zeros(self.num_layers, self.num_experts, dtype=torch.float64, device=device())
        # tokens whose experts differ, compared tokens, token-expert pairs to send
        self._compared = torch.zeros(3, dtype=torch.float64, device=device())
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def finish_recording(self) -> dict[str, float]:
        """Reduce the counts of all ranks (one rank of a stage counts each token), set `fractions`, and return the metrics."""
        vector = torch.cat([self._counts.view(-1), self._compared])
        if dist.get_world_size() > 1:
            dist.all_reduce(vector)
        counts = vector[:-3].view(self.num_layers, self.num_experts)
        differing, compared, sent = vector[-3:].tolist()
        totals = counts.sum(1, keepdim=True).clamp(min=1.0)
        self.fractions = (counts / totals).float()
        load = counts.amax(1) / counts.mean(1).clamp(min=1e-9)
        metrics = {
            "expert_load_max_over_mean": float(load.mean()),
            "expert_load_worst_layer": float(load.max()),
            "dropped_tokens_fraction": 1.0 - float(counts.sum()) / max(sent * self.top_k, 1.0),
        }
        return metrics | ({"routing_differs_fraction": differing / compared} if compared else {})

    def _local(self, of_places: Tensor, num_tokens: int) -> Tensor:
        """``[places, ...]`` of this rank's router, which with sequence parallelism has a slice of them: ``[tokens, ...]``."""
        shards = len(of_places) // num_tokens
        return of_places.chunk(shards)[parallel_state.get_tensor_model_parallel_rank()] if shards > 1 else of_places

    def real_tokens(self, num_tokens: int) -> Tensor:
        """bool ``[tokens]``, False on padding."""
        return self._local(self._seen[1].is_real, num_tokens)

    def engine_experts(self, layer: int, num_tokens: int) -> Tensor | None:
        """The rollout engine's choice, int64 ``[tokens, top_k]``, -1 where there is none. None if the engine did not report it."""
        rows, arranged = self._seen
        if rows.routed_experts is None:
            return None
        chosen = arranged.of_places(rows.routed_experts[:, :, layer]).masked_fill(~arranged.is_real[:, None], -1)
        return self._local(chosen, num_tokens).long()

    def record(self, layer: int, chosen: Tensor, real: Tensor) -> None:
        """chosen: bool ``[tokens, num_experts]``, the experts that got the tokens."""
        if self._recording:
            self._counts[layer] += chosen[real].sum(0)
            self._compared[2] += real.sum()

    def compare(self, own: Tensor, engine: Tensor, real: Tensor) -> None:
        """own, engine: int64 ``[tokens, top_k]``."""
        if self._recording:
            known = real & (engine[:, 0] >= 0)
            differs = (own.sort(-1).values != engine.sort(-1).values).any(-1)
            self._compared[:2] += torch.stack([(differs & known).sum(), known.sum()])


class _Replay:
    """Megatron's hook around the choice of experts (`RouterReplay.get_replay_topk`). It returns the router's or the engine's choice."""

    def __init__(self, routing: Routing, layer: int, real: Tensor) -> None:
        self.routing, self.layer, self.real = routing, layer, real

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: Any, group_topk: Any, default_compute_topk: Callable[..., tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        values, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        engine = self.routing.engine_experts(self.layer, len(scores))
        if engine is None:
            return values, own
        self.routing.compare(own, engine, self.real)
        if not self.routing.replay:
            return values, own
        chosen = torch.where(engine >= 0, engine, own)
        return scores.gather(1, chosen), chosen


class Router(TopKRouter):
    """Qwen3-MoE's router: logits and softmax in FP32, top-k, and probabilities scaled to sum 1 if the model does so.

    No token is dropped. `attach` sets `routing_state`.
    """

    routing_state: Routing
    rounds_first = False
    """Round logits and probabilities to the model's dtype, as transformers' models do."""

    def _rounded(self, x: Tensor) -> Tensor:
        return straight_through(x, x.to(self.config.params_dtype).float()) if self.rounds_first else x

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits: ``[seq, batch, num_experts]``. Returns probabilities and choice, each ``[tokens, num_experts]``."""
        state, layer = self.routing_state, self.layer_number - 1
        logits = self._rounded(logits.view(-1, state.num_experts))
        real = state.real_tokens(len(logits))
        training = torch.is_grad_enabled() and self.training
        if training and state.z_coefficient:
            z_loss = (logits[real].logsumexp(-1).square().sum()) * (state.z_coefficient * state.tokens_scale)
            logits = MoEAuxLossAutoScaler.apply(logits, z_loss)
        probabilities, chosen = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            score_function="softmax",
            router_replay=_Replay(state, layer, real),
        )
        if training and state.aux_coefficient and state.fractions is not None:
            # The sum over tokens of E * f . p. tokens_scale and Megatron's division by the loss tokens turn it into the mean.
            shares = logits[real].softmax(-1, dtype=torch.float32) @ state.fractions[layer]
            aux_loss = shares.sum() * (state.aux_coefficient * state.num_experts * state.tokens_scale)
            probabilities = MoEAuxLossAutoScaler.apply(probabilities, aux_loss)
        state.record(layer, chosen, real)
        return self._rounded(probabilities), chosen


def attach(model: nn.Module, routing: Routing) -> None:
    """Give all routers of `model` their shared state."""
    for module in model.modules():
        if isinstance(module, Router):
            module.routing_state = routing
