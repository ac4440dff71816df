"""The embedded engine against transformers' own forward pass, and what it refuses."""

import logging

import pytest
import torch

from ais_megatron.batch import Prompt
from ais_megatron.config import Architecture, RolloutConfig
from ais_megatron.quantization.fp8 import E4M3, dequantize_block, quantize_block, quantize_bucket
from ais_megatron.quantization.kv_scales import KVScales
from ais_megatron.rollout.engine import SamplingParams
from ais_megatron.rollout.local import kv_cache
from ais_megatron.rollout.local.engine import LocalEngine
from ais_megatron.rollout.local.kv_cache import KVCache
from ais_megatron.rollout.local.quantized_linear import InputQuantizer, QuantizedLinear
from ais_megatron.rollout.sampling import choose_tokens, uniform_draws
from tests.helpers.engines import BF16, DENSE, EOS, FP8, LAYERS, Engines, make_prompts, reference_logprobs, reference_model

ENGINES = Engines(DENSE)
make_engine, make_weights, fitted = ENGINES.make, ENGINES.weights, ENGINES.fitted


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_batch", [256, 12, 3])
def test_float32_logprobs_equal_transformers(temperature, max_batch, monkeypatch):
    drops = []
    original = KVCache.keep_rows
    monkeypatch.setattr(KVCache, "keep_rows", lambda cache, rows: (drops.append(len(rows)), original(cache, rows)))
    engine = fitted(BF16 | {"max_batch": max_batch})
    prompts = make_prompts([1, 9, 4, 12, 4, 1, 7])
    rollouts = engine.generate(prompts, SamplingParams(4, 24, temperature=temperature))
    assert [r.prompt.index for r in rollouts] == [p.index for p in prompts for _ in range(4)]
    assert drops and len({len(r.token_ids) for r in rollouts}) > 3  # rows ended at different times and were dropped
    model = reference_model(engine)
    for rollout in rollouts:
        torch.testing.assert_close(
            torch.tensor(rollout.rollout_logprobs), reference_logprobs(model, rollout, temperature), rtol=0, atol=1e-5
        )
        ended = rollout.token_ids[-1] == EOS
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert EOS not in rollout.token_ids[:-1] and (ended or len(rollout.token_ids) == 24)
        assert rollout.weight_version == 0


def test_responses_do_not_depend_on_the_batch():
    prompts = make_prompts([5, 2, 11, 8])
    together = fitted().generate(prompts, SamplingParams(3, 20, seed=5))
    small_waves = fitted(BF16 | {"max_batch": 2})
    alone = [r for p in reversed(prompts) for r in small_waves.generate([p], SamplingParams(3, 20, seed=5))]
    tokens = {p.index: [r.token_ids for r in together if r.prompt.index == p.index] for p in prompts}
    assert tokens == {p.index: [r.token_ids for r in alone if r.prompt.index == p.index] for p in prompts}
    fewer = small_waves.generate(prompts[:1], SamplingParams(1, 10, seed=5))  # also not on the number of samples or tokens
    assert fewer[0].token_ids == tokens[0][0][:10]
    other_seed = small_waves.generate(prompts[:1], SamplingParams(3, 20, seed=6))
    assert [r.token_ids for r in other_seed] != tokens[0]


def test_any_end_of_sequence_token_ends_a_response_and_stays_in_it():
    ids, prompts, sampling = (EOS, 5, 9), make_prompts([5, 2, 11, 8]), SamplingParams(3, 20, seed=5)
    engine = LocalEngine(Architecture(**DENSE), RolloutConfig(**BF16), eos_ids=ids, pad_id=0, device="cpu", dtype=torch.float32)
    engine.update_weights([make_weights()], 0)
    ends = set()
    for longer, rollout in zip(fitted().generate(prompts, sampling), engine.generate(prompts, sampling), strict=True):
        length = next((i + 1 for i, token in enumerate(longer.token_ids) if token in ids), 20)
        assert rollout.token_ids == longer.token_ids[:length] and len(rollout.rollout_logprobs) == length
        assert rollout.finish_reason == ("stop" if rollout.token_ids[-1] in ids else "length")
        ends.add(rollout.token_ids[-1])
    assert ends >= set(ids)


def test_greedy_takes_the_likeliest_token():
    engine = fitted()
    model = reference_model(engine)
    for rollout in engine.generate(make_prompts([3, 6]), SamplingParams(1, 8, temperature=0.0)):
        sequence = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
        with torch.no_grad():
            best = model(sequence).logits[0, len(rollout.prompt.token_ids) - 1 : -1].argmax(-1)
        assert tuple(best.tolist()) == rollout.token_ids
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), reference_logprobs(model, rollout, 1.0), rtol=0, atol=1e-5)


def test_tied_embeddings_need_no_head():
    engine = fitted(tie_word_embeddings=True)
    assert "lm_head.weight" not in engine.state_tensors()
    rollout = engine.generate(make_prompts([4]), SamplingParams(1, 4))[0]
    head = engine.state_tensors()["model.embed_tokens.weight"]
    engine.update_weights([[*make_weights(tie_word_embeddings=True), ("lm_head.weight", head.clone())]], 1)
    assert engine.generate(make_prompts([4]), SamplingParams(1, 4))[0].rollout_logprobs == rollout.rollout_logprobs


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_sampling_frequencies_match_probabilities():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -float("inf"), 0.5, -3.0])
    count, temperature = 40_000, 1.5
    draws = uniform_draws(SamplingParams(1, 200, seed=3), [(i, s) for i in range(20) for s in range(10)]).flatten()
    tokens, logprobs = choose_tokens(logits.expand(count, -1), draws, SamplingParams(1, 1, temperature))
    expected = (logits / temperature).softmax(-1)
    observed = torch.bincount(tokens, minlength=7)
    assert observed[4] == 0
    possible = expected > 0
    chi_square = ((observed - count * expected)[possible] ** 2 / (count * expected[possible])).sum()
    assert chi_square < 15.1  # 5 degrees of freedom, 99 %
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_extreme_draws_choose_possible_tokens():
    logits = torch.tensor([[-float("inf"), 0.3, 1.0, -float("inf"), -0.7, -float("inf")]]).expand(2, -1)
    draws = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert choose_tokens(logits, draws, SamplingParams(1, 1))[0].tolist() == [1, 4]


def test_top_k_and_top_p_restrict_choices_but_not_logprobs():
    probs = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])
    logits = probs.log().expand(2000, -1)
    draws = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000

    def shares(**limits):
        tokens, logprobs = choose_tokens(logits, draws, SamplingParams(1, 1, **limits))
        torch.testing.assert_close(logprobs, probs.log()[tokens])
        return torch.bincount(tokens, minlength=5) / 2000

    for limits, allowed in (
        ({"top_k": 2}, [1, 2]),
        ({"top_k": 1}, [1]),
        ({"top_p": 0.6}, [1, 2]),
        ({"top_p": 0.7}, [1, 2, 3]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.7, "top_k": 2}, [1, 2]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
    ):
        kept = torch.zeros(5).index_fill(0, torch.tensor(allowed), 1.0) * probs
        torch.testing.assert_close(shares(**limits), kept / kept.sum(), rtol=0, atol=2e-3)


def test_top_k_one_generates_greedily():
    engine, prompts = fitted(), make_prompts([4, 6])
    greedy = engine.generate(prompts, SamplingParams(1, 8, temperature=0.0))
    assert [r.token_ids for r in engine.generate(prompts, SamplingParams(1, 8, top_k=1))] == [r.token_ids for r in greedy]


# --- FP8 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "rows"), [(128, 256), (300, 130)])
def test_fp8_linear_equals_a_plain_reference(columns, rows):
    torch.manual_seed(0)
    layer = QuantizedLinear(columns, rows, InputQuantizer())
    q, scale_inv = quantize_block(torch.randn(rows, columns))
    layer.weight.copy_(q)
    layer.weight_scale_inv.copy_(scale_inv)
    layer.refresh()
    x = torch.randn(2, 3, columns).bfloat16()
    total = torch.zeros(2, 3, rows)
    for start in range(0, columns, 128):  # one group of columns after the other, scales applied to each group's sum
        group = x[..., start : start + 128].float()
        scale = group.abs().amax(-1, keepdim=True) / 448
        products = (group / scale).to(E4M3).float() @ q[:, start : start + 128].float().T
        total += products * scale * scale_inv[:, start // 128].repeat_interleave(128)[:rows]
    assert torch.equal(layer.dequantized, dequantize_block(q, scale_inv))
    torch.testing.assert_close(layer(x.float()), total, rtol=1e-5, atol=1e-4)
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).float(), total, rtol=2**-8, atol=1e-4)


def test_linears_sharing_a_quantizer_quantise_a_tensor_once():
    quantizer = InputQuantizer()
    x = torch.randn(2, 8)
    assert quantizer(x) is quantizer(x)
    assert not torch.equal(quantizer(x), quantizer(2 * x))


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_undoes_the_scales(new, dtype):
    """Decode and prefill over the cache equal plain attention over the dequantised K and V."""
    torch.manual_seed(0)
    rows, length, group = 3, 7, 2
    module = torch.nn.Module()
    module.k_scale, module.v_scale = 0.05, 3.0
    cache = KVCache(torch.empty(1, 2, rows, 2, length + 4, 8), torch.tensor([[0.05, 3.0]]))
    k, v = torch.randn(2, rows, 2, length, 8).to(dtype)
    cache.update(k[:, :, :-new], v[:, :, :-new], 0)
    cache.advance(length - new)
    key, value = cache.update(k[:, :, -new:], v[:, :, -new:], 0)
    for stored, x, scale in ((key, k, 0.05), (value, v, 3.0)):
        assert torch.equal(stored, (x.float() / scale).clamp(-448, 448).to(E4M3).float())
    q = torch.randn(rows, 2 * group, new, 8).to(dtype)
    mask = torch.zeros(rows, 1, new, length)
    mask[0, ..., :2] = -torch.inf
    got, _ = kv_cache.attention(module, q, key, value, mask, scaling=0.3)
    scores = q.float() @ (0.05 * key).repeat_interleave(group, 1).transpose(2, 3) * 0.3 + mask
    expected = (scores.softmax(-1) @ (3.0 * value).repeat_interleave(group, 1)).transpose(1, 2)
    assert got.dtype == dtype and got.shape == (rows, new, 2 * group, 8)
    torch.testing.assert_close(got.float(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_fp8_engine_is_close_to_bf16_but_not_equal(caplog):
    prompts, sampling = make_prompts([5, 9, 3]), SamplingParams(4, 12, seed=1)
    fp8 = make_engine(FP8, torch.bfloat16)
    scales = KVScales(torch.full((LAYERS,), 8.0), torch.full((LAYERS,), 8.0), torch.ones(LAYERS))
    with caplog.at_level(logging.WARNING):
        fp8.update_weights([quantize_bucket(make_weights(torch.bfloat16)), list(scales.named_tensors())], 4)
    assert not caplog.records
    model = reference_model(fitted())
    gaps = torch.cat([torch.tensor(r.rollout_logprobs) - reference_logprobs(model, r, 1.0) for r in fp8.generate(prompts, sampling)])
    assert 1e-4 < gaps.abs().mean() < 0.15


def test_kv_scales_reach_the_attention():
    """Absurd scales must change what an FP8 cache answers, and leave with the update that brought them."""
    engine = make_engine(FP8)
    weights = quantize_bucket(make_weights())
    prompts, sampling = make_prompts([6]), SamplingParams(1, 6, temperature=0.0)

    def answer(*extra):
        engine.update_weights([weights, *extra], 0)
        return engine.generate(prompts, sampling)[0].rollout_logprobs

    wide = KVScales(torch.full((LAYERS,), 1e6), torch.full((LAYERS,), 1e6), torch.ones(LAYERS))
    unit = answer()
    assert answer(list(KVScales.unit(LAYERS).named_tensors())) == unit
    assert answer(list(wide.named_tensors())) != unit
    assert answer() == unit


# --- updates and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rollout", "dtype"), [(BF16, torch.bfloat16), (BF16, torch.float32), (FP8, torch.bfloat16)])
def test_state_is_bit_identical_to_what_was_pushed(rollout, dtype):
    engine = make_engine(rollout, dtype)
    addresses = {name: t.data_ptr() for name, t in engine.state_tensors().items()}
    for seed in (0, 1):
        pushed = make_weights(dtype, seed)
        if rollout is FP8:
            pushed = quantize_bucket(pushed) + list(KVScales(torch.ones(LAYERS), torch.ones(LAYERS), torch.ones(LAYERS)).named_tensors())
        engine.update_weights(([item] for item in reversed(pushed)), seed)
        state = engine.state_tensors()
        assert state.keys() == dict(pushed).keys() and engine.version == seed
        for name, tensor in pushed:
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert addresses == {name: t.data_ptr() for name, t in engine.state_tensors().items()}  # copied in place


def _replaced(weights, name, tensor):
    return [(n, tensor if n == name else t) for n, t in weights]


DOWN = "model.layers.1.mlp.down_proj.weight"
K_SCALE = "model.layers.1.self_attn.attn.k_scale"


@pytest.mark.parametrize(
    ("rollout", "change", "message"),
    [
        (BF16, lambda w: w[1:], "embed_tokens.weight: missing"),
        (BF16, lambda w: [*w, ("model.layers.9.mlp.up_proj.weight", w[0][1])], "layers.9.mlp.up_proj.weight: the model has no such"),
        (BF16, lambda w: [*w, w[-1]], "arrived twice"),
        (BF16, lambda w: _replaced(w, DOWN, torch.zeros(32, 47)), rf"{DOWN}: got .*\[32, 47\], expected .*\[32, 48\]"),
        (BF16, lambda w: _replaced(w, DOWN, torch.zeros(32, 48).bfloat16()), f"{DOWN}: got torch.bfloat16"),
        (BF16, lambda w: quantize_bucket(w), "got torch.float8_e4m3fn"),
        (BF16, lambda w: [*w, (K_SCALE, torch.tensor(1.0))], f"{K_SCALE}: the engine has no such KV scale"),
        (FP8, lambda w: w, r"got torch.float32 .*expected torch.float8_e4m3fn"),
        (FP8, lambda w: [x for x in quantize_bucket(w) if x[0] != DOWN + "_scale_inv"], f"{DOWN}_scale_inv: missing"),
        (FP8, lambda w: [*quantize_bucket(w), (K_SCALE, torch.tensor(1.0))], "layers.0.self_attn.attn.k_scale: missing"),
        (FP8, lambda w: [*quantize_bucket(w), *((n, t * 0) for n, t in KVScales.unit(LAYERS).named_tensors())], "above 0"),
    ],
)
def test_bad_updates_are_refused_and_leave_no_weights(rollout, change, message):
    engine = fitted(rollout)
    with pytest.raises(ValueError, match=message):
        engine.update_weights([change(make_weights())], 1)
    assert engine.version == -1
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate(make_prompts([3]), SamplingParams(1, 2))
    good = make_weights()
    engine.update_weights([good if rollout is BF16 else quantize_bucket(good)], 2)
    assert engine.version == 2


def test_a_stream_that_breaks_leaves_no_weights():
    def stream():
        yield make_weights()[:2]
        raise OSError("sender died")

    engine = fitted()
    with pytest.raises(OSError):
        engine.update_weights(stream(), 1)
    assert engine.version == -1


def test_missing_kv_scales_are_warned_about_once(caplog):
    engine = make_engine(FP8)
    with caplog.at_level(logging.WARNING):
        for version in (0, 1):
            engine.update_weights([quantize_bucket(make_weights())], version)
    assert len(caplog.records) == 1 and "1.0" in caplog.text
    assert engine.state_tensors()[K_SCALE] == 1.0


@pytest.mark.parametrize("rollout", [BF16, FP8])
def test_corrupt_weights_are_named_by_prompt(rollout):
    weights = make_weights()
    norm = dict(weights)["model.norm.weight"]
    engine = make_engine(rollout)
    as_pushed = list if rollout is BF16 else quantize_bucket
    with pytest.raises(ValueError, match="model.norm.weight: holds NaN"):
        engine.update_weights([as_pushed(_replaced(weights, "model.norm.weight", norm.clone().fill_(float("nan"))))], 3)
    # Finite, so it passes; what it makes of the activations does not.
    engine.update_weights([as_pushed(_replaced(weights, "model.norm.weight", norm.clone().fill_(3e38)))], 3)
    with pytest.raises(RuntimeError, match="prompt 17.*weight version 3"):
        engine.generate(make_prompts([4], start=17), SamplingParams(2, 4))


def test_prompts_that_cannot_be_answered():
    engine = fitted()
    fits = make_prompts([30])
    assert len(engine.generate(fits, SamplingParams(1, 10))[0].token_ids) >= 1
    with pytest.raises(ValueError, match="prompt 5 has 31 tokens.*max_tokens=10.*max_position_embeddings=40.*30 tokens"):
        engine.generate([*fits, *make_prompts([31], start=5)], SamplingParams(1, 10))
    with pytest.raises(ValueError, match="prompt 6 is empty"):
        engine.generate([Prompt(6, "", (), {})], SamplingParams(1, 1))
    with pytest.raises(ValueError, match="prompt 8 has token ids outside 0..22"):
        engine.generate([Prompt(8, "", (3, 23), {})], SamplingParams(1, 1))
    with pytest.raises(ValueError, match="num_samples=0"):
        engine.generate(fits, SamplingParams(0, 1))
    assert engine.generate([], SamplingParams(1, 1)) == []


def test_version_and_close():
    engine = make_engine()
    assert engine.version == -1
    with pytest.raises(ValueError, match="version=-1"):
        engine.update_weights([make_weights()], -1)
    engine.update_weights([make_weights()], 3)
    assert engine.version == 3
    engine.close()
    engine.close()
    assert engine.version == -1
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(make_prompts([3]), SamplingParams(1, 1))
    with pytest.raises(RuntimeError, match="closed"):
        engine.update_weights([], 4)
