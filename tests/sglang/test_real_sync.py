"""Weights and KV scales on a real SGLang server, by every transport, compared with the embedded engine that got the same tensors."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from ais_megatron.batch import Bucket, Prompt
from ais_megatron.cluster.ports import free_port
from ais_megatron.config import Architecture, Config, build_config
from ais_megatron.quantization.fp8 import quantize_bucket
from ais_megatron.quantization.kv_scales import KVScales
from ais_megatron.rollout.engine import SamplingParams, WeightsLost
from ais_megatron.rollout.local.engine import LocalEngine
from ais_megatron.rollout.manifest import Manifest
from ais_megatron.rollout.sglang.client import SGLangEngine
from ais_megatron.rollout.sglang.server import SGLangServer
from ais_megatron.rollout.sglang.transports import make_transport
from tests.helpers.sglang import RunningServer, sglang_config

pytestmark = pytest.mark.sglang

EOS = 2
PROMPTS = [Prompt(i, "", tuple(5 + (37 * i + 11 * j) % 500 for j in range(6 + i)), {}) for i in range(4)]
SAMPLING = SamplingParams(4, 24, seed=3)
TRANSPORTS = ["tensor", "distributed", "disk"]


def weights(architecture: Architecture, seed: int = 0) -> Bucket:
    """Random BF16 weights that make a model with opinions: its logits spread by about 2 nats."""
    generator = torch.Generator().manual_seed(seed)
    plain = Manifest.of(
        architecture,
        build_config({"model": {"architecture": architecture.model_dump()}, "rollout": {"quantization": "none"}}).rollout,
        torch.bfloat16,
    )

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            return (0.3 * noise).bfloat16()
        if name.endswith("A_log"):
            return (noise - 2).bfloat16()  # states that remember about ten tokens
        if architecture.family.zero_centered_norms and name.endswith("norm.weight") and ".linear_attn." not in name:
            return (0.1 * noise).bfloat16()
        if len(shape) == 1:
            return (1 + 0.1 * noise).bfloat16()
        is_head = "lm_head" in name or ("embed" in name and architecture.tie_word_embeddings)
        return (noise * (2.0 * shape[1] ** -0.5 if is_head else 1.0 if "embed" in name else shape[1] ** -0.5)).bfloat16()

    return [(name, draw(name, shape)) for name, (shape, _) in plain._required.items()]


def scales(architecture: Architecture, factor: float = 1.0) -> Bucket:
    """Enough for the weights above, times `factor`; others in each layer."""
    layers = torch.arange(1.0, architecture.num_hidden_layers + 1)
    return list(KVScales(6 * factor * layers, 12 * factor * layers, layers).named_tensors(architecture.attention_layers))


def buckets(config: Config, seed: int = 0, factor: float = 1.0) -> list[Bucket]:
    """Three buckets of weights, as pushed, and one of scales."""
    bucket = weights(config.architecture, seed)
    if config.rollout.quantization != "none":
        bucket = quantize_bucket(bucket)
    third = len(bucket) // 3 + 1
    parts = [bucket[i : i + third] for i in range(0, len(bucket), third)]
    return [*parts, scales(config.architecture, factor)] if config.rollout.kv_cache_is_fp8 else parts


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., SGLangEngine]]:
    """``connect(server, transport="tensor", urls=None, **sglang)``: an engine without weights; closed at the end of the test.

    urls: of several servers with the same key.
    """
    made: list[SGLangEngine] = []

    def make(
        server: RunningServer, transport: str = "tensor", urls: list[str] | None = None, eos_ids: Sequence[int] = (EOS,), **sglang: Any
    ) -> SGLangEngine:
        section = server.config.rollout.sglang.model_dump() | {"transport": transport, "sync_dir": str(tmp_path / "sync")} | sglang
        rollout = server.config.rollout.model_dump() | {"sglang": section}
        config = build_config(server.config.model_dump() | {"rollout": rollout})
        run_id = secrets.token_hex(4)
        made.append(
            SGLangEngine(
                config.architecture,
                config.rollout,
                urls or [server.url],
                eos_ids=eos_ids,
                dtype=torch.bfloat16,
                run_id=run_id,
                key=server.key,
                transport=make_transport(config, torch.device("cpu"), run_id),
            )
        )
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def local(config: Config, seed: int = 0, factor: float = 1.0, **changes: Any) -> LocalEngine:
    """The embedded engine with the same weights; `changes` of the rollout section make it differ on purpose."""
    config = build_config(config.model_dump() | {"rollout": config.rollout.model_dump() | {"engine": "local"} | changes})
    engine = LocalEngine(config.architecture, config.rollout, eos_ids=(EOS,), pad_id=0, device="cpu")
    engine.update_weights(buckets(config, seed, factor), 0)
    return engine


def sampled_by(engine: LocalEngine) -> list[tuple[list[int], int, Tensor]]:
    """(prompt and response, length of the prompt, log-probabilities of the response) of some responses."""
    rollouts = engine.generate(PROMPTS, SAMPLING)
    return [([*r.prompt.token_ids, *r.token_ids], len(r.prompt.token_ids), torch.tensor(r.rollout_logprobs)) for r in rollouts]


def judged_by(engine: SGLangEngine, samples: list[tuple[list[int], int, Tensor]]) -> list[Tensor]:
    """What the server thinks of the same tokens."""
    (server,) = engine._servers

    async def judge(tokens: list[int], start: int) -> Tensor:
        answer = await server.api.generate(
            input_ids=tokens, sampling_params={"max_new_tokens": 1}, return_logprob=True, logprob_start_len=0
        )
        return torch.tensor([entry[0] for entry in answer["meta_info"]["input_token_logprobs"][start:]])

    async def judge_all() -> list[Tensor]:
        return list(await asyncio.gather(*(judge(tokens, start) for tokens, start, _ in samples)))

    return engine._run(judge_all())


def distance(engine: SGLangEngine, reference: LocalEngine) -> Tensor:
    """|difference of log-probabilities| of every token that `reference` sampled."""
    samples = sampled_by(reference)
    return torch.cat([(theirs - ours).abs() for theirs, (_, _, ours) in zip(judged_by(engine, samples), samples, strict=True)])


def checksums(engine: SGLangEngine) -> dict[str, str]:
    return engine._run(engine._servers[0].api.checksums())[0]


@pytest.mark.parametrize(("kind", "quantization"), [("dense", "fp8"), ("moe", "fp8"), ("dense", "bf16")])
def test_every_transport_brings_the_same_bytes(sglang_server, connect, kind: str, quantization: str) -> None:
    server = sglang_server(kind, quantization)
    found = []
    for transport in TRANSPORTS:
        engine = connect(server, transport)
        engine.update_weights(buckets(server.config), 0)  # checks by itself that every tensor was reached, and the scales obeyed
        found.append(checksums(engine))
        engine.close()
    assert found[0] == found[1] == found[2]
    embedding = dict(weights(server.architecture))["model.embed_tokens.weight"]
    assert found[0]["model.embed_tokens.weight"] == hashlib.sha256(embedding.view(torch.uint8).numpy().tobytes()).digest()[:8].hex()


@pytest.mark.parametrize("kind", ["dense", "moe", "llama", "qwen2", "qwen3_5"])
def test_the_server_agrees_with_the_local_engine(sglang_server, connect, kind: str) -> None:
    """Both emulate the same FP8 arithmetic in different programs. BF16 roundings that differ (the norms') flip a few per cent of
    the E4M3 roundings after them, so the engines agree within FP8's own noise, and better with each other than with BF16."""
    server = sglang_server(kind, "fp8")
    engine = connect(server)
    engine.update_weights(buckets(server.config), 0)
    same = distance(engine, local(server.config))
    unquantised = distance(engine, local(server.config, quantization="none", kv_cache="bf16"))
    print(f"{kind}: to FP8 {same.mean():.4f} (median {same.median():.4f}), to BF16 {unquantised.mean():.4f}")
    # A tied embedding is as small as a head, so the layers, and with them FP8's noise, are a larger share of the hidden states.
    assert same.median() < (0.15 if server.architecture.tie_word_embeddings else 0.1) and same.mean() < 0.95 * unquantised.mean()
    others = distance(engine, local(server.config, seed=1))
    assert others.median() > 1.0, "and this is what other weights look like"


def test_decoding_continues_the_states_of_prefill(sglang_server, connect) -> None:
    """A server's log-probabilities while it decodes, one token at a time, against those of one prefill of the same tokens. Responses run
    side by side, so each has to find its own state."""
    engine = connect(sglang_server("qwen3_5", "fp8"))
    engine.update_weights(buckets(sglang_server("qwen3_5", "fp8").config), 0)
    rollouts = engine.generate(PROMPTS, SAMPLING)
    samples = [([*r.prompt.token_ids, *r.token_ids], len(r.prompt.token_ids), torch.tensor(r.rollout_logprobs)) for r in rollouts]
    apart = torch.cat([(theirs - ours).abs() for theirs, (_, _, ours) in zip(judged_by(engine, samples), samples, strict=True)])
    print(f"decoding against prefill: {apart.mean():.4f} (median {apart.median():.4f}, of {len(apart)} tokens)")
    assert len(apart) > 100 and apart.median() < 0.02 and apart.mean() < 0.05


def test_any_end_of_sequence_token_ends_a_response_and_stays_in_it(sglang_server, connect) -> None:
    server = sglang_server("dense", "fp8")
    engine = connect(server)
    engine.update_weights(buckets(server.config), 0)
    tokens = Counter(token for r in engine.generate(PROMPTS, SAMPLING) for token in r.token_ids[:-1])
    others = {token for token, _ in tokens.most_common(40)} - {EOS}  # so many that a second sample surely has one of them
    engine = connect(server, eos_ids=(EOS, *others))
    engine.update_weights(buckets(server.config), 0)
    rollouts = engine.generate(PROMPTS, SAMPLING)
    assert not any(r.is_dropped for r in rollouts), "the last token has a log-probability too"
    assert all(not {EOS, *others} & set(r.token_ids[:-1]) for r in rollouts)
    assert any(r.token_ids[-1] in others for r in rollouts)
    assert all(r.finish_reason == ("stop" if r.token_ids[-1] in {EOS, *others} else "length") for r in rollouts)


def test_scales_are_those_that_were_pushed(sglang_server, connect) -> None:
    """Scales far too large leave the cache few values: server and local engine must lose the same ones."""
    server = sglang_server("dense", "fp8")
    engine = connect(server)
    fine, coarse = (local(server.config, factor=factor) for factor in (1.0, 5000.0))
    nears, fars = [], []
    for version, (factor, right, wrong) in enumerate(((1.0, fine, coarse), (5000.0, coarse, fine))):
        engine.update_weights(buckets(server.config, factor=factor), version)
        near, far = distance(engine, right), distance(engine, wrong)
        print(f"scales x {factor:g}: {near.mean():.4f} from the engine with these scales, {far.mean():.4f} from the one with the others")
        assert near.median() < 0.12
        nears.append(near.mean())
        fars.append(far.mean())
    assert sum(fars) > 1.15 * sum(nears)


def test_routing_is_what_the_local_engine_chose(sglang_server, connect) -> None:
    server = sglang_server("moe", "fp8")
    engine = connect(server)
    engine.update_weights(buckets(server.config), 4)
    rollouts = engine.generate(PROMPTS, SAMPLING)
    for rollout in rollouts:
        assert rollout.routed_experts.shape == (len(rollout.prompt.token_ids) + len(rollout.token_ids) - 1, 2, 2)
        assert rollout.weight_version == 4 and rollout.version_spans == ((4, len(rollout.token_ids)),)
    prompt_rows = [r.routed_experts[: len(r.prompt.token_ids)].sort(-1).values for r in rollouts[:: SAMPLING.num_samples]]
    chosen = local(server.config).generate(PROMPTS, SamplingParams(1, 1))
    reference = [r.routed_experts.sort(-1).values for r in chosen]
    agreeing = torch.cat([(a == b).all(-1).float() for a, b in zip(prompt_rows, reference, strict=True)])
    assert agreeing.mean() > 0.8  # near-ties fall either way


def test_a_bad_payload_is_never_sent(sglang_server, connect) -> None:
    server = sglang_server("dense", "fp8")
    engine = connect(server)
    engine.update_weights(buckets(server.config), 0)
    before = checksums(engine)
    with pytest.raises(ValueError, match=r"embed_tokens|q_proj.weight: got torch.bfloat16 .* expected torch.float8_e4m3fn"):
        engine.update_weights([weights(server.architecture, seed=1)], 1)
    assert checksums(engine) == before and engine.version == -1
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate(PROMPTS, SAMPLING)
    engine.update_weights(buckets(server.config, seed=1), 1)  # the server was left usable
    assert checksums(engine) != before and len(engine.generate(PROMPTS, SAMPLING)) == 16


def test_another_runs_weights_are_not_used(sglang_server, connect) -> None:
    server = sglang_server("dense", "fp8")
    one, other = connect(server), connect(server)
    one.update_weights(buckets(server.config), 0)
    other.update_weights(buckets(server.config, seed=1), 0)
    assert len(other.generate(PROMPTS, SAMPLING)) == 16
    with pytest.raises(WeightsLost):
        one.generate(PROMPTS, SAMPLING)
    one.update_weights(buckets(server.config), 0)
    assert len(one.generate(PROMPTS, SAMPLING)) == 16


@pytest.mark.parametrize(("quantization", "pause"), [("fp8", "retract"), ("bf16", "in_place")])
def test_an_update_under_load(sglang_server, connect, quantization: str, pause: str) -> None:
    """Responses in flight wait, take up again with the new weights, and say so; none is lost or doubled."""
    server = sglang_server("dense", quantization)
    engine = connect(server, pause=pause)
    engine.update_weights(buckets(server.config), 0)
    result: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: result.update(rollouts=engine.generate(PROMPTS, SamplingParams(8, 200, seed=1))))
    thread.start()
    thread.join(1.5)
    assert thread.is_alive(), "the update has to come while responses are being generated"
    engine.update_weights(buckets(server.config, seed=1), 1)
    thread.join(120)
    rollouts = result["rollouts"]
    assert [r.prompt.index for r in rollouts] == [i for i in range(4) for _ in range(8)]
    assert all(sum(count for _, count in r.version_spans) == len(r.token_ids) == len(r.rollout_logprobs) for r in rollouts)
    assert any([version for version, _ in r.version_spans] == [0, 1] for r in rollouts), [r.version_spans for r in rollouts]
    assert {r.weight_version for r in rollouts} <= {0, 1}


def test_closing_ends_what_is_in_flight(sglang_server, connect) -> None:
    server = sglang_server("dense", "fp8")
    engine, observer = connect(server), connect(server)
    engine.update_weights(buckets(server.config), 0)
    ended: list[str] = []

    def generate() -> None:
        try:
            engine.generate(PROMPTS, SamplingParams(8, 400))
        except BaseException as error:
            ended.append(type(error).__name__)

    thread = threading.Thread(target=generate)
    thread.start()
    thread.join(1.0)
    engine.close()
    thread.join(10)
    assert not thread.is_alive() and ended

    async def flush_cache() -> int:
        async with observer._session.post(f"{observer._servers[0].api.url}/flush_cache", json={}) as response:
            return response.status

    deadline = time.monotonic() + 10
    while observer._run(flush_cache()) != 200:  # refused as long as requests are running
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_scales_that_would_be_dropped_stop_the_run(connect, tmp_path: Path) -> None:
    """Without our plugin SGLang drops the scales and answers 200."""
    config = sglang_config(port=free_port(), env={"SGLANG_PLUGINS": "cpu_start,cpu_fp8_linear,cpu_fp8_kv_cache,cpu_routed_experts"})
    with SGLangServer(config, tmp_path / "server", config.rollout.sglang.port) as server:
        server.wait_until_healthy(300)
        engine = connect(RunningServer(server.url, None, config, config.architecture, server))
        with pytest.raises(RuntimeError, match=r"has no model.layers.0.self_attn.attn.k_scale, so .* plugin"):
            engine.update_weights(buckets(config), 0)
        assert engine.version == -1


def test_a_server_killed_in_the_middle_of_a_broadcast(sglang_server, connect, tmp_path: Path) -> None:
    """This process outlives it, the push ends with an error, and the next one reaches the server that is left."""
    survivor = sglang_server("dense", "fp8")
    settings = survivor.config.rollout.sglang.model_dump() | {"port": free_port(), "env": {}}
    config = build_config(survivor.config.model_dump() | {"rollout": survivor.config.rollout.model_dump() | {"sglang": settings}})
    with SGLangServer(config, tmp_path / "server", config.rollout.sglang.port) as victim:
        victim.wait_until_healthy(300)
        engine = connect(survivor, "distributed", urls=[survivor.url, victim.url])
        engine.update_weights(buckets(config), 0)
        joins = engine._transport._number
        assert joins == 1, "one group for the weights and for the checks of their scales"
        (first, *others) = buckets(config, seed=1)

        def killing() -> Iterator[Bucket]:
            yield first
            yield others[0]
            victim.stop()
            yield from others[1:]

        with pytest.raises(RuntimeError, match=victim.url):
            engine.update_weights(killing(), 1)
        assert engine.version == -1
        engine.update_weights(buckets(config, seed=1), 2)
        assert [server.api.url for server in engine._updated] == [survivor.url]
        assert engine._transport._number == 2 and len(engine.generate(PROMPTS, SAMPLING)) == 16


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_fifty_updates_leave_nothing_behind(sglang_server, connect, transport: str, tmp_path: Path) -> None:
    server = sglang_server("dense", "fp8")
    engine = connect(server, transport)
    family = [psutil.Process(), *psutil.Process(server.server._process.pid).children(recursive=True)]
    pushed = [buckets(server.config, seed) for seed in (0, 1)]

    def footprint() -> tuple[int, int, int]:
        gc.collect()
        shared = sum(1 for name in os.listdir("/dev/shm") if name.startswith("torch_"))
        return sum(p.memory_info().rss for p in family), sum(p.num_fds() for p in family), shared

    for version in range(10):
        engine.update_weights(pushed[version % 2], version)
    before = footprint()
    for version in range(10, 60):
        engine.update_weights(pushed[version % 2], version)
    after = footprint()
    assert after[0] - before[0] < 20 * 2**20, "memory"
    assert after[1] - before[1] <= 2 and after[2] <= before[2], "file descriptors, shared memory"
    assert len(list((tmp_path / "sync").glob("*"))) <= 1, "folders"
    assert len(engine.generate(PROMPTS, SAMPLING)) == 16
