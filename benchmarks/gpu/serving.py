"""Rollout throughput on SGLang: BF16, FP8 weights, FP8 weights and KV cache; short and long contexts; ratios to BF16.

    python benchmarks/gpu/serving.py --sglang-python PATH [--device cpu --tiny] [--layers 36]

A Qwen3-8B-shaped model with dummy weights, one server at a time, started as the trainer starts it (rollout/sglang_server.py). All responses
run to their limit. Checked first, of every server: each answer has as many tokens as asked for, and finite log-probabilities. KV scales
are 1.0, which is right for speed alone. Skipped where SGLang is not installed in that interpreter. NOT YET RUN ON A GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
from bench import Bench, number, ratio
from model import make_config

from ais_megatron.cluster.ports import free_port
from ais_megatron.config import Config
from ais_megatron.rollout.sglang.server import SGLangServer

VARIANTS = {"BF16": ("none", "bf16"), "FP8 weights": ("fp8_e4m3", "bf16"), "FP8 weights, FP8 KV": ("fp8_e4m3", "fp8_e4m3")}


def main() -> None:
    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--layers", type=int, default=36)
        parser.add_argument("--sglang-python", default="python", help="interpreter of the environment that holds SGLang")

    bench = Bench(__doc__, options)
    bench.rounds = 1 if bench.tiny else min(bench.rounds, 5)
    # name, requests, prompt tokens, response tokens
    loads = [("short", 2, 8, 4)] if bench.tiny else [("short", 256, 256, 512), ("long", 64, 16_384, 1024)]
    reason = missing(bench.options.sglang_python)
    if reason:
        bench.skip("everything", reason)
        bench.finish()
        return
    bench.columns("context", "variant", "tokens/s", "ratio to BF16")
    base: dict[str, float] = {}
    for variant, (quantization, kv_cache) in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            if bench.seconds_left <= 0:
                bench.skip(variant, "no time left")
                continue
            try:
                with SGLangServer(configuration(bench, quantization, kv_cache), Path(folder), free_port()) as server:
                    server.wait_until_healthy(min(900.0, bench.seconds_left))
                    for name, requests, prompt, response in loads:
                        speed = throughput(bench, server, f"{variant}, {name}", requests, prompt, response)
                        base.setdefault(name, speed)
                        bench.row(name, variant, number(speed, "tokens/s"), ratio(speed, base[name]))
            except RuntimeError as error:
                bench.skip(variant, str(error).splitlines()[0])
    bench.finish()


def missing(python: str) -> str | None:
    if shutil.which(python) is None:
        return f"--sglang-python {python}: there is no such interpreter"
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    if subprocess.run([python, "-c", code], check=False).returncode:
        return f"SGLang is not installed in {python}"
    return None


def configuration(bench: Bench, quantization: str, kv_cache: str) -> Config:
    sglang: dict[str, object] = {
        "python": bench.options.sglang_python,
        "device": bench.device.type,
        "mem_fraction": 0.85 if bench.on_gpu else None,
    }
    if bench.tiny:
        sglang |= {"max_running": 8}
    rollout = {"engine": "sglang", "quantization": quantization, "kv_cache": kv_cache, "sglang": sglang}
    architecture = make_config(bench, bench.options.layers).architecture.model_dump()
    if bench.tiny:  # SGLang cuts weights into whole blocks of 128
        architecture |= {"num_key_value_heads": 4}
    return make_config(bench, bench.options.layers, rollout=rollout, model={"architecture": architecture})


def throughput(bench: Bench, server: SGLangServer, name: str, requests: int, prompt: int, response: int) -> float:
    """Response tokens per second, median; prompts differ in every round, so no prefix is ever cached."""
    speeds = []
    for turn in range(bench.rounds + 1):  # the first one warms up
        generator = torch.Generator().manual_seed(turn)
        vocabulary = server.config.architecture.vocab_size
        prompts = torch.randint(0, vocabulary, (requests, prompt), generator=generator).tolist()
        sampling = {"max_new_tokens": response, "ignore_eos": True, "temperature": 1.0}
        body = json.dumps({"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}).encode()
        request = urllib.request.Request(server.url + "/generate", body, {"Content-Type": "application/json"})
        began = time.perf_counter()
        with urllib.request.urlopen(request, timeout=3600) as answer:
            answers = json.loads(answer.read())
        speeds.append(requests * response / (time.perf_counter() - began))
        if turn == 0:
            logprobs = [[value for value, *_ in a["meta_info"]["output_token_logprobs"]] for a in answers]
            bench.check(f"{name}: every answer is {response} tokens long", all(len(values) == response for values in logprobs))
            bench.check(f"{name}: log-probabilities are finite", all(math.isfinite(v) for values in logprobs for v in values))
    return sorted(speeds[1:])[len(speeds[1:]) // 2]


if __name__ == "__main__":
    main()
