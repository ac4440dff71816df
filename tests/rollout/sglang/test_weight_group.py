"""The group of trainer and servers with real processes over gloo: members come, die and leave, and rank 0 outlives them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.distributed import distributed_c10d as c10d

from ais_megatron.cluster.ports import free_port
from ais_megatron.rollout.sglang import weight_group
from ais_megatron.rollout.sglang.weight_group import WeightGroup, in_thread

# What SGLang's init_custom_process_group does in a server, then one broadcast after another.
# "die" ends it in the middle; with "wait" its status is 5 if the second broadcast fails.
MEMBER = """
import os, sys, torch, torch.distributed as dist
from datetime import timedelta
from torch.distributed import distributed_c10d as c10d
port, name, end = int(sys.argv[1]), sys.argv[2], sys.argv[3]
store, rank, world = next(c10d.rendezvous(f"tcp://127.0.0.1:{port}", 1, 2, timeout=timedelta(seconds=60)))
group, _ = c10d._new_process_group_helper(
    world, rank, [], c10d.Backend("gloo"), c10d.PrefixStore(name, store), group_name=name, timeout=timedelta(seconds=60))
flat = torch.zeros(4, dtype=torch.uint8)
group.broadcast([flat], dist.BroadcastOptions()).wait()
print(flat.tolist(), flush=True)
sys.stdin.readline()
if end == "die":
    os._exit(9)
if end == "wait":
    try:
        group.broadcast([flat], dist.BroadcastOptions()).wait()
    except RuntimeError:
        os._exit(5)
group.shutdown()
os._exit(0)
"""


def start(port: int, name: str, end: str) -> subprocess.Popen:
    command = [sys.executable, "-c", MEMBER, str(port), name, end]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def let_go(member: subprocess.Popen) -> None:
    member.stdin.write("\n")
    member.stdin.flush()


def test_a_member_that_dies_costs_the_group_and_nothing_else() -> None:
    port, bytes_ = free_port(), torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    dying = start(port, "first", "die")
    group = WeightGroup("127.0.0.1", port, 2, "first", "gloo", 60.0)
    assert "first" not in c10d._world.pg_names.values(), "torch's own destroy_process_group() leaves it alone"
    group.broadcast(bytes_)
    assert dying.stdout.readline() == "[1, 2, 3, 4]\n"
    threading.Timer(0.2, let_go, (dying,)).start()
    with pytest.raises(RuntimeError):
        group.broadcast(torch.zeros(2**26, dtype=torch.uint8))  # more than the sockets hold: it has to be taken
    group.abort()
    assert dying.wait(60) == 9
    port = free_port()
    next_one = start(port, "second", "leave")
    group = WeightGroup("127.0.0.1", port, 2, "second", "gloo", 60.0)
    group.broadcast(bytes_ + 1)
    assert next_one.stdout.readline() == "[2, 3, 4, 5]\n"
    let_go(next_one)
    group.shut_down()
    assert next_one.wait(60) == 0


def test_leaving_frees_a_member_that_waits_for_us() -> None:
    port = free_port()
    waiting = start(port, "freed", "wait")
    group = WeightGroup("127.0.0.1", port, 2, "freed", "gloo", 60.0)
    group.broadcast(torch.zeros(4, dtype=torch.uint8))
    let_go(waiting)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1)
    group.abort()
    assert waiting.wait(60) == 5
    group.abort()  # idempotent


def test_members_are_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_group, "JOIN_S", 1.0)
    with pytest.raises(RuntimeError, match="1/2 clients joined"):
        WeightGroup("127.0.0.1", free_port(), 2, "alone", "gloo", 60.0)


def test_a_thread_that_never_returns_holds_up_neither_loop_nor_exit() -> None:
    script = (
        "import asyncio, time; from ais_megatron.rollout.sglang.weight_group import in_thread\n"
        "async def main():\n"
        "    print((await asyncio.wait([in_thread(lambda: time.sleep(600))], timeout=0.1))[0])\n"
        "asyncio.run(main())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=360)
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")


def test_results_and_errors_of_a_thread() -> None:
    async def fail() -> None:
        await in_thread(lambda: 1 // 0)

    async def succeed() -> int:
        return await in_thread(lambda: 7)

    assert asyncio.run(succeed()) == 7
    with pytest.raises(ZeroDivisionError):
        asyncio.run(fail())


def test_variables_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only NCCL reads: see the module's docstring."""
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT", raising=False)
    with weight_group._environment(weight_group.NO_WATCHDOG):
        assert (os.environ["TORCH_NCCL_BLOCKING_WAIT"], os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"]) == ("1", "0")
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3" and "TORCH_NCCL_BLOCKING_WAIT" not in os.environ
