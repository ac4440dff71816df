"""The diffusion sampler against LLaDA's algorithm written out for one row, and likelihoods of engine and trainer under the same masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ais_megatron.algorithm.ais import product_coefficient
from ais_megatron.algorithm.correction import Correction
from ais_megatron.algorithm.diagnostics import diagnose
from ais_megatron.algorithm.masking import mask_generator
from ais_megatron.algorithm.scaler import LossScaler
from ais_megatron.batch import Prompt, Rollout, assemble
from ais_megatron.config import AISConfig, Architecture, RolloutConfig
from ais_megatron.quantization.fp8 import quantize_bucket
from ais_megatron.rollout.engine import Denoising, SamplingParams
from ais_megatron.rollout.local.engine import LocalEngine
from ais_megatron.rollout.sampling import response_seed
from tests.helpers.llada import MASK, SIZES, make_llada, reference_logits, reference_model
from tests.helpers.policies import make_config, make_policy
from tests.helpers.ranks import RankPool

EOS, SIZE = 1, 12
PROMPTS = [Prompt(i, "", tuple(range(3 + i, 3 + i + length)), {}) for i, length in enumerate((4, 9, 1))]
DENOISING = Denoising(
    block_length=6,
    steps_per_block=4,
    remasking="low_confidence",
    likelihood="one_step",
    likelihood_temperature=1.0,
    num_views=2,
    prompt_mask=0.3,
)
SAMPLING = SamplingParams(num_samples=2, max_tokens=SIZE, temperature=0.9, seed=3, denoising=DENOISING)


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llada(tmp_path_factory.mktemp("llada"))


def make_engine(folder: Path, quantization: str = "none", dtype: torch.dtype = torch.float32, max_batch: int = 256) -> LocalEngine:
    rollout = RolloutConfig(quantization=quantization, kv_cache="none", max_batch=max_batch)
    engine = LocalEngine(Architecture(**SIZES), rollout, eos_ids=(EOS,), pad_id=0, device="cpu", dtype=dtype)
    weights = [(name, tensor.to(dtype)) for name, tensor in load_file(folder / "model.safetensors").items()]
    engine.update_weights([weights if quantization == "none" else quantize_bucket(weights)], 0)
    return engine


@torch.no_grad()
def reference_canvas(folder: Path, prompt: Prompt, sample: int, sampling: SamplingParams) -> tuple[list[int], list[int]]:
    """LLaDA's sampler for one row, and the step in which each token was revealed."""
    model, generator = reference_model(folder), torch.Generator().manual_seed(response_seed(sampling, prompt.index, sample))
    x = torch.tensor([[*prompt.token_ids, *[MASK] * sampling.max_tokens]])
    start, denoising, revealed = len(prompt.token_ids), sampling.denoising, {}
    for block in range(sampling.max_tokens // denoising.block_length):
        first = start + block * denoising.block_length
        columns = range(first, first + denoising.block_length)
        share, rest = divmod(denoising.block_length, denoising.steps_per_block)
        for step in range(denoising.steps_per_block):
            z = (
                model(x, attention_mask=torch.zeros(1, 1, x.shape[1], x.shape[1]))
                .logits[0, first : first + denoising.block_length]
                .double()
            )
            weights = z.exp()
            weights[:, MASK] = 0.0
            if sampling.temperature:
                u = torch.rand(z.shape, generator=generator, dtype=torch.float64)
                weights = weights / (-u.log()) ** sampling.temperature
            token, confidence = weights.argmax(-1), z.softmax(-1)
            confidence = confidence.gather(1, token[:, None])[:, 0]
            if denoising.remasking == "random":
                confidence = torch.rand(len(columns), generator=generator, dtype=torch.float64)
            masked = [i for i in columns if x[0, i] == MASK]
            for i in sorted(masked, key=lambda i: -float(confidence[i - first]))[: share + (step < rest)]:
                x[0, i], revealed[i - start] = token[i - first], block * denoising.steps_per_block + step
    return x[0, start:].tolist(), [revealed[i] for i in range(sampling.max_tokens)]


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_canvases_are_those_of_lladas_sampler(llada: Path, remasking: str, temperature: float) -> None:
    """Six tokens in four steps: two, two, one and one. Prompts of several lengths share a pass."""
    sampling = replace(SAMPLING, temperature=temperature, denoising=replace(DENOISING, remasking=remasking))
    rollouts = make_engine(llada).generate(PROMPTS, sampling)
    assert [r.prompt.index for r in rollouts] == [0, 0, 1, 1, 2, 2]
    for number, rollout in enumerate(rollouts):
        expected, steps = reference_canvas(llada, rollout.prompt, number % 2, sampling)
        assert list(rollout.canvas.token_ids) == expected and list(rollout.canvas.reveal_steps) == steps
        assert MASK not in expected and sorted(steps) == [0, 0, 1, 1, 2, 3, 4, 4, 5, 5, 6, 7]
        end = expected.index(EOS) + 1 if EOS in expected else SIZE
        assert rollout.token_ids == tuple(expected[:end]) and rollout.finish_reason == ("stop" if EOS in expected else "length")
        assert len(rollout.rollout_logprobs) == end
    assert temperature == 0.0 or len({r.canvas.token_ids for r in rollouts}) == 6


def test_a_response_does_not_depend_on_its_batch(llada: Path) -> None:
    together, apart = (make_engine(llada, max_batch=size).generate(PROMPTS, SAMPLING) for size in (256, 1))
    assert [r.canvas.token_ids for r in together] == [r.canvas.token_ids for r in apart]
    for mine, other in zip(together, apart, strict=True):
        for view, same in zip(mine.canvas.views, other.canvas.views, strict=True):
            assert torch.equal(view.hidden, same.hidden) and (view.logprobs - same.logprobs).abs().max() < 1e-5


def rows_of(rollouts: list[Rollout]):  # noqa: ANN201
    return assemble(rollouts, torch.zeros(len(rollouts)), torch.linspace(-1, 1, len(rollouts)))


@pytest.mark.parametrize("likelihood", ["one_step", "trajectory"])
def test_a_view_scores_the_right_tokens_under_the_right_mask(llada: Path, likelihood: str) -> None:
    """Two views of six responses are twelve rows, whose log-probabilities are those of the twin on the same inputs."""
    denoising = replace(DENOISING, likelihood=likelihood, likelihood_temperature=1.0 if likelihood == "one_step" else 0.9)
    rollouts = make_engine(llada).generate(PROMPTS, replace(SAMPLING, denoising=denoising))
    batch = rows_of(rollouts)
    assert len(batch) == 12 and batch.lengths.tolist() == [16] * 4 + [21] * 4 + [13] * 4
    logits = reference_logits(llada, batch.read, batch.lengths) / denoising.likelihood_temperature
    expected = logits.log_softmax(-1).gather(2, batch.tokens[..., None]).squeeze(2) * batch.loss_mask
    assert (batch.rollout_logprobs - expected).abs().max() < 1e-4
    assert (batch.read[batch.loss_mask] == MASK).all() and (batch.read != batch.tokens).any()
    scored = [batch.loss_mask[2 * i : 2 * i + 2].sum().item() for i in range(6)]
    if likelihood == "one_step":
        assert scored == [2 * len(r.token_ids) for r in rollouts] and batch.repeats.unique().tolist() == [1]
        first = mask_generator(SAMPLING.seed, 0, 0)
        assert torch.equal(batch.read[0, :4] == MASK, torch.rand(2, 4, generator=first)[0] < 0.3)
    else:
        for i, rollout in enumerate(rollouts):
            steps = torch.tensor(rollout.canvas.reveal_steps[: len(rollout.token_ids)])
            assert batch.repeats[2 * i] == max(len(steps.unique()), 2)


def agreement(rank: int, path: Path, likelihood: str, layout: dict[str, object]) -> None:
    """float32: engine and trainer are the same policy under the same masks, so every weight is exactly 1."""
    from ais_megatron.session import denoising
    from ais_megatron.weight_sync import WeightSync

    diffusion = {"block_length": 6, "steps": 8, "likelihood": likelihood, "masks": 1 if likelihood == "trajectory" else 2}
    rollout = {"quantization": "none", "max_response_tokens": SIZE, "temperature": 0.9}
    config = make_config(path, diffusion=diffusion, rollout=rollout, **layout)
    policy, engine = make_policy(config, path, temperature=config.likelihood_temperature), make_engine(path)
    WeightSync(policy, engine, config.rollout).push(None, version=1)
    rollouts = engine.generate(PROMPTS, replace(SAMPLING, denoising=denoising(config, config.rows_per_response)))
    batch = rows_of(rollouts)
    old_logprobs = policy.logprobs(batch)
    assert ((old_logprobs - batch.rollout_logprobs) * batch.loss_mask).abs().max() < 1e-5
    diagnostics = diagnose(old_logprobs, batch.rollout_logprobs, batch.advantages, batch.loss_mask, Correction())
    alpha = product_coefficient(diagnostics, AISConfig())
    assert 0.0 <= alpha < 1e-6 and abs(diagnostics.weight_reliability - 1.0) < 1e-9
    weights = LossScaler(alpha, "token").factors(old_logprobs, batch.rollout_logprobs, batch.loss_mask).policy
    assert torch.equal(weights, batch.loss_mask.float())


@pytest.mark.parametrize("likelihood", ["one_step", "trajectory"])
@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sp": True}], ids=["TP1", "TP2+SP"])
def test_at_equal_precision_every_weight_is_one(ranks: RankPool, llada: Path, likelihood: str, layout: dict[str, object]) -> None:
    ranks.run(2 if layout else 1, agreement, path=llada, likelihood=likelihood, layout=layout)


def test_an_fp8_engine_is_close_but_not_equal(llada: Path) -> None:
    """Under the same masks. Its linear layers are quantised, so it holds E4M3 under LLaDA's names."""
    engine = make_engine(llada, "fp8_e4m3", torch.bfloat16)
    state = engine.state_tensors()
    assert state["model.transformer.blocks.0.ff_out.weight"].dtype == torch.float8_e4m3fn
    assert "model.transformer.blocks.0.ff_out.weight_scale_inv" in state and "model.transformer.ff_out.weight_scale_inv" not in state
    batch = rows_of(engine.generate(PROMPTS, SAMPLING))
    logits = reference_logits(llada, batch.read, batch.lengths)
    expected = logits.log_softmax(-1).gather(2, batch.tokens[..., None]).squeeze(2) * batch.loss_mask
    distance = (batch.rollout_logprobs - expected)[batch.loss_mask].abs()
    assert 1e-3 < distance.mean() < 0.2


def gathered(rank: int, rollouts: list[Rollout]) -> tuple[Tensor, Tensor, Tensor]:
    """Rank 0 has no rows, and does not know that there are masked ones."""
    import torch.distributed as dist

    from ais_megatron.distributed import gather_batch

    batch = gather_batch(rows_of(rollouts if rank else []), dist.group.WORLD)
    return batch.tokens, batch.inputs, batch.repeats


def test_what_was_read_travels_with_a_batch(ranks: RankPool, llada: Path) -> None:
    denoising = replace(DENOISING, likelihood="trajectory")
    rollouts = make_engine(llada).generate(PROMPTS, replace(SAMPLING, denoising=denoising))
    batch = rows_of(rollouts)
    for tokens, inputs, repeats in ranks.run(2, gathered, rollouts=rollouts):
        assert torch.equal(tokens, batch.tokens) and torch.equal(inputs, batch.inputs) and torch.equal(repeats, batch.repeats)


def test_logits_that_are_not_finite_are_an_error(llada: Path) -> None:
    engine = make_engine(llada)
    engine.state_tensors()["model.transformer.ff_out.weight"].fill_(float("nan"))
    with pytest.raises(RuntimeError, match="prompt [012]: the logits are not finite"):
        engine.generate(PROMPTS, SAMPLING)
