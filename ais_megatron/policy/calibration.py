"""Measures the ranges of Q, K and V at the input of the core attention, where the rollout engine quantises K and V.

At this point Q and K are normalised and rotated. Hooks record the largest magnitude per layer over real tokens. Padding is left out,
because its values do not matter. The forward passes either run anyway (`lagged`) or only for this (`fresh`). The maximum over all ranks
covers the heads of TP, the rows of DP and the layers of PP. Layers are numbered over the whole model.
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
from ais_megatron.policy.gated_delta_net import GatedDeltaNet
from ais_megatron.quantization.kv_scales import KVScales

E4M3_MAX = 448.0


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration."""

    scales: KVScales
    """For the engine's KV cache."""
    saturated_fraction: float
    """Share of this batch's K and V elements that the previous scales would clip."""


class Calibrator:
    """Records forward passes within the context `recording`. Call `see` with each microbatch before its forward pass.

    recomputes: layers run a second time in the backward pass, when the latest microbatch may already be another one.
    """

    def __init__(self, model: GPTModel, num_layers: int, margin: float, recomputes: bool = False) -> None:
        self.num_layers, self.margin, self._recomputes = num_layers, margin, recomputes
        self.latest: Calibration | None = None
        self._recording = False
        # Of the microbatch in the forward pass: number of places before the first padding, real tokens after it, number of all real tokens.
        self._full, self._rest, self._num_real = 0, torch.zeros(0, dtype=torch.int64), 0
        self._limits = torch.full((2, num_layers), E4M3_MAX)  # K and V magnitudes at which scale 1.0 saturates
        self._reset()
        for layer in model.decoder.layers:
            if isinstance(layer.self_attention, GatedDeltaNet):  # which has no K and V that an engine would cache
                continue
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
            self._recording = False

    def see(self, is_real: Tensor) -> None:
        """is_real: bool ``[seq * batch]``, False in padding, in the order of Q, K and V."""
        if not self._recording:
            return
        real = is_real.nonzero()[:, 0]
        self._full = int((real == torch.arange(len(real), device=real.device)).sum())
        self._rest, self._num_real = real[self._full :] - self._full, len(real)

    def _hook(self, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, object]], None]:
        def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
            # With recomputation a layer first runs without gradient, then with it.
            if self._recording and not (self._recomputes and torch.is_grad_enabled()):
                self._record(layer, args[:3])

        return record

    @torch.no_grad()
    def _record(self, layer: int, qkv: tuple[Tensor, ...]) -> None:
        """qkv: ``[seq, batch, heads/tp, head_dim]`` each, or ``[seq, heads/tp, head_dim]`` of packed rows."""
        for row, x in enumerate(qkv):
            # Places before the first padding are read in place. From the others the real tokens are gathered, which is faster than masking
            # the magnitudes of all tokens.
            x = x.flatten(0, -3)
            rest = x[self._full :].index_select(0, self._rest)
            parts = [part for part in (x[: self._full], rest) if part.numel()]
            for part in parts:
                low, high = part.aminmax()
                amax = torch.maximum(-low, high).float()
                self._amax[row, layer] = torch.maximum(self._amax[row, layer], amax)
                # Saturation is rare, but on a GPU asking whether there is any would wait for the queue.
                if row and (part.is_cuda or amax > self._limits[row - 1, layer]):
                    self._counts[0] += (part.abs() > self._limits[row - 1, layer]).sum()
            if row:
                self._counts[1] += self._num_real * x.shape[-1] * x.shape[-2]

    def result(self) -> Calibration:
        """Combine the records of all ranks, with one maximum and one sum over the whole job."""
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
        """Use `calibration` as the latest one. From now on saturation is counted with its scales."""
        self.latest = calibration
        self._limits = torch.stack([calibration.scales.k_scale, calibration.scales.v_scale]) * E4M3_MAX
