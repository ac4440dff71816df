"""Scales of the FP8 KV cache: the arithmetic, the names, and that a cache which uses them is the better for it."""

import pytest
import torch

from ais_megatron.quantization.kv_scales import KVScales
from ais_megatron.rollout.local.kv_cache import KVCache


def test_scale_is_amax_times_margin_over_448():
    scales = KVScales(torch.tensor([448.0, 896.0, 0.0]), torch.tensor([44.8, 0.0, 4.48]), torch.zeros(3), margin=1.25)
    torch.testing.assert_close(scales.k_scale, torch.tensor([1.25, 2.5, 1.0]))
    torch.testing.assert_close(scales.v_scale, torch.tensor([0.125, 1.0, 0.0125]))


def test_unit_scales_are_exactly_one():
    scales = KVScales.unit(3)
    assert scales.k_scale.tolist() == scales.v_scale.tolist() == [1.0] * 3


def test_engine_names_and_scalars():
    named = dict(KVScales(torch.tensor([448.0, 896.0]), torch.tensor([224.0, 448.0]), torch.zeros(2)).named_tensors())
    assert {name: t.item() for name, t in named.items()} == {
        "model.layers.0.self_attn.attn.k_scale": 1.0,
        "model.layers.0.self_attn.attn.v_scale": 0.5,
        "model.layers.1.self_attn.attn.k_scale": 2.0,
        "model.layers.1.self_attn.attn.v_scale": 1.0,
    }
    assert all(t.shape == () and t.dtype == torch.float32 and t.device.type == "cpu" for t in named.values())


def test_q_overflow_names_layers():
    assert KVScales(torch.ones(3), torch.ones(3), torch.tensor([449.0, 448.0, 1e4])).q_overflow_layers() == [0, 2]


@pytest.mark.parametrize(
    ("k", "v", "margin", "message"),
    [
        (torch.ones(2), torch.ones(3), 1.0, "v_amax is"),
        (torch.ones(2), torch.ones(2).double(), 1.0, "v_amax is"),
        (torch.tensor([1.0, float("nan")]), torch.ones(2), 1.0, "k_amax of layer 1"),
        (torch.ones(2), torch.tensor([-1.0, 1.0]), 1.0, "v_amax of layer 0"),
        (torch.ones(2), torch.ones(2), 0.9, "margin=0.9"),
        (torch.ones(2), torch.ones(2), float("nan"), "margin=nan"),
    ],
)
def test_bad_measurements_are_refused(k, v, margin, message):
    with pytest.raises(ValueError, match=message):
        KVScales(k, v, torch.ones(2), margin)


def _relative_error(magnitude: float, scales: KVScales) -> float:
    """Of K and V of that magnitude, stored in and read back from a cache of one layer."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 4, 2, 16, 8).mul(magnitude).clamp(-3 * magnitude, 3 * magnitude)
    pair = torch.stack([scales.k_scale, scales.v_scale], -1)
    cache = KVCache(torch.empty(1, 2, 4, 2, 16, 8), pair)
    stored = cache.update(k, v, 0)
    return max(((s * pair[0, i] - x).norm() / x.norm()).item() for i, (s, x) in enumerate(zip(stored, (k, v), strict=True)))


@pytest.mark.parametrize("magnitude", [1e-4, 1e3])
def test_calibrated_cache_beats_unit_scales(magnitude):
    amax = torch.full((1,), 3 * magnitude)
    calibrated = _relative_error(magnitude, KVScales(amax, amax, amax))
    assert calibrated < 0.03  # 4 significant bits: at most 1/16, on average about 0.026
    assert _relative_error(magnitude, KVScales.unit(1)) > 5 * calibrated
