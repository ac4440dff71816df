"""The broadcast transport against servers that fail or are slow: joins are counted, both sides leave at once, every wait has an end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp import web

from ais_megatron.rollout.sglang import broadcast, transport
from ais_megatron.rollout.sglang.api import Refused, ServerAPI
from ais_megatron.rollout.sglang.broadcast import Broadcast
from ais_megatron.rollout.sglang.checks import FLUSHES, check_scales
from ais_megatron.rollout.sglang.transport import WeightUpdate
from tests.rollout.sglang.fake_server import FakeServer, response

JOIN, LEAVE, UPDATE = "init_weights_update_group", "destroy_weights_update_group", "update_weights_from_distributed"
SCALES = [("model.layers.0.self_attn.attn.k_scale", torch.ones(1)), ("model.layers.0.self_attn.attn.v_scale", torch.ones(1))]


class Group:
    """Stands in for WeightGroup. hang: what never returns until `abort`. made: every group of a test, in order."""

    made: list[Group] = []
    hang: set[str] = set()
    met: threading.Barrier | None = None

    def __init__(self, address: str, port: int, world: int, name: str, backend: str, timeout_s: float) -> None:
        self.world, self.name, self.backend, self.calls = world, name, backend, list[str]()
        self.released = threading.Event()
        Group.made.append(self)

    def broadcast(self, flat: torch.Tensor) -> None:
        self._do("broadcast")

    def shut_down(self) -> None:
        if Group.met:
            Group.met.wait(10)
        self._do("shut_down")

    def abort(self) -> None:
        self.calls.append("abort")
        if "abort" not in Group.hang:
            self.released.set()
        else:
            threading.Event().wait()

    def _do(self, what: str) -> None:
        self.calls.append(what)
        if what in Group.hang and self.released.wait():
            raise RuntimeError("aborted")


class GroupServer(FakeServer):
    """A server whose answers can be made to fail, or to wait, by path; `moves` decides whether its scales matter."""

    def __init__(self) -> None:
        super().__init__()
        self.moves, self.factor = True, 1.0
        self.refused: set[str] = set()
        self.waits: dict[str, threading.Event] = {}
        self.meets: threading.Barrier | None = None

    async def _handle(self, request: web.Request) -> web.Response:
        path = request.match_info["path"]
        if path == LEAVE and self.meets:
            await asyncio.get_running_loop().run_in_executor(None, self.meets.wait, 10)
        while path in self.waits and not self.waits[path].is_set():
            await asyncio.sleep(0.01)
        if path in self.refused:
            self.calls.append(path)
            return web.json_response({"success": False, "message": "no such tensor"}, status=400)
        return await super()._handle(request)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        scaled_pushes = self.calls.count("end_weight_update")
        value = -0.6 if self.moves and scaled_pushes % 4 == 3 else -0.5  # the third of the four pushes of a check has FLUSHES
        tokens = [3] * body["sampling_params"]["max_new_tokens"]
        entries = [[None, token, None] if i == 0 else [value, token, None] for i, token in enumerate(body["input_ids"])]
        return response(tokens, [value] * len(tokens), "v", input_token_logprobs=entries)


@pytest.fixture
def servers() -> Iterator[Callable[[int], list[GroupServer]]]:
    made: list[GroupServer] = []
    yield lambda count: [made.append(GroupServer()) or made[-1] for _ in range(count)]
    for server in made:
        server.stop()


@pytest.fixture(autouse=True)
def groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "WeightGroup", Group)
    Group.made, Group.hang, Group.met = [], set(), None


def run(servers: list[GroupServer], work: Callable[[Broadcast, list[ServerAPI]], Coroutine[Any, Any, Any]], tp: int = 1) -> Any:
    async def main() -> Any:
        async with aiohttp.ClientSession() as session:
            return await work(Broadcast(tp, torch.device("cpu"), "run", 30.0), [ServerAPI(s.url, session, 30.0) for s in servers])

    return asyncio.run(main())


async def push(transport: Broadcast, apis: list[ServerAPI]) -> None:
    update = WeightUpdate(transport, apis, "retract", "run-0")
    await update.begin()
    await update.send(SCALES[:1])
    await update.end(SCALES[1:])


def test_a_first_sync_joins_once_for_all_servers(servers) -> None:
    """One push of weights, then four of scales: no group but the first."""
    fakes = servers(3)

    async def first_sync(transport: Broadcast, apis: list[ServerAPI]) -> None:
        await push(transport, apis)
        for fake in fakes:
            fake.calls.clear()
        await check_scales(apis, transport, SCALES, "run-0", 512)
        await push(transport, apis)

    run(fakes, first_sync, tp=2)
    assert [group.world for group in Group.made] == [1 + 2 * 3]
    assert all(JOIN not in fake.calls and fake.calls.count(UPDATE) == 4 + 2 for fake in fakes)
    assert Group.made[0].calls == ["broadcast"] * (2 + 4 + 2)


def test_each_server_is_judged_by_itself(servers) -> None:
    fakes = servers(3)
    fakes[1].moves = False

    async def check(transport: Broadcast, apis: list[ServerAPI]) -> None:
        await check_scales(apis, transport, SCALES, "run-0", 512)

    with pytest.raises(RuntimeError, match=rf"^{fakes[1].url}: pushed KV scales have no effect, even if they are {FLUSHES:g} times"):
        run(fakes, check)
    assert len(Group.made) == 1


def test_both_sides_leave_at_the_same_time(servers) -> None:
    """Each side waits until the other one is leaving too, as NCCL may: one after the other would never end."""
    fakes = servers(2)
    Group.met = fakes[0].meets = fakes[1].meets = threading.Barrier(3)

    async def work(transport: Broadcast, apis: list[ServerAPI]) -> None:
        await transport.open(apis)
        await transport.shut_down()

    run(fakes, work)
    assert Group.made[0].calls == ["shut_down"] and all(fake.calls == [JOIN, LEAVE] for fake in fakes)


def test_leaving_ends_even_if_nothing_returns(servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "LEAVE_S", 0.2)
    monkeypatch.setattr(broadcast, "LET_GO_S", 0.2)
    Group.hang = {"shut_down", "abort"}

    async def work(transport: Broadcast, apis: list[ServerAPI]) -> None:
        await transport.open(apis)
        await transport.open(apis[:1])
        assert transport._members == apis[:1]

    run(servers(2), work)
    assert [group.world for group in Group.made] == [3, 2] and Group.made[0].calls == ["shut_down", "abort"]


def test_a_server_that_fails_frees_those_that_wait_for_it(servers) -> None:
    """One refuses the bucket; the other, and our broadcast, wait for it until our side of the group is gone."""
    failing, waiting = fakes = servers(2)
    failing.refused = {UPDATE}
    Group.hang = {"broadcast"}

    async def work(transport: Broadcast, apis: list[ServerAPI]) -> None:
        await transport.open(apis)
        waiting.waits[UPDATE] = Group.made[0].released
        with pytest.raises(Refused, match=f"{failing.url}.*no such tensor"):
            await push(transport, apis)
        assert waiting.calls[-1] == UPDATE, "it has answered"
        Group.hang.clear()
        failing.refused.clear()
        await push(transport, apis)

    run(fakes, work)
    assert [group.calls for group in Group.made] == [["broadcast", "abort"], ["broadcast", "broadcast"]]
    assert all(fake.calls.count(LEAVE) == 0 for fake in fakes), "a server might wait in it for the one that is gone"


def test_nobody_is_waited_for_for_ever(servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead server, one that hangs with it, and an NCCL that hangs in its abort."""
    monkeypatch.setattr(broadcast, "LET_GO_S", 0.2)
    monkeypatch.setattr(transport, "ABANDON_S", 0.2)
    dying, hanging = fakes = servers(2)
    Group.hang = {"broadcast", "abort"}
    hanging.waits = {path: threading.Event() for path in (UPDATE, "end_weight_update", "continue_generation")}
    dying.waits = {UPDATE: threading.Event()}  # else it may answer before it dies, and then nobody has failed

    async def work(transport: Broadcast, apis: list[ServerAPI]) -> None:
        update = WeightUpdate(transport, apis, "retract", "run-0")
        await update.begin()
        asyncio.get_running_loop().run_in_executor(None, dying.stop)
        with pytest.raises(RuntimeError, match=dying.url):
            await update.send(SCALES[:1])
        await update.abandon()
        assert transport._group is None and transport._members == []

    run(fakes, work)
    dying.start()


def test_a_server_that_was_lost_is_in_no_group(servers) -> None:
    fakes = servers(2)

    async def work(transport: Broadcast, apis: list[ServerAPI]) -> None:
        await push(transport, apis)
        await transport.lost([])
        await transport.lost(apis[:1])
        await push(transport, apis)

    run(fakes, work)
    assert [group.calls for group in Group.made] == [["broadcast", "broadcast", "abort"], ["broadcast", "broadcast"]]
    assert all(fake.calls.count(JOIN) == 2 for fake in fakes)


def test_joining_fails_with_the_server_that_does_not_come(servers) -> None:
    fakes = servers(2)
    fakes[1].refused = {JOIN}

    async def work(transport: Broadcast, apis: list[ServerAPI]) -> None:
        with pytest.raises(Refused, match=f"{fakes[1].url}/{JOIN} answered HTTP 400"):
            await transport.open(apis)
        fakes[1].refused.clear()
        await transport.open(apis)
        assert transport._members == apis

    run(fakes, work)
