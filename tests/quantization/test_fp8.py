"""Block FP8 quantisation: hand-computed scales, exact rounding, and which tensors it touches."""

import pytest
import torch

from ais_megatron.quantization.formats import FP8_E4M3, FP8_E5M2
from ais_megatron.quantization.fp8 import (
    E4M3,
    _quantize_fp8_on_cpu,
    _quantize_rows,
    dequantize_block,
    is_quantized_weight,
    quantize_block,
    quantize_bucket,
    quantize_dequantize_groups,
    round_to_e4m3,
)


def cast(x: torch.Tensor) -> torch.Tensor:
    """The library's own rounding, saturating."""
    return x.clamp(-448, 448).to(E4M3).float()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


def test_block_scales_are_amax_over_448():
    weight = torch.zeros(256, 256)
    weight[3, 5], weight[10, 200], weight[130, 7] = 448.0, -1.0, 0.5
    q, scale_inv = quantize_block(weight)
    assert q.dtype == E4M3 and q.shape == (256, 256)
    # The last block is all zero: scale 1.0, not 0/0.
    torch.testing.assert_close(scale_inv, torch.tensor([[1.0, 1 / 448], [0.5 / 448, 1.0]]), rtol=0, atol=0)
    assert q.float()[10, 200] == -448 and q.float()[130, 7] == 448
    torch.testing.assert_close(dequantize_block(q, scale_inv), weight, rtol=1e-7, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 257), (192, 100), (5, 384)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ragged_blocks_equal_a_loop_over_blocks(shape, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.logspace(-6, 3, shape[1])).to(dtype)
    q, scale_inv = quantize_block(weight)
    assert scale_inv.shape == (-(-shape[0] // 128), -(-shape[1] // 128)) and scale_inv.dtype == torch.float32
    restored = dequantize_block(q, scale_inv)
    for i in range(scale_inv.shape[0]):
        for j in range(scale_inv.shape[1]):
            part = (slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128))
            block = weight[part].float()
            scale = block.abs().amax() / 448
            assert scale_inv[i, j] == scale
            assert torch.equal(q[part].float(), cast(block / scale))
            assert torch.equal(restored[part], cast(block / scale) * scale)


@pytest.mark.parametrize("fmt", [FP8_E4M3, FP8_E5M2, FP8_E4M3.with_block(32)], ids=lambda fmt: f"{fmt.name}-{fmt.group}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_fast_way_on_a_cpu_gives_the_same_bits(fmt, dtype):
    """As the plain way, for whole and ragged blocks, ties, zeros, transposed weights, and scales that are subnormal and so inexact."""
    torch.manual_seed(0)
    whole, ragged = torch.randn(256, 384), torch.randn(131, 257)
    ties = torch.randint(-448, 449, (256, 256)) * 2.0**-9
    ties[:128, :128] = 448.0 * 2.0**-9  # the scale is a power of two, so quotients lie half-way between values of E4M3
    holed = whole.clone()
    holed[:128, 128:256] = 0.0
    spread = ragged * torch.exp2(torch.randint(-149, 100, ragged.shape).float())
    for weight in (whole, ragged, ties, holed, spread, whole * 1e-38, ragged * 1e-41, whole * 3e-44, ragged.t(), torch.randn(1, 1)):
        weight = weight.to(dtype)
        fast, plain = _quantize_fp8_on_cpu(weight, fmt), _quantize_rows_of(weight, fmt)
        assert torch.equal(fast[0].view(torch.uint8), plain[0].view(torch.uint8)) and torch.equal(fast[1], plain[1])
        assert torch.isfinite(fast[0].float()).all()


def _quantize_rows_of(weight, fmt):
    q = torch.empty(weight.shape, dtype=fmt.dtype)
    return q, _quantize_rows(weight, q, fmt)


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_bad_value_anywhere_is_refused(bad, dtype):
    weight = torch.randn(130, 257).to(dtype)
    weight[129, 256] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_block(weight)


def test_tiny_and_zero_weights_stay_finite():
    for weight in (torch.zeros(3, 3), torch.full((3, 3), 1e-44), torch.tensor([[1e-45, 0.0]])):
        q, scale_inv = quantize_block(weight)
        assert torch.isfinite(q.float()).all() and (scale_inv > 0).all()
    assert quantize_block(torch.zeros(3, 3))[1].item() == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused_by_name(bad):
    weight = torch.ones(200, 200)
    weight[199, 199] = bad
    with pytest.raises(ValueError, match="model.layers.3.mlp.up_proj.weight: .*NaN or infinity"):
        quantize_bucket([("model.layers.3.mlp.up_proj.weight", weight)])


def test_only_matrices_and_matching_scales():
    with pytest.raises(ValueError, match="matrix"):
        quantize_block(torch.ones(4))
    q, scale_inv = quantize_block(torch.ones(200, 100))
    with pytest.raises(ValueError, match=r"needs \[2, 1\]"):
        dequantize_block(q, scale_inv[:1])


def test_rounding_equals_the_cast_for_all_bf16_values():
    patterns = torch.arange(2**16, dtype=torch.int32)
    x = patterns.to(torch.int16).view(torch.bfloat16).float()
    finite = x[~x.isnan()]  # infinities saturate
    assert torch.equal(bits(round_to_e4m3(finite)), bits(cast(finite)))
    assert round_to_e4m3(x[x.isnan()]).isnan().all()


def test_rounding_equals_the_cast_for_random_float32_and_all_ties():
    torch.manual_seed(1)
    exponents = torch.randint(-30, 12, (400_000,)).float()
    x = torch.randn(400_000) * torch.exp2(exponents)
    grid = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    grid = grid[grid.isfinite()].sort().values
    ties = (grid[1:] + grid[:-1]) / 2
    neighbours = [torch.nextafter(ties, torch.tensor(s)) for s in (float("inf"), -float("inf"))]
    x = torch.cat([x, grid, ties, *neighbours])
    assert torch.equal(bits(round_to_e4m3(x)), bits(cast(x)))


def test_rounding_keeps_shape_of_non_contiguous_input():
    x = torch.randn(6, 4).T
    assert torch.equal(round_to_e4m3(x), cast(x))


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 300, 384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activation_groups_equal_a_loop(columns, dtype):
    torch.manual_seed(2)
    x = (torch.randn(3, 5, columns) * torch.logspace(-4, 4, columns)).to(dtype)
    x[0, 0] = 0
    got = quantize_dequantize_groups(x)
    assert got.dtype == torch.float32 and got.shape == x.shape
    for start in range(0, columns, 128):
        group = x[..., start : start + 128].float()
        scale = group.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
        assert torch.equal(got[..., start : start + 128], cast(group / scale) * scale)


def test_activation_amax_maps_to_448_for_many_magnitudes():
    # amax / (amax / 448) can exceed 448 by a rounding error; it must not round to the next grid point.
    x = torch.rand(20_000, 1) * 1e3 + 1e-3
    scale = x / 448
    assert torch.equal(quantize_dequantize_groups(x), 448 * scale)


def test_activation_nan_shows_up():
    x = torch.ones(2, 128)
    x[0, 3] = float("nan")
    got = quantize_dequantize_groups(x)
    assert got[0].isnan().any() and not got[1].isnan().any()


def test_exactly_the_projections_are_quantised():
    layer = "model.layers.11."
    yes = [f"{layer}self_attn.{p}_proj.weight" for p in "qkvo"] + [f"{layer}mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    yes += [f"{layer}mlp.experts.127.{p}_proj.weight" for p in ("gate", "up", "down")]
    no = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        layer + "mlp.gate.weight",
        layer + "mlp.gate.e_score_correction_bias",
        layer + "mlp.shared_expert_gate.weight",
        layer + "input_layernorm.weight",
        layer + "post_attention_layernorm.weight",
        layer + "self_attn.q_norm.weight",
        layer + "self_attn.q_proj.bias",
        layer + "self_attn.q_proj.weight_scale_inv",
        "visual." + yes[0],
        yes[0] + "s",
        yes[0].replace("11", "x"),
        yes[0] + "\n",
    ]
    assert all(is_quantized_weight(name) for name in yes)
    assert not [name for name in no if is_quantized_weight(name)]


def test_bucket_gains_scales_behind_each_weight():
    norm, weight = torch.ones(4), torch.randn(130, 8)
    out = quantize_bucket([("model.norm.weight", norm), ("model.layers.0.self_attn.q_proj.weight", weight)])
    assert [name for name, _ in out] == [
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.weight_scale_inv",
    ]
    assert out[0][1] is norm and out[1][1].dtype == E4M3 and out[2][1].shape == (2, 1)
