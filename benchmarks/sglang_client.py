"""Requests per second of our SGLang client, beside a bare aiohttp loop and beside what the server can send at most.

    python benchmarks/sglang_client.py [--requests 2000] [--tokens 512] [--rounds 5]

The server is a stand-in in a process of its own that answers at once with fixed bytes (a response with log-probabilities), so
the client is what is measured. The bare loop posts a body and reads bytes with aiohttp and does nothing with them; the
server's limit is taken with sockets that send one fixed request and count bytes. Rounds alternate; medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import aiohttp
import torch
from contract import against_peer, emit, plain

from ais_megatron.batch import Prompt
from ais_megatron.config import build_config
from ais_megatron.rollout.engine import SamplingParams
from ais_megatron.rollout.sglang.client import SGLangEngine

CONNECTIONS, GROUP, RUN = 64, 8, "bench"
ARCHITECTURE = dict(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=32
)
BODY = {"rid": "0", "input_ids": list(range(32)), "sampling_params": {"max_new_tokens": 512}, "return_logprob": True}


def make_engine(url: str) -> SGLangEngine:
    sglang = {"servers": [url], "max_concurrency": CONNECTIONS}
    config = build_config({"model": {"architecture": ARCHITECTURE}, "rollout": {"engine": "sglang", "sglang": sglang}})
    engine = SGLangEngine(config.architecture, config.rollout, [url], eos_ids=(2,), dtype=torch.bfloat16, run_id=RUN)
    engine.update_weights([], 0)  # not the rank that pushes: it only learns the version
    return engine


def ours(engine: SGLangEngine, requests: int, tokens: int) -> None:
    prompts = [Prompt(i, "", tuple(range(32)), {}) for i in range(requests // GROUP)]
    rollouts = engine.generate(prompts, SamplingParams(GROUP, tokens))
    assert len(rollouts) == requests and all(len(r.rollout_logprobs) == tokens for r in rollouts)


async def bare(url: str, requests: int, parse: bool = False) -> None:
    left = iter(range(requests))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def work() -> None:
            for _ in left:
                async with session.post(url + "/generate", json=BODY) as response:
                    text = await response.read()
                    if parse:
                        json.loads(text)

        await asyncio.gather(*(work() for _ in range(CONNECTIONS)))


async def limit(port: int, requests: int) -> None:
    body = json.dumps(BODY).encode()
    request = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    left = iter(range(requests))

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        for _ in left:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.rsplit(b" ", 1)[1]))
        writer.close()

    await asyncio.gather(*(work() for _ in range(CONNECTIONS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    count = arguments.requests // GROUP * GROUP
    script = Path(__file__).parent / "peers" / "stand_in_server.py"
    command = [sys.executable, str(script), str(arguments.tokens), f"{RUN}-0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None  # both are pipes
        try:
            port = int(server.stdout.readline())
            url = f"http://127.0.0.1:{port}"
            engine = make_engine(url)
            ways = {
                "ours": lambda: ours(engine, count, arguments.tokens),
                "bare": lambda: asyncio.run(bare(url, count)),
                "parsing": lambda: asyncio.run(bare(url, count, parse=True)),
                "limit": lambda: asyncio.run(limit(port, count)),
            }
            rates: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(arguments.rounds):
                for name, way in ways.items():
                    start = perf_counter()
                    way()
                    rates[name].append(count / (perf_counter() - start))
            engine.close()
        finally:
            server.stdin.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    note = f"{count} responses of {arguments.tokens} tokens with log-probabilities"
    emit(
        {
            "client, against an aiohttp loop that reads": against_peer(medians["ours"], medians["bare"], "requests/s", note=note),
            "client, against aiohttp and json.loads": against_peer(medians["ours"], medians["parsing"], "requests/s"),
            "client, against the stand-in server's limit": against_peer(medians["ours"], medians["limit"], "requests/s"),
            "client, response tokens": plain(medians["ours"] * arguments.tokens, "tokens/s"),
        }
    )


if __name__ == "__main__":
    main()
