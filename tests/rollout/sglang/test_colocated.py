"""Servers that share the trainer's GPUs: what they are asked, in which order, and what happens if one of them refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from ais_megatron.batch import Prompt
from ais_megatron.config import ConfigError
from ais_megatron.rollout.engine import SamplingParams
from ais_megatron.rollout.manifest import Manifest
from ais_megatron.rollout.sglang.client import SGLangEngine
from ais_megatron.rollout.sglang.server import server_command
from ais_megatron.rollout.sglang.transports import SharedMemory
from tests.helpers.ranks import RankPool
from tests.helpers.sglang import sglang_config
from tests.rollout.sglang.fake_server import RUN, FakeServer

PROMPTS = [Prompt(i, "", (10 + i, 3), {}) for i in range(2)]
ONE = SamplingParams(1, 4)
COLOCATED = {"colocated": True}
SLEEP, WAKE = "release_memory_occupation", "resume_memory_occupation"
UPDATE = ["pause_generation", "begin_weight_update", "update_weights_from_tensor", "end_weight_update", "continue_generation"]


class Named(FakeServer):
    """Takes the name of the weights that it gets."""

    def _control(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.version = body.get("weight_version") or self.version
        return super()._control(path, body)

    def asked_since(self, start: int) -> list[str]:
        return [path for path in self.calls[start:] if path not in ("model_info", "v1/loads", "health", "weights_checker")]


@pytest.fixture
def server() -> Iterator[Named]:
    made = Named()
    yield made
    made.stop()


def engine_of(*servers: Named) -> SGLangEngine:
    config = sglang_config("dense", "bf16", COLOCATED, max_restarts=0, recovery_timeout_s=1.0, request_timeout_s=5.0)
    options = dict(eos_ids=(2,), dtype=torch.bfloat16, run_id=RUN, transport=SharedMemory(1))
    return SGLangEngine(config.architecture, config.rollout, [server.url for server in servers], **options)


def weights() -> list[list[tuple[str, torch.Tensor]]]:
    config = sglang_config("dense", "bf16")
    required = Manifest.of(config.architecture, config.rollout, torch.bfloat16)._required
    return [[(name, torch.ones(shape, dtype=dtype)) for name, (shape, dtype) in required.items()]]


def test_a_turn_of_the_servers(server: Named) -> None:
    with closing(engine_of(server)) as engine:
        engine.update_weights(weights(), 0)
        assert SLEEP not in server.calls and WAKE not in server.calls, "it begins awake"
        start = len(server.calls)
        engine.release_memory()
        engine.release_memory()
        with pytest.raises(RuntimeError, match="have released their memory; call update_weights before generate"):
            engine.generate(PROMPTS, ONE)
        assert server.asked_since(start) == ["flush_cache", SLEEP], "it is idle first, and is asked once"
        engine.update_weights(weights(), 1)
        assert server.asked_since(start) == ["flush_cache", SLEEP, WAKE, *UPDATE], "all weights follow, because it kept none"
        assert "health" not in server.calls[start:], "without weights it cannot generate the token of a health check"
        assert [r.weight_version for r in engine.generate(PROMPTS, ONE)] == [1, 1]


def test_a_server_that_keeps_its_memory_is_an_error(server: Named) -> None:
    with closing(engine_of(server)) as engine:
        engine.update_weights(weights(), 0)
        for refuses in ("flush_cache", SLEEP):
            server.failing = {refuses}
            with pytest.raises(
                RuntimeError, match=rf"rollout.colocated=true: the server did not release its memory, {server.url}/{refuses}"
            ):
                engine.release_memory()


def test_a_server_that_gets_no_memory_is_asked_again(server: Named) -> None:
    with closing(engine_of(server)) as engine:
        engine.update_weights(weights(), 0)
        engine.release_memory()
        server.failing, start = {WAKE}, len(server.calls)
        with pytest.raises(RuntimeError, match=rf"rollout.colocated=true: the server did not get its memory back, {server.url}/{WAKE}"):
            engine.update_weights(weights(), 1)
        server.failing = {"end_weight_update"}
        with pytest.raises(RuntimeError, match="end_weight_update"):
            engine.update_weights(weights(), 1)
        with pytest.raises(RuntimeError, match="released their memory|no complete weights"):
            engine.generate(PROMPTS, ONE)
        server.failing = set()
        engine.update_weights(weights(), 1)
        assert server.asked_since(start).count(WAKE) == 2, "once it has its memory, SGLang must not be asked again"
        assert [r.weight_version for r in engine.generate(PROMPTS, ONE)] == [1, 1]


def test_a_server_that_is_gone_has_no_memory() -> None:
    one, two = Named(), Named()
    with closing(engine_of(one, two)) as engine:
        engine.update_weights(weights(), 0)
        two.stop()
        engine.release_memory()
        start = len(one.calls)
        engine.update_weights(weights(), 1)
        assert one.asked_since(start) == [WAKE, *UPDATE]
        assert [r.weight_version for r in engine.generate(PROMPTS, ONE)] == [1, 1]
    one.stop()


class Noted:
    """A policy and an engine that note what they are told."""

    def __init__(self, rank: int) -> None:
        self.rank, self.told, self.refuses = rank, [], False

    def rest(self) -> None:
        self.told.append("policy rests")

    def wake(self) -> None:
        self.told.append("policy wakes")

    def release_memory(self) -> None:
        self.told.append("servers sleep")
        if self.refuses and self.rank == 0:
            raise RuntimeError("a server refused")


def turns_of_two_ranks(rank: int) -> None:
    from ais_megatron.turns import Turns

    noted = Noted(rank)
    turns = Turns(noted, noted, is_colocated=True)
    turns.servers()
    assert noted.told == [], "it is their turn already"
    turns.trainer(), turns.trainer(), turns.servers(), turns.servers()
    assert noted.told == ["servers sleep", "policy wakes", "policy rests"], "one side gives up its memory before the other takes it"
    turns.hand_back(lambda: noted.told.append("push"))
    assert noted.told[-1] == "policy rests", "servers that have their turn have their weights"
    turns.trainer(), turns.hand_back(lambda: noted.told.append("push"))
    assert noted.told[-4:] == ["servers sleep", "policy wakes", "policy rests", "push"]
    noted.refuses = True
    with pytest.raises(RuntimeError, match="a server refused"):
        turns.trainer()
    assert noted.told[-1] == "servers sleep", "on no rank the policy takes memory that is not free"

    apart = Turns(noted, object(), is_colocated=False)
    before = list(noted.told)
    apart.trainer(), apart.hand_back(lambda: noted.told.append("push"))
    assert noted.told == before
    with pytest.raises(ValueError, match=r"rollout.colocated=true: object has no method release_memory"):
        Turns(noted, object(), is_colocated=True)


def test_turns_of_two_ranks(ranks: RankPool) -> None:
    ranks.run(2, turns_of_two_ranks)


@pytest.mark.parametrize(
    ("rollout", "sglang", "message"),
    [
        ({"engine": "local"}, {}, "rollout.colocated=true: rollout.engine=local has no servers"),
        ({"ahead": 1}, {}, "rollout.ahead=1: not possible with rollout.colocated=true"),
        ({}, {"transport": "distributed"}, "rollout.sglang.transport=distributed: not possible with rollout.colocated=true"),
        ({}, {"max_restarts": 3}, "rollout.sglang.max_restarts=3: not possible with rollout.colocated=true"),
        (
            {},
            {"device": "cuda", "mem_fraction": 0.3, "servers": ["http://127.0.0.1:1"]},
            r"rollout.sglang.servers=\['http://127.0.0.1:1'\]: not possible with rollout.colocated=true",
        ),
        ({}, {"device": "cuda"}, "rollout.sglang.mem_fraction=empty: not possible with rollout.colocated=true"),
    ],
)
def test_settings_that_cannot_take_turns(rollout: dict[str, Any], sglang: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sglang_config("dense", "bf16", COLOCATED | rollout, **({"max_restarts": 0} | sglang))


def test_servers_on_gpus_are_started_with_the_memory_saver(tmp_path) -> None:  # noqa: ANN001
    colocated = sglang_config("dense", "bf16", COLOCATED, max_restarts=0, device="cuda", mem_fraction=0.4)
    assert "--enable-memory-saver" in server_command(colocated, tmp_path, 1)
    assert "--enable-memory-saver" not in server_command(sglang_config("dense", "bf16", device="cuda"), tmp_path, 1)
