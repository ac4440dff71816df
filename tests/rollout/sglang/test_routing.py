"""Which server gets which request: groups stay together, the load of all ranks counts, and no server runs empty while work waits."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import closing
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ais_megatron.batch import Prompt
from ais_megatron.rollout.engine import SamplingParams
from ais_megatron.rollout.sglang.client import SGLangEngine
from ais_megatron.rollout.sglang.routing import SharedLoads, Waiting, limit_of
from tests.helpers.ranks import RankPool
from tests.helpers.sglang import sglang_config
from tests.rollout.sglang.fake_server import RUN

PROMPTS = [Prompt(i, "", (10 + i, 3), {}) for i in range(8)]
TWO = SamplingParams(2, 4)


def keys(prompts: int, samples: int) -> list[tuple[int, int]]:
    return [(prompt, sample) for prompt in range(prompts) for sample in range(samples)]


def placed(waiting: Waiting, loads: dict[int, int], limit: int) -> list[tuple[int, tuple[int, int]]]:
    """What is placed, one after the other, until no server has room."""
    found = []
    while waiting and (place := waiting.choose(loads, limit)) is not None:
        server, key = place
        waiting.take(key)
        loads[server] += 1
        found.append(place)
    return found


def test_groups_go_to_the_least_loaded_server_as_a_whole() -> None:
    waiting = Waiting(keys(3, 2), {})
    assert placed(waiting, {0: 5, 1: 0, 2: 3}, 10) == [(1, (0, 0)), (1, (0, 1)), (1, (1, 0)), (1, (1, 1)), (2, (2, 0)), (2, (2, 1))]


def test_no_server_gets_more_than_the_limit_and_groups_go_first() -> None:
    """Server 0 has room for one sample of group 0. Group 1 goes to server 1 before the rest of group 0 follows it there."""
    waiting = Waiting(keys(2, 3), {})
    loads = {0: 3, 1: 3}
    assert placed(waiting, loads, 4) == [(0, (0, 0)), (1, (1, 0))]
    loads[1] = 0
    assert placed(waiting, loads, 4) == [(1, (1, 1)), (1, (1, 2)), (1, (0, 1)), (1, (0, 2))]
    assert not waiting and waiting.home == {0: 1, 1: 1}


def test_a_lost_servers_groups_get_another_one() -> None:
    waiting = Waiting(keys(1, 2), {0: 7})
    assert placed(waiting, {0: 9, 1: 1}, 4) == [(1, (0, 0)), (1, (0, 1))]


def test_equal_servers_are_taken_in_turn_from_the_ranks_own_on() -> None:
    assert [Waiting(keys(1, 1), {}).choose({0: 2, 1: 2, 2: 2}, 4, begin)[0] for begin in range(3)] == [0, 1, 2]


def test_calls_do_not_overtake_each_other() -> None:
    first, second = Waiting(keys(1, 1), {}, (False, 1)), Waiting(keys(1, 1), {}, (False, 2))
    evaluation = Waiting(keys(1, 1), {}, (True, 0))
    assert second.comes_after(first) and evaluation.comes_after(second) and not first.comes_after(evaluation)
    first.take((0, 0))
    assert not second.comes_after(first), "nothing of it waits"


@pytest.mark.parametrize(
    ("settings", "limit"),
    [({}, 256), ({"max_running": 8}, 8), ({"max_concurrency": 4, "max_running": 8}, 4)],
)
def test_the_limit_is_what_a_server_can_run(settings: dict[str, int], limit: int) -> None:
    assert limit_of(sglang_config(**settings).rollout.sglang) == limit
    behind_a_router = {"servers": ["http://a:1", "http://b:1"], "router": "http://c:1"}
    assert limit_of(sglang_config(**settings, **behind_a_router).rollout.sglang) == 2 * limit


def test_a_reservation_that_is_cancelled_is_taken_back() -> None:
    store = dist.HashStore()
    slow = threading.Event()
    loads = SharedLoads(store, "x", 2)

    async def cancelled() -> list[int]:
        loads._thread.submit(slow.wait)
        reservation = asyncio.ensure_future(loads.reserve(1))
        await asyncio.sleep(0.01)
        reservation.cancel()
        await asyncio.gather(reservation, return_exceptions=True)
        slow.set()
        await loads.counts()
        return await loads.counts()

    assert asyncio.run(cancelled()) == [0, 0]


def engine(urls: list[str], number: int = 0, store: Any = None, **sglang: Any) -> SGLangEngine:
    config = sglang_config("dense", **sglang)
    options = dict(eos_ids=(2,), dtype=torch.bfloat16, run_id=RUN, number=number, store=store)
    made = SGLangEngine(config.architecture, config.rollout, urls, **options)
    made.update_weights([], 0)
    return made


def test_a_fast_server_takes_what_waits_for_a_slow_one(servers) -> None:
    slow, fast = servers(2)
    slow.delay_s = 0.8
    with closing(engine([slow.url, fast.url], max_concurrency=2)) as one:
        assert len(one.generate(PROMPTS, TWO)) == 16
    assert sum(slow.asked.values()) == 2 and sum(fast.asked.values()) == 14


def test_the_rest_of_a_group_is_shared_at_the_end(servers) -> None:
    one, two = servers(2)
    one.delay_s = two.delay_s = 0.3
    with closing(engine([one.url, two.url], max_concurrency=2)) as made:
        assert len(made.generate(PROMPTS[:1], SamplingParams(8, 4))) == 8
    assert one.asked[10] + two.asked[10] == 8 and min(one.asked[10], two.asked[10]) >= 2
    assert max(one.most_in_flight, two.most_in_flight) == 2


def test_the_batch_that_is_needed_first_is_generated_first(servers) -> None:
    (server,) = servers(1)
    server.delay_s = 0.05
    with closing(engine([server.url], max_concurrency=1)) as made:
        calls = [threading.Thread(target=made.generate, args=(part, TWO)) for part in (PROMPTS[:3], PROMPTS[3:6])]
        for call in calls:
            call.start()
            time.sleep(0.15)
        for call in calls:
            call.join(20)
    assert [body["input_ids"][0] for body in server.bodies] == [10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15]


def shared_generation(rank: int, urls: list[str], limit: int) -> int:
    from ais_megatron.distributed import shared_store

    with closing(engine(urls, rank, shared_store(), max_concurrency=limit)) as made:
        dist.barrier()
        rollouts = made.generate(PROMPTS[4 * rank : 4 * rank + 4], TWO)
        made._run(made._dispatcher._loads.counts())  # after what this rank has still to take away
        dist.barrier()
        counts = made._run(made._dispatcher._loads.counts())
    assert counts == [0] * len(urls), "all requests were taken from the counters again"
    return len(rollouts)


def test_ranks_count_their_requests_together(servers, ranks: RankPool) -> None:
    (server,) = servers(1)
    server.delay_s = 0.2
    assert ranks.run(2, shared_generation, urls=[server.url], limit=3) == [8, 8]
    assert server.most_in_flight == 3 and len(server.bodies) == 16


def test_ranks_spread_their_groups_together(servers, ranks: RankPool) -> None:
    one, two = servers(2)
    one.delay_s = two.delay_s = 0.5
    assert ranks.run(2, shared_generation, urls=[one.url, two.url], limit=64) == [8, 8]
    assert set(one.asked) & set(two.asked) == set() and all(n == 2 for n in (one.asked + two.asked).values())
    assert 3 <= len(one.asked) <= 5, "eight groups of both ranks"
