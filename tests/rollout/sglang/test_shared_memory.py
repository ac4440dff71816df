"""Weights through shared memory: every rank of every server opens the buffer by itself, at every sync, and closes it again."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ais_megatron.rollout.sglang.transport import NOT_LAST, FlatBucket
from ais_megatron.rollout.sglang.transports import SharedMemory

# What a rank of SGLang does with a bucket: it opens the memory, reads it, and lets it go.
RANK = """
import base64, io, pickle, sys
for line in sys.stdin:
    bucket = pickle.load(io.BytesIO(base64.b64decode(line)))
    print(bucket["flattened_tensor"].view(-1).sum(dtype=__import__("torch").int64).item(), flush=True)
    del bucket
"""


class Rank:
    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", RANK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def sum_of(self, payload: str) -> int:
        self.process.stdin.write(payload + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


class Server:
    """A server whose ranks are processes."""

    def __init__(self, ranks: list[Rank]) -> None:
        self.ranks, self.sums = ranks, []

    async def update(self, how: str, serialized_named_tensors: list[str], **body: Any) -> None:
        self.sums.append([rank.sum_of(payload) for rank, payload in zip(self.ranks, serialized_named_tensors, strict=True)])


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[Rank]]:
    ranks = [Rank(), Rank()]
    yield ranks
    for rank in ranks:
        rank.process.stdin.close()
        rank.process.wait(timeout=60)


@pytest.mark.parametrize("tp", [1, 2])
def test_every_rank_of_every_server_reads_every_bucket(ranks: list[Rank], tp: int) -> None:
    """Six buckets use each of the two buffers three times. A file that its last reader has deleted cannot be opened again."""
    transport = SharedMemory(tp)
    servers = [Server(ranks[:1]), Server(ranks[1:])] if tp == 1 else [Server(ranks)]

    async def send() -> list[int]:
        expected = []
        for step in range(6):
            weights = torch.full((7, 5), step + 1, dtype=torch.uint8)
            await transport.send(servers, FlatBucket.of([("weight", weights)]), NOT_LAST)
            expected.append(int(weights.sum()))
        await transport.shut_down()
        return expected

    expected = asyncio.run(send())
    for server in servers:
        assert server.sums == [[total] * tp for total in expected]
