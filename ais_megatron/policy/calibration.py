"""Ranges of Q, K and V, measured where the rollout engine will quantise them: at the core attention's input.

There the query and key have been normalised and rotated. Hooks record the largest magnitude per layer over real tokens
(padding is masked out: its values depend on nothing that is sampled) during forward passes that run anyway (`lagged`) or
for this purpose (`fresh`). The maximum over all ranks covers TP's heads, DP's rows and PP's layers, numbered globally.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from ais_megatron.distributed import device
from ais_megatron.quantization.kv_scales import KVScales

E4M3_MAX = 448.0


@dataclass(frozen=True)
class Calibration:
    """scales: for the engine's KV cache. saturated_fraction: share of this batch's K and V elements that the scales in
    force until now would have clipped."""

    scales: KVScales
    saturated_fraction: float


class Calibrator:
    """Records while `recording` is entered; `lengths` must be set to each microbatch's ``[batch]`` before its forward.

    recomputes: layers run a second time in the backward pass, when `lengths` may already be another microbatch's.
    """

    def __init__(self, model: GPTModel, num_layers: int, margin: float, recomputes: bool = False) -> None:
        self.num_layers, self.margin, self._recomputes = num_layers, margin, recomputes
        self.lengths: Tensor | None = None
        self.latest: Calibration | None = None
        self._recording = False
        # Of the microbatch with the lengths `_seen`: columns that are real in every row, real tokens after them, real tokens.
        self._full, self._rest, self._num_real = 0, torch.zeros(0, dtype=torch.int64), 0
        self._seen: Tensor | None = None
        self._limits = torch.full((2, num_layers), E4M3_MAX)  # K and V magnitudes at which scale 1.0 saturates
        self._reset()
        for layer in model.decoder.layers:
            layer.self_attention.core_attention.register_forward_pre_hook(self._hook(layer.layer_number - 1), with_kwargs=True)

    def _reset(self) -> None:
        self._amax = torch.zeros(3, self.num_layers, device=device())
        self._counts = torch.zeros(2, dtype=torch.float64, device=device())  # saturated, all

    @contextmanager
    def recording(self) -> Iterator[None]:
        self._reset()
        self._recording = True
        try:
            yield
        finally:
            self._recording, self.lengths, self._seen = False, None, None

    def _hook(self, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, object]], None]:
        def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
            # A checkpointed layer's first run is without gradient, its second with.
            if self._recording and not (self._recomputes and torch.is_grad_enabled()):
                self._record(layer, args[:3])

        return record

    @torch.no_grad()
    def _record(self, layer: int, qkv: tuple[Tensor, ...]) -> None:
        """qkv: ``[seq, batch, heads/tp, head_dim]`` each."""
        assert self.lengths is not None, "set lengths before the forward pass"
        if self._seen is not self.lengths:  # once for all layers of a microbatch
            columns = torch.arange(qkv[0].shape[0], device=self.lengths.device)
            self._full = int(self.lengths.min())
            self._rest = (columns[self._full :, None] < self.lengths).flatten().nonzero()[:, 0]
            self._num_real, self._seen = int(self.lengths.sum()), self.lengths
        for row, x in enumerate(qkv):
            # Columns without padding are looked at where they lie, of the others the real tokens are gathered: masking
            # the magnitudes of all would take longer.
            rest = x[self._full :].reshape(-1, x.shape[-2] * x.shape[-1]).index_select(0, self._rest)
            parts = [part for part in (x[: self._full], rest) if part.numel()]
            for part in parts:
                low, high = part.aminmax()
                amax = torch.maximum(-low, high).float()
                self._amax[row, layer] = torch.maximum(self._amax[row, layer], amax)
                # Rare, and nothing to count otherwise; but asking would make a GPU's queue run dry.
                if row and (part.is_cuda or amax > self._limits[row - 1, layer]):
                    self._counts[0] += (part.abs() > self._limits[row - 1, layer]).sum()
            if row:
                self._counts[1] += self._num_real * x.shape[-1] * x.shape[-2]

    def result(self) -> Calibration:
        """Join all ranks' records: one maximum and one sum over the whole job."""
        if dist.get_world_size() > 1:
            dist.all_reduce(self._amax, op=dist.ReduceOp.MAX)
            dist.all_reduce(self._counts)
        q, k, v = self._amax.cpu()
        saturated, total = self._counts.tolist()
        scales = KVScales(k_amax=k, v_amax=v, q_amax=q, margin=self.margin)
        calibration = Calibration(scales, saturated / total if total else 0.0)
        self.restore(calibration)
        return calibration

    def restore(self, calibration: Calibration) -> None:
        """Take `calibration` as the latest: saturation is counted against its scales from now on."""
        self.latest = calibration
        self._limits = torch.stack([calibration.scales.k_scale, calibration.scales.v_scale]) * E4M3_MAX
