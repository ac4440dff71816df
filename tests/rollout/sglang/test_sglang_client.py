"""The client against servers that fail in every way we can think of."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch

from ais_megatron.batch import DROPPED, Prompt
from ais_megatron.distributed import Unavailable
from ais_megatron.rollout.engine import SamplingParams, WeightsLost
from ais_megatron.rollout.sglang import dispatch, patience
from ais_megatron.rollout.sglang.client import SGLangEngine
from tests.helpers.sglang import sglang_config
from tests.rollout.sglang.fake_server import RUN, FakeServer, response

PROMPTS = [Prompt(i, "", (10 + i, 3), {}) for i in range(6)]
TWO = SamplingParams(2, 4)


@pytest.fixture
def engine_of() -> Iterator[Callable[..., SGLangEngine]]:
    made: list[SGLangEngine] = []

    def make(fakes: list[FakeServer], kind: str = "dense", key: str | None = None, positions: int = 512, **sglang: Any) -> SGLangEngine:
        config = sglang_config(kind, **({"recovery_timeout_s": 1.0, "request_timeout_s": 5.0} | sglang))
        urls = [fake.url for fake in fakes]
        architecture = config.architecture.model_copy(update={"max_position_embeddings": positions})
        made.append(SGLangEngine(architecture, config.rollout, urls, eos_ids=(2,), dtype=torch.bfloat16, run_id=RUN, key=key))
        made[-1].update_weights([], 0)  # not the rank that pushes: it only learns the version
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def test_responses_stand_in_order_and_carry_their_version(servers, engine_of) -> None:
    one, two = servers(2)
    engine = engine_of([one, two])
    rollouts = engine.generate(PROMPTS, TWO)
    assert [r.prompt.index for r in rollouts] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert all((r.token_ids, r.rollout_logprobs, r.finish_reason, r.weight_version) == ((7, 2), (-0.5, -0.25), "stop", 0) for r in rollouts)
    assert one.asked + two.asked == Counter({10 + i: 2 for i in range(6)})
    assert set(one.asked) & set(two.asked) == set(), "a prompt's samples share a server, which then has the prefix"
    assert 2 <= len(one.asked) <= 4, "the load is spread"
    seeds = [body["sampling_params"]["sampling_seed"] for body in one.bodies + two.bodies]
    assert len(set(seeds)) == 12 and len({body["rid"] for body in one.bodies + two.bodies}) == 12


def test_requests_in_flight_are_bounded(servers, engine_of) -> None:
    (server,) = servers(1)
    server.delay_s = 0.05
    engine_of([server], max_concurrency=3).generate(PROMPTS, TWO)
    assert server.most_in_flight == 3


def test_what_the_response_says_becomes_the_rollout(servers, engine_of) -> None:
    (server,) = servers(1)
    spans = [{"version": f"{RUN}-0", "start": 0, "end": 1}, {"version": f"{RUN}-1", "start": 1, "end": 3}]
    routing = torch.arange(4 * 2 * 2, dtype=torch.int32)
    text = base64.b64encode(routing.numpy().tobytes()).decode()
    server.answer = lambda body: response([5, 6, 7], [-1.0, -2.0, -3.0], f"{RUN}-1", "length", weight_versions=spans, routed_experts=text)
    (rollout,) = engine_of([server], "moe").generate(PROMPTS[:1], SamplingParams(1, 3))
    assert rollout.finish_reason == "length"
    assert rollout.weight_version == 0 and rollout.version_spans == ((0, 1), (1, 2))
    assert torch.equal(rollout.routed_experts, routing.view(4, 2, 2).to(torch.int8))


@pytest.mark.parametrize(
    ("last", "reason", "expected"),
    [(2, "stop", "stop"), (4, "stop", "stop"), (4, "length", "stop"), (9, "length", "length"), (9, "stop", "stop")],
)
def test_any_end_of_sequence_token_ends_a_response(servers, last: int, reason: str, expected: str) -> None:
    """9 is none of ours. If the server stops there, the model's own files say that it ends a response."""
    (server,) = servers(1)
    server.answer = lambda body: response([7, last], [-0.5, -0.25], f"{RUN}-0", reason)
    config = sglang_config("dense", recovery_timeout_s=1.0)
    with closing(
        SGLangEngine(config.architecture, config.rollout, [server.url], eos_ids=(2, 4), dtype=torch.bfloat16, run_id=RUN)
    ) as engine:
        engine.update_weights([], 0)
        (rollout,) = engine.generate(PROMPTS[:1], SamplingParams(1, 2))
    assert server.bodies[0]["sampling_params"]["stop_token_ids"] == [2, 4]
    assert (rollout.token_ids, rollout.rollout_logprobs, rollout.finish_reason) == ((7, last), (-0.5, -0.25), expected)


@pytest.mark.parametrize("bad", [[None, -1.0], [float("inf"), -1.0], []])
def test_responses_without_usable_logprobs_are_dropped(servers, engine_of, bad: list[float | None]) -> None:
    (server,) = servers(1)
    good = response([7, 2], [-0.5, -0.25], f"{RUN}-0")

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        if body["input_ids"][0] != 12:
            return good
        found = response([7, 2], [-0.5, -0.25], f"{RUN}-0")
        found["meta_info"]["output_token_logprobs"] = [[value, 7, None] for value in bad]
        return found

    server.answer = answer
    rollouts = engine_of([server]).generate(PROMPTS, TWO)
    assert [r.prompt.index for r in rollouts if r.finish_reason == DROPPED] == [2, 2]
    assert all(r.token_ids == (3,) and r.rollout_logprobs == (0.0,) for r in rollouts if r.is_dropped)


def test_a_server_that_dies_is_replaced_by_the_other(servers, engine_of) -> None:
    one, two = servers(2)
    one.delay_s = 0.3
    engine = engine_of([one, two])
    threading.Timer(0.1, one.stop).start()
    rollouts = engine.generate(PROMPTS, TWO)
    assert len(rollouts) == 12 and not any(r.is_dropped for r in rollouts)
    assert two.asked == Counter({10 + i: 2 for i in range(6)}), "none lost, none doubled: what the dead one had begun never counted"
    one.start()


def test_a_restarted_server_gets_no_traffic_until_it_is_refitted(servers, engine_of) -> None:
    one, two = servers(2)
    one.version = "default"
    engine = engine_of([one, two])
    assert len(engine.generate(PROMPTS, TWO)) == 12 and not one.asked
    one.version = f"{RUN}-0"
    assert len(engine.generate(PROMPTS, TWO)) == 12 and one.asked


def restarting_at_the_fifth(server: FakeServer) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Let the server lose its weights at the fifth request. Returns its usual way to answer."""
    answer = server.answer

    def restarts(body: dict[str, Any]) -> dict[str, Any]:
        if sum(server.asked.values()) >= 5:
            server.version = "default"
        return answer(body)

    server.answer = restarts
    return answer


def test_when_the_only_server_restarts_the_call_can_be_continued(servers, engine_of) -> None:
    (server,) = servers(1)
    engine = engine_of([server], max_concurrency=1)
    answer = restarting_at_the_fifth(server)
    with pytest.raises(WeightsLost, match="no longer has this run's weights"):
        engine.generate(PROMPTS, TWO)
    server.answer, server.version = answer, f"{RUN}-1"
    engine.update_weights([], 1)
    rollouts = engine.generate(PROMPTS, TWO)
    assert [r.prompt.index for r in rollouts] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [r.weight_version for r in rollouts] == [0] * 4 + [1] * 8, "what was finished is kept"
    assert sum(server.asked.values()) == 13, "and asked for once; the fifth answer came from other weights"


HELD_OUT = [replace(prompt, index=-1 - prompt.index) for prompt in PROMPTS]


def test_an_evaluation_has_no_response_of_earlier_weights(servers, engine_of) -> None:
    """Held-out prompts come again with every version. What is left of an evaluation that failed must not count for the next one."""
    (server,) = servers(1)
    engine = engine_of([server], max_concurrency=1)
    answer = restarting_at_the_fifth(server)
    with pytest.raises(WeightsLost):
        engine.generate(HELD_OUT, TWO)
    server.answer, server.version = answer, f"{RUN}-1"
    engine.update_weights([], 1)
    assert [r.weight_version for r in engine.generate(HELD_OUT, TWO)] == [1] * 12


def test_a_step_and_an_evaluation_share_the_servers(servers, engine_of) -> None:
    one, two = servers(2)
    one.delay_s = two.delay_s = 0.1
    engine = engine_of([one, two], max_concurrency=2)
    with ThreadPoolExecutor(1) as thread:
        evaluation = thread.submit(engine.generate, HELD_OUT, TWO)
        step = engine.generate(PROMPTS, TWO)
        assert [r.prompt.index for r in evaluation.result()] == [-1 - i for i in range(6) for _ in range(2)]
    assert [r.prompt.index for r in step] == [i for i in range(6) for _ in range(2)]
    assert one.asked + two.asked == Counter({10 + i: 4 for i in range(6)}), "none lost, none doubled"


def test_a_hung_server_is_noticed_and_its_work_done_elsewhere(servers, engine_of, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "HEALTH_SECONDS", 0.1)
    monkeypatch.setattr(dispatch, "HEALTH_TIMEOUT", 0.2)
    one, two = servers(2)
    one.delay_s = two.delay_s = 0.2
    engine = engine_of([one, two], request_timeout_s=60.0)
    threading.Timer(0.1, lambda: setattr(one, "is_hung", True)).start()
    started = time.monotonic()
    assert len(engine.generate(PROMPTS, TWO)) == 12
    assert time.monotonic() - started < 20 and two.asked == Counter({10 + i: 2 for i in range(6)})


def test_a_response_of_32k_tokens_takes_its_time(servers, engine_of) -> None:
    """Its server works for four times as long as it may be silent. The answer has a megabyte."""
    (server,) = servers(1)
    tokens = [7 + i % 500 for i in range(32_767)] + [2]
    logprobs = [-0.5 - i / 7e5 for i in range(32_768)]
    server.delay_s, server.answer = 8.0, lambda body: response(tokens, logprobs, server.version)
    engine = engine_of([server], positions=40_000, request_timeout_s=2.0)
    started = time.monotonic()
    rollouts = engine.generate(PROMPTS[:2], SamplingParams(1, 32_768))
    assert time.monotonic() - started >= 8.0
    assert all(r.token_ids == tuple(tokens) and r.rollout_logprobs == tuple(logprobs) and r.finish_reason == "stop" for r in rollouts)
    assert server.asked == Counter({10: 1, 11: 1})


def test_a_request_may_wait_in_the_servers_queue(servers, engine_of) -> None:
    (server,) = servers(1)
    server.delay_s, server.slots = 0.5, asyncio.Semaphore(1)
    assert len(engine_of([server], request_timeout_s=1.0).generate(PROMPTS, SamplingParams(1, 4))) == 6
    assert server.asked == Counter({10 + i: 1 for i in range(6)}) and server.most_in_flight == 6


def test_a_full_queue_is_no_failure(servers, engine_of, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "QUEUE_SECONDS", 0.01)
    (server,) = servers(1)
    full = response([7], [-0.5], server.version, finish_reason={"type": "abort", "message": "The request queue is full."})
    server.answer = lambda body: full if server.asked[10] < 3 * dispatch.MAX_ATTEMPTS else response([7, 2], [-0.5, -0.5], server.version)
    (rollout,) = engine_of([server]).generate(PROMPTS[:1], SamplingParams(1, 4))
    assert rollout.token_ids == (7, 2) and server.asked[10] == 3 * dispatch.MAX_ATTEMPTS


def test_a_stuck_server_is_given_up_until_it_is_healthy(servers, engine_of, caplog: pytest.LogCaptureFixture) -> None:
    one, two = servers(2)
    one.delay_s = two.delay_s = 0.2
    one.is_stuck = True
    engine = engine_of([one, two], request_timeout_s=1.0)
    assert len(engine.generate(PROMPTS, TWO)) == 12
    assert f"{one.url} made no progress for 1 s (rollout.sglang.request_timeout_s)" in caplog.text
    assert two.asked == Counter({10 + i: 2 for i in range(6)})
    two.stop()
    with pytest.raises(Unavailable, match="no rollout server has answered for 1 s"):  # it answers questions, but is not healthy
        engine.generate(PROMPTS, TWO)
    one.is_stuck = False
    assert len(engine.generate(PROMPTS, TWO)) == 12


def test_a_request_that_an_idle_server_has_lost_is_repeated(servers, engine_of) -> None:
    (server,) = servers(1)
    server.forgets = 1
    assert len(engine_of([server], request_timeout_s=0.5).generate(PROMPTS, TWO)) == 12
    assert sum(server.asked.values()) == 13


def test_a_pause_is_no_lack_of_progress(servers, engine_of) -> None:
    (server,) = servers(1)
    server.delay_s = 0.5
    engine = engine_of([server], request_timeout_s=1.0)
    got: list[int] = []
    generation = threading.Thread(target=lambda: got.append(len(engine.generate(PROMPTS, TWO))))

    def buckets() -> Iterator[Any]:
        server.is_stuck = True
        time.sleep(2.5)
        server.is_stuck = False
        yield from ()

    generation.start()
    time.sleep(0.2)
    engine.update_weights(buckets(), 1)
    generation.join(20)
    assert got == [12] and sum(server.asked.values()) == 12


def test_an_sglang_without_activity_is_asked_for_its_health(servers, engine_of) -> None:
    (server,) = servers(1)
    server.failing, server.delay_s = {"v1/loads"}, 2.0
    assert len(engine_of([server], request_timeout_s=1.0).generate(PROMPTS, TWO)) == 12
    assert sum(server.asked.values()) == 12 and "health" in server.calls


def test_behind_a_router_the_servers_show_the_progress(servers, engine_of) -> None:
    server, router = servers(2)
    router.delay_s, router.failing = 2.0, {"v1/loads", "health"}
    engine = engine_of([server], router=router.url, servers=[server.url], request_timeout_s=1.0)
    threading.Thread(target=lambda: [time.sleep(0.1) or setattr(server, "tokens", i) for i in range(40)], daemon=True).start()
    assert len(engine.generate(PROMPTS[:1], TWO)) == 2 and sum(router.asked.values()) == 2


def test_all_servers_gone(servers, engine_of) -> None:
    (server,) = servers(1)
    engine = engine_of([server])
    server.stop()
    with pytest.raises(Unavailable, match=r"no rollout server has answered for 1 s \(http://127.*recovery_timeout_s"):
        engine.generate(PROMPTS, TWO)
    server.start()
    assert len(engine.generate(PROMPTS, TWO)) == 12


@pytest.mark.parametrize(
    ("status", "message"),
    [(400, "prompt 0: .*answered HTTP 400"), (500, "prompt .: 5 attempts failed, the last one: .*answered HTTP 500"), (401, "key_file")],
)
def test_refusals(servers, engine_of, status: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKOFF", 0.001)
    (server,) = servers(1)
    server.status = status
    with pytest.raises(RuntimeError, match=message):
        engine_of([server]).generate(PROMPTS[:1], SamplingParams(1, 4))
    server.status = 200


def test_a_passing_refusal_costs_nothing(servers, engine_of, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKOFF", 0.01)
    (server,) = servers(1)
    server.status = 503
    threading.Timer(0.02, lambda: setattr(server, "status", 200)).start()
    assert len(engine_of([server]).generate(PROMPTS, TWO)) == 12


def test_a_router_spreads_what_servers_are_fitted_with(servers, engine_of) -> None:
    server, router = servers(2)
    engine = engine_of([server], router=router.url, servers=[server.url])
    assert len(engine.generate(PROMPTS, TWO)) == 12
    assert sum(router.asked.values()) == 12 and not server.asked
    router.version = "default"
    with pytest.raises(WeightsLost, match="behind"):
        engine.generate(PROMPTS, TWO)


def test_the_key_is_sent(servers, engine_of) -> None:
    (server,) = servers(1)
    server.key = "secret"
    assert len(engine_of([server], key="secret").generate(PROMPTS, TWO)) == 12


class Nothing:
    """A transport of a push that never begins."""

    async def shut_down(self) -> None:
        pass


def test_the_start_waits_for_all_servers_and_says_so(servers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(patience, "EVERY_S", 0.0)
    one, two = servers(2)
    two.stop()
    config = sglang_config(device="cuda", startup_timeout_s=0.5)
    urls = [one.url, two.url]
    options = dict(eos_ids=(2,), dtype=torch.bfloat16, run_id=RUN, transport=Nothing())
    engine = SGLangEngine(config.architecture, config.rollout, urls, **options)
    try:
        with pytest.raises(Unavailable, match=rf"{two.url}.*gave up after 0.5 s; .* raise rollout.sglang.startup_timeout_s"):
            engine.update_weights([], 0)
    finally:
        engine.close()
        two.start()
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith(f"waiting for {two.url} for 0 s (at most 0 s, rollout.sglang.startup_timeout_s); {two.url}/model_info")
    assert "DeepGEMM" in said and one.url not in said


def test_after_a_failed_update_servers_have_to_be_healthy(servers) -> None:
    """One hangs in the broadcast that failed: it still answers /model_info."""
    one, two = servers(2)
    config = sglang_config(recovery_timeout_s=5.0)
    options = dict(eos_ids=(2,), dtype=torch.bfloat16, run_id=RUN, transport=Nothing())
    engine = SGLangEngine(config.architecture, config.rollout, [one.url, two.url], **options)
    engine._known = {one.url, two.url}
    two.failing = {"health"}
    try:
        found = {
            after_failure: [server.api.url for server in engine._run(engine._servers_to_update(False, after_failure))[0]]
            for after_failure in (False, True)
        }
    finally:
        engine.close()
    assert found == {False: [one.url, two.url], True: [one.url]}


def test_bad_calls(servers, engine_of) -> None:
    (server,) = servers(1)
    engine = engine_of([server])
    with pytest.raises(ValueError, match="prompt 3 has 2 tokens; with max_tokens=600 this exceeds max_position_embeddings=512"):
        engine.generate(PROMPTS[3:4], SamplingParams(1, 600))
    with pytest.raises(ValueError, match="version=-1"):
        engine.update_weights([], -1)
    engine.close()
    with pytest.raises(RuntimeError, match="is closed"):
        engine.generate(PROMPTS, TWO)
    engine.close()
