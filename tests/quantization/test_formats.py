"""The formats of quantised rollouts: their values against torch's casts and hand-written grids, their blocks, and the way to an engine."""

import pytest
import torch

from ais_megatron.config import Architecture, RolloutConfig
from ais_megatron.quantization.formats import FORMATS, FP4_E2M1, FP8_E5M2, INT4, format_of
from ais_megatron.quantization.fp8 import dequantize_block, quantize_block, quantize_bucket, quantize_dequantize_groups
from ais_megatron.rollout.local.quantized_linear import InputQuantizer, QuantizedLinear
from ais_megatron.rollout.manifest import Manifest
from tests.helpers.engines import BF16, DENSE, Engines, make_prompts, reference_logprobs, reference_model

ENGINES = Engines(DENSE)
make_engine, make_weights, fitted = ENGINES.make, ENGINES.weights, ENGINES.fitted
FP4_GRID = torch.tensor([-6.0, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("fmt", [FORMATS["fp8_e4m3"], FP8_E5M2])
def test_fp8_rounding_equals_torchs_cast(fmt):
    """Every BF16 number, every value of the format, every tie between two and its neighbours, and random numbers."""

    def cast(x):
        return x.clamp(-fmt.largest, fmt.largest).to(fmt.dtype).float()

    every_bf16 = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    grid = torch.arange(256, dtype=torch.uint8).view(fmt.dtype).float()
    grid = grid[grid.isfinite()].sort().values
    ties = (grid[1:] + grid[:-1]) / 2
    neighbours = [torch.nextafter(ties, torch.tensor(side)) for side in (float("inf"), -float("inf"))]
    torch.manual_seed(0)
    random = torch.randn(200_000) * torch.exp2(torch.randint(-24, 18, (200_000,)).float())
    x = torch.cat([every_bf16[~every_bf16.isnan()], grid, ties, *neighbours, random])
    assert torch.equal(bits(fmt.round(x)), bits(cast(x)))
    assert grid.max() == fmt.largest and fmt.round(torch.tensor([float("nan")])).isnan().all()


def test_fp4_rounds_to_the_nearest_of_its_fifteen_values_and_ties_to_even():
    x = torch.tensor([0.25, 0.26, 0.74, 0.75, 1.25, 1.26, 1.75, 2.5, 2.6, 3.5, 5.0, 5.1, 6.0, 100.0, -0.3, -5.0, -7.0])
    expected = torch.tensor([0.0, 0.5, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 3.0, 4.0, 4.0, 6.0, 6.0, 6.0, -0.5, -4.0, -6.0])
    assert torch.equal(FP4_E2M1.round(x), expected)
    torch.manual_seed(0)
    x = torch.randn(10_000) * 4
    nearest = FP4_GRID[(x.clamp(-6, 6)[:, None] - FP4_GRID).abs().argmin(1)]
    assert torch.equal(FP4_E2M1.round(x), nearest), "ties have probability 0"
    assert torch.equal(FP4_GRID.to(FP4_E2M1.dtype).float(), FP4_GRID), "E4M3 holds every value of FP4"


def test_fp4_weights_have_a_scale_for_each_row_and_32_columns():
    weight = torch.zeros(3, 70)
    weight[0, :4] = torch.tensor([12.0, 5.0, 2.6, -1.0])
    weight[0, 64] = 0.75  # a ragged block of 6 columns
    weight[2, 32] = -3.0
    q, scale_inv = quantize_block(weight, FP4_E2M1)
    assert q.dtype == torch.float8_e4m3fn and scale_inv.dtype == torch.float32
    assert torch.equal(scale_inv, torch.tensor([[2.0, 1.0, 0.125], [1.0, 1.0, 1.0], [1.0, 0.5, 1.0]]))
    assert q[0, :4].float().tolist() == [6.0, 2.0, 1.5, -0.5], "12, 5, 2.6 and -1 over 2; 2.5 is a tie"
    assert q[0, 64].float() == 6.0 and q[2, 32].float() == -6.0
    assert dequantize_block(q, scale_inv, fmt=FP4_E2M1)[0, :4].tolist() == [12.0, 4.0, 3.0, -1.0]


def test_int4_weights_have_a_scale_for_each_row_and_128_columns():
    weight = torch.zeros(2, 130)
    weight[0, :5] = torch.tensor([14.0, 5.0, 4.9, -1.0, -20.0 / 3])
    weight[1, 129] = -3.5  # a ragged block of 2 columns
    q, scale_inv = quantize_block(weight, INT4)
    assert q.dtype == torch.int8 and q.abs().max() == 7
    assert torch.equal(scale_inv, torch.tensor([[2.0, 1.0], [1.0, 0.5]]))
    assert q[0, :5].tolist() == [7, 2, 2, 0, -3], "over 2: 7, 2.5, 2.45, -0.5 and -3.33; ties go to even"
    assert q[1, 129] == -7


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_weights_and_activations_equal_a_loop_over_blocks(fmt):
    torch.manual_seed(1)
    weight = torch.randn(130, 161) * torch.logspace(-3, 2, 161)
    q, scale_inv = quantize_block(weight, fmt)
    (height, width), restored = fmt.weight_block, dequantize_block(q, scale_inv, fmt=fmt)
    for i in range(scale_inv.shape[0]):
        for j in range(scale_inv.shape[1]):
            part = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scale = weight[part].abs().max() / fmt.largest
            assert scale_inv[i, j] == scale and torch.equal(restored[part], fmt.round(weight[part] / scale) * scale)
    x = torch.randn(4, 161)
    got = quantize_dequantize_groups(x, fmt)
    if not fmt.group:
        assert torch.equal(got, x), "activations of W4A16 stay as they are"
        return
    for start in range(0, 161, fmt.group):
        group = x[:, start : start + fmt.group]
        scale = group.abs().amax(1, keepdim=True) / fmt.largest
        assert torch.equal(got[:, start : start + fmt.group], fmt.round(group / scale) * scale)


@pytest.mark.parametrize("fmt", [FP8_E5M2, FP4_E2M1, INT4], ids=["e5m2", "fp4", "int4"])
def test_a_linear_layer_multiplies_what_the_format_holds(fmt):
    torch.manual_seed(2)
    weight, x = torch.randn(40, 96), torch.randn(5, 96)
    layer = QuantizedLinear(96, 40, InputQuantizer(fmt))
    for buffer, tensor in zip((layer.weight, layer.weight_scale_inv), quantize_block(weight, fmt), strict=True):
        assert buffer.dtype == tensor.dtype
        buffer.copy_(tensor)
    layer.refresh()
    expected = quantize_dequantize_groups(x, fmt) @ dequantize_block(*quantize_block(weight, fmt), fmt=fmt).T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_engine_and_manifest_expect_the_same_tensors(moe):
    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40} if moe else {}
    for name, fmt in FORMATS.items():
        engine = make_engine({"quantization": name, "kv_cache": "bf16"}, torch.bfloat16, **experts)
        pushed = quantize_bucket(make_weights(torch.bfloat16, **experts), fmt)
        engine.update_weights([pushed], 0)
        manifest = Manifest.of(
            Architecture(**engine._architecture.model_dump()), RolloutConfig(quantization=name, kv_cache="bf16"), torch.bfloat16
        )
        for tensor_name, tensor in engine.state_tensors().items():
            manifest.take(tensor_name, tensor)
            assert torch.equal(tensor.float(), dict(pushed)[tensor_name].float())
        manifest.check_complete()


def test_an_engine_refuses_another_formats_weights():
    for mine, theirs, message in (
        ("fp4_e2m1", "fp8_e4m3", r"weight_scale_inv: got .*\[1, 1\], expected .*\[64, 1\]"),
        ("fp8_e4m3", "fp8_e5m2", "got torch.float8_e5m2"),
        ("int4", "fp4_e2m1", "got torch.float8_e4m3fn.*expected torch.int8"),
    ):
        engine = make_engine({"quantization": mine}, torch.bfloat16)
        with pytest.raises(ValueError, match=message):
            engine.update_weights([quantize_bucket(make_weights(torch.bfloat16), FORMATS[theirs])], 0)
        assert engine.version == -1


def test_fewer_bits_are_further_from_the_trainer():
    """Mean |log mu - log pi| of sampled tokens: E4M3 < E5M2 < FP4. INT4 has as many bits as FP4, but for weights only."""
    from ais_megatron.rollout.engine import SamplingParams

    prompts, sampling, model = make_prompts([5, 9, 3]), SamplingParams(4, 12, seed=1), reference_model(fitted(BF16))
    gaps = {}
    for name, fmt in FORMATS.items():
        engine = make_engine({"quantization": name, "kv_cache": "bf16"})
        engine.update_weights([quantize_bucket(make_weights(), fmt)], 0)
        rollouts = engine.generate(prompts, sampling)
        gaps[name] = torch.cat([torch.tensor(r.rollout_logprobs) - reference_logprobs(model, r, 1.0) for r in rollouts]).abs().mean()
    assert gaps["fp8_e4m3"] < gaps["fp8_e5m2"] < gaps["fp4_e2m1"] < 2.0 and gaps["fp8_e4m3"] < gaps["int4"], gaps


@pytest.mark.parametrize("quantization", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_the_configured_block_is_that_of_weights_activations_and_scales(quantization: str, block: int) -> None:
    """Each block is quantised as if it were alone, so the result equals that of the block cut out."""
    fmt = format_of(RolloutConfig(quantization=quantization, weight_block=block))
    assert fmt is not None and (fmt.weight_block, fmt.group) == ((block, block), block)
    weight = torch.randn(192, 576, generator=torch.Generator().manual_seed(0))
    q, scale_inv = quantize_block(weight, fmt)
    assert tuple(scale_inv.shape) == fmt.scales_shape((192, 576)) == (-(-192 // block), -(-576 // block))
    alone, scale = quantize_block(weight[-64:, 512:576], fmt) if block < 128 else quantize_block(weight[128:, 512:], fmt)
    part = q[-64:, 512:576] if block < 128 else q[128:, 512:]
    assert torch.equal(part.float(), alone.float()) and torch.equal(scale_inv[-scale.shape[0] :, -scale.shape[1] :], scale)
    activations = torch.randn(3, 576, generator=torch.Generator().manual_seed(1))
    whole = quantize_dequantize_groups(activations, fmt)
    assert torch.equal(whole[:, block : 2 * block], quantize_dequantize_groups(activations[:, block : 2 * block], fmt))


def test_formats_of_four_bits_have_blocks_of_their_own() -> None:
    assert format_of(RolloutConfig(quantization="int4", weight_block=64)) is INT4
    assert format_of(RolloutConfig(quantization="fp4_e2m1", weight_block=64)) is FORMATS["fp4_e2m1"]
    assert format_of(RolloutConfig(quantization="none")) is None
