"""A load test of our SGLang client: 2,048 requests in flight on 64 stand-in servers, with long-tailed response times and 5 % failures.

    python benchmarks/client_load.py [--requests 4096] [--servers 64] [--concurrency 32] [--failing 0.05]

The client and HTTP are the real ones, over loopback. The servers are stand-ins in a few processes (long_tailed_servers.py). Checked:
every request has exactly one response, in its place and with its own content, whatever failed; nothing is in flight at the end. Measured:
the share of a core that the client takes (CPU seconds of its process / wall seconds), and how much work the failures made servers repeat.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from contract import emit, plain, share
from long_tailed_servers import digits_of

from ais_megatron.batch import Prompt, Rollout
from ais_megatron.config import build_config
from ais_megatron.rollout.engine import SamplingParams
from ais_megatron.rollout.sampling import response_seed
from ais_megatron.rollout.sglang.client import SGLangEngine

GROUP, RUN, LONGEST = 8, "load", 16  # a response has at most LONGEST times the median number of tokens
ARCHITECTURE = dict(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=32
)


@dataclass(frozen=True)
class Load:
    """What a load test found."""

    responses: int
    wrong: int
    """Responses with another request's content, or in another request's place."""
    doubled: int
    """Responses whose content occurs more than once."""
    wall_s: float
    cpu_s: float
    """Of the client's process: all of its threads."""
    tokens: int
    most_in_flight: int
    """As the client counts."""
    servers: dict[str, int]
    """What the servers did: received, answered, refused (503), closed, dropped (the client closed the connection), in_flight (at the
    end)."""


def run(
    requests: int,
    servers: int,
    concurrency: int,
    failing: float,
    median_tokens: int,
    seconds_per_token: float,
    processes: int,
    seed: int = 0,
) -> Load:
    """Generate once with all servers, and stop them. `requests` must be a multiple of `GROUP`, and `servers` of `processes`."""
    script = Path(__file__).parent / "long_tailed_servers.py"
    options = [str(servers // processes), f"{RUN}-0", str(median_tokens), str(seconds_per_token), str(failing), str(seed)]
    with ExitStack() as running:
        started = [
            running.enter_context(
                subprocess.Popen([sys.executable, str(script), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(processes)
        ]
        try:
            ports = [port for process in started for port in json.loads(_line(process))]
            load = _measure([f"http://127.0.0.1:{port}" for port in ports], requests, concurrency, LONGEST * median_tokens)
        finally:
            for process in started:
                assert process.stdin is not None  # it is a pipe
                process.stdin.close()
        counts = [json.loads(_line(process)) for process in started]
    return Load(*load, servers={name: sum(count[name] for count in counts) for name in counts[0]})


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None  # it is a pipe
    return process.stdout.readline()


def _measure(urls: Sequence[str], requests: int, concurrency: int, longest: int) -> tuple[int, int, int, float, float, int, int]:
    sglang = {"servers": list(urls), "max_concurrency": concurrency}
    config = build_config({"model": {"architecture": ARCHITECTURE}, "rollout": {"engine": "sglang", "sglang": sglang}})
    engine = SGLangEngine(config.architecture, config.rollout, urls, eos_ids=(2,), dtype=torch.bfloat16, run_id=RUN)
    try:
        engine.update_weights([], 0)  # not the rank that pushes: it only learns the version
        prompts = [Prompt(i, "", tuple(range(32)), {}) for i in range(requests // GROUP)]
        sampling = SamplingParams(GROUP, longest)
        most, ended = [0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(engine, most, ended))
        watcher.start()
        wall, cpu = time.perf_counter(), time.process_time()
        rollouts = engine.generate(prompts, sampling)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        ended.set()
        watcher.join()
    finally:
        engine.close()
    wanted = [digits_of(response_seed(sampling, prompt.index, sample)) for prompt in prompts for sample in range(GROUP)]
    wrong = sum(list(rollout.token_ids[:4]) != digits for rollout, digits in zip(rollouts, wanted, strict=True))
    wrong += sum(rollout.prompt.index != i // GROUP or rollout.is_dropped for i, rollout in enumerate(rollouts))
    doubled = len(rollouts) - len({rollout.token_ids[:4] for rollout in rollouts})
    return len(rollouts), wrong, doubled, wall, cpu, _tokens(rollouts), most[0]


def _tokens(rollouts: Sequence[Rollout]) -> int:
    return sum(len(rollout.token_ids) for rollout in rollouts)


def _watch(engine: SGLangEngine, most: list[int], ended: threading.Event) -> None:
    while not ended.wait(0.05):
        most[0] = max(most[0], sum(len(server.requests) for server in engine._dispatcher.servers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4096)
    parser.add_argument("--servers", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=32, help="requests in flight at one server")
    parser.add_argument("--failing", type=float, default=0.05)
    parser.add_argument("--median-tokens", type=int, default=256)
    parser.add_argument("--seconds-per-token", type=float, default=0.01)
    parser.add_argument("--processes", type=int, default=4, help="in which the servers run")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))  # a socket for every request; the servers inherit it
    load = run(**vars(arguments))
    assert load.responses == arguments.requests and load.wrong == load.doubled == load.servers["in_flight"] == 0, load
    did = ", ".join(f"{count} {name}" for name, count in load.servers.items() if name not in ("in_flight", "most_in_flight"))
    emit(
        {
            "client under load, CPU": share(load.cpu_s / load.wall_s, "of a core", note=f"{load.cpu_s:.1f} s of {load.wall_s:.1f} s"),
            "client under load, lost or doubled": plain(0, "responses", f"of {load.responses}; servers: {did}"),
            "client under load, most in flight": plain(load.most_in_flight, "requests", f"on {arguments.servers} servers"),
            "client under load, CPU of a response": plain(
                1e3 * load.cpu_s / load.responses, "ms", f"{load.tokens / load.responses:.0f} tokens"
            ),
            "client under load, repeated work": share(
                load.servers["received"] / load.responses - 1.0, "of requests", note="after failures"
            ),
        }
    )


if __name__ == "__main__":
    main()
