"""The embedded engine on Qwen3-MoE: against transformers' own forward pass, and experts in FP8 against a plain reference."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from ais_megatron.batch import assemble
from ais_megatron.config import Architecture, ConfigError, RolloutConfig, build_config
from ais_megatron.quantization.fp8 import E4M3, dequantize_block, quantize_bucket
from ais_megatron.rollout.engine import SamplingParams
from ais_megatron.rollout.local.engine import LocalEngine
from ais_megatron.rollout.local.experts import Experts, QuantizedExperts
from ais_megatron.rollout.local.kv_cache import KVCache
from tests.helpers.engines import BF16, DENSE, EOS, FP8, LAYERS, Engines, make_prompts

EXPERTS, TOP_K = 6, 2
SMALL = DENSE | {"model_type": "qwen3_moe", "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 24}
ROUTED = {"return_routed_experts": True}
ENGINES = Engines(SMALL)
make_engine, make_weights, fitted = ENGINES.make, ENGINES.weights, ENGINES.fitted


def reference_model(**architecture) -> Qwen3MoeForCausalLM:
    """transformers' model, all of it its own, with `make_weights` stacked into its batched parameters."""
    settings = SMALL | architecture
    rope = {"rope_type": "default", "rope_theta": settings["rope_theta"]}
    settings = {k: v for k, v in settings.items() if k not in ("rope_theta", "model_type")}
    settings.setdefault("norm_topk_prob", True)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, rope_parameters=rope, attn_implementation="eager")).eval()
    weights = dict(make_weights(**architecture))
    state = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = ([weights[f"{prefix}{e}.{kind}_proj.weight"] for e in range(EXPERTS)] for kind in ("gate", "up", "down"))
        state[prefix + "gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        state[prefix + "down_proj"] = torch.stack(down)
    model.load_state_dict(state)
    return model


@torch.no_grad()
def reference(model, rollout):
    """From one unpadded forward pass: logprobs float32 ``[response]``, experts int32 ``[seq, layers, k]``, router logits by layer."""
    prompt = rollout.prompt.token_ids
    out = model(torch.tensor([prompt + rollout.token_ids]), output_router_logits=True)
    logprobs = out.logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
    experts = torch.stack([logits.softmax(-1).topk(TOP_K).indices for logits in out.router_logits], dim=1).to(torch.int8)
    return logprobs, experts


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch", [256, 12, 3])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_float32_logprobs_and_routing_equal_transformers(max_batch, norm_topk_prob, monkeypatch):
    drops = []
    original = KVCache.keep_rows
    monkeypatch.setattr(KVCache, "keep_rows", lambda cache, rows: (drops.append(len(rows)), original(cache, rows)))
    engine = fitted(BF16 | ROUTED | {"max_batch": max_batch}, norm_topk_prob=norm_topk_prob)
    rollouts = engine.generate(make_prompts([1, 9, 4, 12, 4, 1, 7]), SamplingParams(4, 24))
    assert drops and len({len(r.token_ids) for r in rollouts}) > 3  # rows ended at different times and were dropped
    model = reference_model(norm_topk_prob=norm_topk_prob)
    for rollout in rollouts:
        logprobs, experts = reference(model, rollout)
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), logprobs, rtol=0, atol=1e-5)
        assert rollout.routed_experts.dtype == torch.int8
        assert rollout.routed_experts.shape == (len(rollout.prompt.token_ids) + len(rollout.token_ids) - 1, LAYERS, TOP_K)
        assert torch.equal(rollout.routed_experts, experts[:-1])


def test_samples_share_the_routing_of_their_prompt():
    rollouts = fitted(FP8 | ROUTED, torch.bfloat16).generate(make_prompts([8, 3]), SamplingParams(3, 6))
    for group, length in ((rollouts[:3], 8), (rollouts[3:], 3)):
        assert all(torch.equal(r.routed_experts[:length], group[0].routed_experts[:length]) for r in group)
    batch = assemble(rollouts, torch.zeros(6), torch.zeros(6))
    assert batch.routed_experts.shape == (*batch.tokens.shape, LAYERS, TOP_K)
    fed = torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None] - 1
    assert torch.equal((batch.routed_experts >= 0).all(-1).all(-1), fed)


@pytest.mark.parametrize("rollout", [BF16, FP8])
def test_asking_for_the_routing_changes_nothing_else(rollout):
    prompts, sampling = make_prompts([5, 2]), SamplingParams(3, 10)
    without = fitted(rollout, torch.bfloat16).generate(prompts, sampling)
    with_routing = fitted(rollout | ROUTED, torch.bfloat16).generate(prompts, sampling)
    assert all(r.routed_experts is None for r in without)
    assert [(r.token_ids, r.rollout_logprobs) for r in without] == [(r.token_ids, r.rollout_logprobs) for r in with_routing]


def test_one_token_responses_carry_their_prompts_routing():
    (rollout,) = fitted(BF16 | ROUTED).generate(make_prompts([5]), SamplingParams(1, 1))
    assert torch.equal(rollout.routed_experts, reference(reference_model(), rollout)[1][:5])


def test_responses_do_not_depend_on_the_batch():
    prompts = make_prompts([5, 2, 11, 8])
    together = fitted().generate(prompts, SamplingParams(3, 20, seed=5))
    alone = [r for p in prompts for r in fitted(BF16 | {"max_batch": 2}).generate([p], SamplingParams(3, 20, seed=5))]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


# --- FP8 --------------------------------------------------------------------------------------------------------------


def filled_fp8_experts(architecture, seed=0):
    """`QuantizedExperts` with random weights, and what was put in by name."""
    generator = torch.Generator().manual_seed(seed)
    plain = Experts(architecture, torch.bfloat16)
    prefix = "model.layers.0.mlp.experts."
    weights = [(prefix + name, torch.randn(t.shape, generator=generator).bfloat16()) for name, t in plain.named_tensors()]
    pushed = {name.removeprefix(prefix): tensor for name, tensor in quantize_bucket(weights)}
    experts = QuantizedExperts(architecture)
    names = dict(experts.named_tensors())
    assert names.keys() == pushed.keys()
    for name, tensor in pushed.items():
        names[name].copy_(tensor)
    experts.refresh()
    return experts, pushed


def fp8_matmul(x, q, scale_inv):
    """One 128-column group after the other, scales applied to each group's sum: float32 ``[..., out]``."""
    total = torch.zeros(*x.shape[:-1], len(q))
    for start in range(0, x.shape[-1], 128):
        group = x[..., start : start + 128].float()
        scale = group.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
        products = (group / scale).to(E4M3).float() @ q[:, start : start + 128].float().T
        total += products * scale * scale_inv[:, start // 128].repeat_interleave(128)[: len(q)]
    return total


@pytest.mark.parametrize(("hidden", "size", "tokens"), [(128, 64, 1), (128, 128, 40), (160, 136, 9), (256, 384, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_experts_equal_a_plain_reference(hidden, size, tokens, dtype):
    architecture = Architecture(**(SMALL | {"hidden_size": hidden, "moe_intermediate_size": size}))
    experts, pushed = filled_fp8_experts(architecture)
    torch.manual_seed(1)
    x = torch.randn(tokens, hidden).to(dtype)
    probs, chosen = torch.randn(tokens, EXPERTS).softmax(-1).topk(TOP_K)
    expected = torch.zeros(tokens, hidden)
    for token in range(tokens):
        for prob, e in zip(probs[token], chosen[token].tolist(), strict=True):
            gate, up = (
                fp8_matmul(x[token], pushed[f"{e}.{k}_proj.weight"], pushed[f"{e}.{k}_proj.weight_scale_inv"]).to(dtype)
                for k in ("gate", "up")
            )
            inner = F.silu(gate) * up
            expected[token] += prob * fp8_matmul(inner, pushed[f"{e}.down_proj.weight"], pushed[f"{e}.down_proj.weight_scale_inv"])
    got = experts(x, chosen, probs)
    assert got.dtype == dtype
    # float32 sums in another order now and then move a value across an E4M3 or BF16 rounding edge: one grid step of one term.
    error = (got.float() - expected).norm() / expected.norm()
    assert error < (2e-3 if dtype == torch.float32 else 4e-3)
    for e in range(EXPERTS):
        down = dequantize_block(pushed[f"{e}.down_proj.weight"], pushed[f"{e}.down_proj.weight_scale_inv"])
        assert torch.equal(experts.dequantized_down[e], down)


def test_unchosen_experts_do_not_matter():
    architecture = Architecture(**SMALL)
    experts = Experts(architecture, torch.float32)
    torch.manual_seed(0)
    experts.gate_up.normal_()
    experts.down.normal_()
    experts.down[[0, 1, 3, 5]] = float("nan")
    x, chosen, probs = torch.randn(7, 32), torch.tensor([[4, 2]]).expand(7, 2), torch.tensor([[0.75, 0.25]]).expand(7, 2)
    expected = sum(
        p * F.linear(F.silu(F.linear(x, experts.gate_up[e, 0])) * F.linear(x, experts.gate_up[e, 1]), experts.down[e])
        for e, p in ((4, 0.75), (2, 0.25))
    )
    torch.testing.assert_close(experts(x, chosen, probs), expected, rtol=1e-4, atol=1e-3)


def test_fp8_engine_is_close_to_float32_but_not_equal():
    model = reference_model()
    rollouts = fitted(FP8, torch.bfloat16).generate(make_prompts([5, 9, 3]), SamplingParams(4, 12, seed=1))
    gaps = torch.cat([torch.tensor(r.rollout_logprobs) - reference(model, r)[0] for r in rollouts])
    assert 1e-4 < gaps.abs().mean() < 0.3


# --- updates and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rollout", "dtype"), [(BF16, torch.bfloat16), (BF16, torch.float32), (FP8, torch.bfloat16)])
def test_state_is_bit_identical_to_what_was_pushed(rollout, dtype):
    engine = make_engine(rollout | {"kv_cache": "bf16"}, dtype)
    addresses = {name: t.data_ptr() for name, t in engine.state_tensors().items()}
    for seed in (0, 1):
        pushed = make_weights(dtype, seed)
        if rollout is FP8:
            pushed = quantize_bucket(pushed)
        engine.update_weights(([item] for item in reversed(pushed)), seed)
        state = engine.state_tensors()
        assert state.keys() == dict(pushed).keys()
        for name, tensor in pushed:
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert addresses == {name: t.data_ptr() for name, t in engine.state_tensors().items()}  # copied in place


def test_names_and_types_are_those_of_a_checkpoint():
    state = make_engine(FP8, torch.bfloat16).state_tensors()
    layer = {name.removeprefix("model.layers.1.mlp."): t.dtype for name, t in state.items() if name.startswith("model.layers.1.mlp.")}
    assert layer.pop("gate.weight") == torch.bfloat16
    expected = {f"experts.{e}.{kind}_proj.weight" for e in range(EXPERTS) for kind in ("gate", "up", "down")}
    assert {name for name, dtype in layer.items() if dtype == E4M3} == expected
    assert {name for name, dtype in layer.items() if dtype == torch.float32} == {name + "_scale_inv" for name in expected}


UP = "model.layers.1.mlp.experts.3.up_proj.weight"
ROUTER = "model.layers.0.mlp.gate.weight"


def _without(weights, name):
    return [(n, t) for n, t in weights if n != name]


def _replaced(weights, name, tensor):
    return [*_without(weights, name), (name, tensor)]


@pytest.mark.parametrize(
    ("rollout", "change", "message"),
    [
        (BF16, lambda w: _without(w, UP), f"{UP}: missing"),
        (BF16, lambda w: _without(w, ROUTER), f"{ROUTER}: missing"),
        (BF16, lambda w: [*w, (UP.replace(".3.", ".6."), dict(w)[UP])], "experts.6.up_proj.weight: the model has no such"),
        (BF16, lambda w: [*w, ("model.layers.0.mlp.experts.down_proj", torch.zeros(6, 32, 24))], "experts.down_proj: the model has no"),
        (BF16, lambda w: [*w, ("model.layers.0.mlp.up_proj.weight", torch.zeros(48, 32))], "mlp.up_proj.weight: the model has no such"),
        (BF16, lambda w: [*w, (UP, dict(w)[UP])], f"{UP}: arrived twice"),
        (BF16, lambda w: _replaced(w, UP, torch.zeros(32, 24)), rf"{UP}: got .*\[32, 24\], expected .*\[24, 32\]"),
        (BF16, lambda w: _replaced(w, UP, torch.zeros(24, 32).bfloat16()), f"{UP}: got torch.bfloat16"),
        (BF16, lambda w: [*w, (UP + "_scale_inv", torch.ones(1, 1))], f"{UP}_scale_inv: the engine has no such weight scale"),
        (FP8, lambda w: w, "got torch.float32 .*expected torch.float8_e4m3fn"),
        (FP8, lambda w: _without(quantize_bucket(w), UP + "_scale_inv"), f"{UP}_scale_inv: missing"),
        (FP8, lambda w: _replaced(quantize_bucket(w), ROUTER, torch.zeros(6, 32).to(E4M3)), f"{ROUTER}: got torch.float8_e4m3fn"),
    ],
)
def test_bad_updates_are_refused_and_leave_no_weights(rollout, change, message):
    engine = fitted(rollout)
    with pytest.raises(ValueError, match=message):
        engine.update_weights([change(make_weights())], 1)
    assert engine.version == -1
    good = make_weights()
    engine.update_weights([good if rollout is BF16 else quantize_bucket(good)], 2)
    assert engine.version >= 0


def test_routed_experts_of_a_dense_model_are_an_error():
    with pytest.raises(ConfigError, match="rollout.return_routed_experts=true: model.architecture.model_type=qwen3 "):
        build_config({"model": {"architecture": DENSE}, "rollout": ROUTED})
    build_config({"model": {"architecture": SMALL}, "rollout": ROUTED | {"max_response_tokens": 8}})
    with pytest.raises(ValueError, match="rollout.return_routed_experts=true: model_type=qwen3 "):
        LocalEngine(Architecture(**DENSE), RolloutConfig(**ROUTED), eos_ids=(EOS,), pad_id=0, device="cpu")


def test_corrupt_weights_are_named_by_prompt():
    engine = make_engine(FP8 | ROUTED)
    weights = make_weights()
    bad = _replaced(weights, ROUTER, torch.full((EXPERTS, 32), 3e38))
    engine.update_weights([quantize_bucket(bad)], 3)
    with pytest.raises(RuntimeError, match="prompt 0.*weight version 3"):
        engine.generate(make_prompts([4]), SamplingParams(2, 4))


@pytest.mark.parametrize("size", ["hidden_size", "moe_intermediate_size"])
def test_sizes_the_experts_kernel_cannot_take_are_named(size):
    with pytest.raises(ValueError, match=f"{size}=36.* must be multiples of 8"):
        make_engine(**{size: 36})
