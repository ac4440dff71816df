"""Rewards of the user's own: plain functions, async functions and services, at once and within time limits, and what their errors do."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from ais_megatron.config import ConfigError, TaskConfig, build_config
from ais_megatron.tasks import Attempt, Reward, concurrent, judge_all, make_task, reward_service
from ais_megatron.tasks.own_reward import RewardedTask

KEY = "task.reward=mine:judge"
Answer = Callable[[dict[str, Any]], Awaitable[web.Response]]


def task_with(function: Callable[..., Any], **settings: Any) -> RewardedTask:
    problem = SimpleNamespace(where="train.jsonl:7")
    inner = SimpleNamespace(train_problem=lambda index: problem, test_problems=lambda num: [problem] * num)
    return RewardedTask(inner, function, KEY, TaskConfig(reward=f"{__name__}:judges_plainly", **settings))


def attempts(*responses: str) -> list[Attempt]:
    return [Attempt({"n": i}, text, "1+1?", i) for i, text in enumerate(responses)]


# --- functions ---------------------------------------------------------------------------------------------------------


def test_an_async_function_judges_many_at_once_and_in_order() -> None:
    running = most = 0

    async def judge(truth: Mapping[str, Any], response: str, options: Mapping[str, Any]) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02 * (7 - truth["n"]))  # the last one is the first to be ready
        running -= 1
        return truth["n"] / options["by"]

    task = task_with(judge, reward_concurrency=3, options={"by": 8})
    assert [reward.value for reward in judge_all(task, attempts(*"abcdefg"))] == [i / 8 for i in range(7)]
    assert most == 3
    assert task.reward({"n": 4}, "a") == Reward(0.5, True, False)
    assert judge_all(task, []) == []


def test_clients_of_an_async_function_survive_between_batches() -> None:
    loops = set()

    async def judge(truth: Mapping[str, Any], response: str, options: Mapping[str, Any]) -> float:
        loops.add(id(asyncio.get_running_loop()))
        return 1.0

    task = task_with(judge)
    task.rewards(attempts("a"))
    task.rewards(attempts("b"))
    assert len(loops) == 1


async def judges_slowly(truth: Mapping[str, Any], response: str, options: Mapping[str, Any]) -> float:
    if response == "slow":
        await asyncio.sleep(600)
    if response == "error":
        raise KeyError(response)
    return float(response)


def judges_plainly(truth: Mapping[str, Any], response: str, options: Mapping[str, Any]) -> float:
    if response == "error":
        raise KeyError(response)
    return float(response)


@pytest.mark.parametrize("function", [judges_plainly, judges_slowly])
def test_the_error_of_a_function_names_the_response_and_its_row(function: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match=rf"^{KEY}: raised KeyError: 'error' for the response 'error' to prompt 1 \(train.jsonl:7\)"):
        task_with(function).rewards(attempts("1", "error"))
    with pytest.raises(ValueError, match=rf"^{KEY}: returned nan for the response 'nan' to held-out prompt 2 \(train.jsonl:7\)"):
        task_with(function).rewards([Attempt({}, "nan", index=-3)])


def test_a_function_that_never_returns_is_ended() -> None:
    started = time.monotonic()
    message = rf"^{KEY}: did not return within task.reward_timeout_s=0.2 for the response 'slow' to prompt 1 "
    with pytest.raises(RuntimeError, match=message):
        task_with(judges_slowly, reward_timeout_s=0.2).rewards(attempts("1", "slow", "1"))
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("function", [judges_plainly, judges_slowly])
def test_responses_that_cannot_be_judged_are_dropped(function: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    task = task_with(function, reward_errors="drop")
    with caplog.at_level(logging.WARNING):
        rewards = task.rewards(attempts("0.5", "nan", "error", "inf", "1"))
    assert [reward.is_missing for reward in rewards] == [False, True, True, True, False]
    assert rewards[0].value == 0.5 and rewards[4].correct and math.isnan(rewards[1].value) and not rewards[1].well_formed
    assert "raised KeyError" in rewards[2].reason
    (record,) = caplog.records
    assert record.getMessage().startswith(f"3 of 5 responses could not be judged and are left out; the first one: {KEY}: returned nan")


def test_an_async_function_that_blocks_the_loop_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrent, "GRACE_S", 0.3)
    done = threading.Event()

    async def blocks(truth: Mapping[str, Any], response: str, options: Mapping[str, Any]) -> float:
        done.wait(60)
        return 1.0

    with pytest.raises(RuntimeError, match="cannot be cancelled; an async function must await everything that waits"):
        task_with(blocks, reward_timeout_s=0.1, reward_errors="drop").rewards(attempts("a"))
    assert task_with(judges_slowly, reward_timeout_s=30).rewards(attempts("1"))[0].correct, "the next batch has a new loop"
    done.set()


# --- services ----------------------------------------------------------------------------------------------------------


class Service:
    """A server on a free port, in a thread. `answer` gets the body of each request."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.running = self.most = 0
        self.answer: Answer = reply({"reward": 1.0})
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)

    async def _open(self) -> None:
        app = web.Application()
        app.router.add_post("/reward", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/reward"

    async def _handle(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        self.headers.append(request.headers)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await self.answer(self.bodies[-1])
        finally:
            self.running -= 1

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)


def reply(body: Any, status: int = 200, **headers: str) -> Answer:
    async def answer(_: dict[str, Any]) -> web.Response:
        text = body if isinstance(body, str) else json.dumps(body)
        return web.Response(text=text, status=status, headers=headers)

    return answer


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(reward_service, "FIRST_WAIT_S", 0.01)
    monkeypatch.delenv("AIS_REWARD_KEY", raising=False)
    made = Service()
    yield made
    made.close()


def served(service: Service, **settings: Any) -> RewardedTask:
    made = make_task(TaskConfig(reward=service.url, **settings), 0)
    assert isinstance(made, RewardedTask)
    return made


def test_a_service_gets_the_response_and_gives_the_reward(service: Service) -> None:
    task = served(service, options={"by": 2})
    assert task.rewards([Attempt({"target": 6}, "\ud800 <answer>", "3 2 1=6:", 4)]) == [Reward(1.0, True, True)]
    assert service.bodies == [{"truth": {"target": 6}, "response": "\ud800 <answer>", "prompt": "3 2 1=6:", "options": {"by": 2}}]
    assert "Authorization" not in service.headers[0]
    service.answer = reply({"reward": 0.25, "well_formed": False, "correct": True, "reason": "why", "more": [1]})
    assert task.reward({}, "a") == Reward(0.25, False, True, "why")


def test_a_slow_service_is_asked_about_many_responses_at_once(service: Service) -> None:
    async def slow(body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(0.3)
        return web.json_response({"reward": body["truth"]["n"]})

    service.answer = slow
    assert [reward.value for reward in served(service, reward_concurrency=4).rewards(attempts(*"abcdefgh"))] == list(range(8))
    assert service.most == 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_service_that_fails_for_a_while_is_asked_again(service: Service, status: int) -> None:
    async def third_time(body: dict[str, Any]) -> web.Response:
        return web.json_response({"reward": 0.5}, status=status if len(service.bodies) < 3 else 200)

    service.answer = third_time
    assert served(service, reward_retries=2).reward({}, "a").value == 0.5
    assert len(service.bodies) == 3


def test_a_service_that_hangs_is_given_up(service: Service) -> None:
    async def hang(body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(600)
        raise AssertionError

    service.answer = hang
    task = served(service, reward_timeout_s=0.2, reward_retries=1)
    with pytest.raises(
        RuntimeError, match=r"^task.reward=http.*: did not answer within task.reward_timeout_s=0.2 \(2 tries\) for the resp"
    ):
        task.reward({}, "a")
    assert len(service.bodies) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply("no such truth", 400), r"answered HTTP 400: 'no such truth' \(1 try\) for the response 'a'"),
        (reply("", 401), r"answered HTTP 401: '' \(1 try\); set the environment variable AIS_REWARD_KEY to a valid key"),
        (reply("", 302, Location="http://127.0.0.1:1/"), r"answered HTTP 302"),
        (reply("fine"), r"answered 'fine'; it must answer with a JSON object such as"),
        (reply([1.0]), r"answered '\[1.0\]'; it must"),
        (reply({"score": 1.0}), r"it must answer with a JSON object such as"),
        (reply({"reward": "1"}), r"it must answer with a JSON object such as"),
        (reply({"reward": 1, "correct": "yes"}), r"answered correct='yes'; it must be true or false"),
        (reply('{"reward": NaN}'), r"returned Reward\(value=nan"),
    ],
)
def test_a_wrong_answer_is_not_asked_for_again(service: Service, answer: Answer, message: str) -> None:
    service.answer = answer
    with pytest.raises((RuntimeError, ValueError), match=message):
        served(service).reward({}, "a")
    assert len(service.bodies) == 1


def test_a_service_that_is_gone_is_named(service: Service) -> None:
    task = served(service, reward_retries=1, reward_errors="drop")
    service.close()
    (reward,) = task.rewards(attempts("a"))
    assert reward.is_missing and "cannot be reached: " in reward.reason and "(2 tries) for the response 'a' to prompt 0" in reward.reason
    service._loop = asyncio.new_event_loop()  # so that the fixture has one to stop
    threading.Thread(target=service._loop.run_forever, daemon=True).start()


def test_the_key_is_sent_and_never_shown(service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("AIS_REWARD_KEY", "s3cret")
    task = served(service, reward_errors="drop")
    service.answer = reply("wrong", 403)
    with caplog.at_level(logging.DEBUG):
        reward = task.reward({}, "a")
    assert service.headers[0]["Authorization"] == "Bearer s3cret"
    assert "HTTP 403" in reward.reason and "s3cret" not in reward.reason + caplog.text + repr(task)
    monkeypatch.setenv("AIS_REWARD_KEY", "s3c\nret")
    with pytest.raises(ValueError, match=r"^AIS_REWARD_KEY: the key for task.reward=http.* has characters that no HTTP header can hold"):
        served(service)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("http://", "task.reward='http://': not a URL; write for example http://"),
        ("http:/example.org/reward", "not a URL"),
        ("https://example.org:many/", "not a URL"),
        ("http://example.org/a b", "not a URL"),
        ("https://me:s3cret@example.org/", "task.reward: the URL of example.org has a name or a password"),
    ],
)
def test_urls_are_checked_before_anything_starts(reward: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_config({"task": {"reward": reward}})
    assert "s3cret" not in str(caught.value)
