"""Response tokens per second of the embedded engine beside transformers' `generate` and beside SGLang on the same CPU.

    python benchmarks/local_engine.py [--sglang-python PATH] [--rounds 3]

256 responses x 48 tokens to 32 prompts of 16 tokens, BF16, random weights of grpo_step.py's model. transformers samples with
logits returned, as log-probabilities need. SGLang has 64 running requests on a CPU and is made for GPUs: it is here for tiny
models only. Rounds alternate; medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from time import perf_counter

import torch
from contract import against_peer, emit, plain
from grpo_step import MODEL
from real_server import RealServer
from transformers import Qwen3Config, Qwen3ForCausalLM

from ais_megatron.batch import Prompt
from ais_megatron.config import build_config
from ais_megatron.rollout.engine import SamplingParams
from ais_megatron.rollout.local.engine import LocalEngine

PROMPTS, GROUP, TOKENS = 32, 8, 48
EOS = 511


def bucket(model: Qwen3ForCausalLM) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) for name, tensor in model.state_dict().items()]


@torch.inference_mode()
def transformers_generate(model: Qwen3ForCausalLM, prompts: list[Prompt]) -> int:
    ids = torch.tensor([p.token_ids for p in prompts for _ in range(GROUP)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        max_new_tokens=TOKENS,
        top_k=0,
        eos_token_id=EOS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logprobs = torch.stack(out.logits, 1).float().log_softmax(-1).gather(2, out.sequences[:, ids.shape[1] :, None])
    return logprobs.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang-python")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    config = build_config({"model": {"architecture": MODEL}, "rollout": {"quantization": "none"}})
    sizes = config.architecture.model_dump(exclude={"model_type", "rope_theta", "initializer_range"})
    model = Qwen3ForCausalLM(Qwen3Config(**sizes)).bfloat16().eval()
    engine = LocalEngine(config.architecture, config.rollout, eos_ids=(EOS,), pad_id=0, device="cpu")
    engine.update_weights([bucket(model)], 0)
    prompts = [Prompt(i, "", tuple(3 + (37 * i + j) % 500 for j in range(16)), {}) for i in range(PROMPTS)]
    sampling = SamplingParams(GROUP, TOKENS)
    count = lambda rollouts: sum(len(r.token_ids) for r in rollouts)  # noqa: E731
    ways = {
        "ours": lambda: count(engine.generate(prompts, sampling)),
        "transformers": lambda: transformers_generate(model, prompts),
    }
    with tempfile.TemporaryDirectory() as folder:
        server = None
        if arguments.sglang_python and Path(arguments.sglang_python).exists():
            server = RealServer(Path(folder), arguments.sglang_python, MODEL, quantization="none")
        try:
            if server is not None:
                remote = server.connect("tensor", eos_id=EOS)
                remote.update_weights([bucket(model)], 0)
                ways["SGLang"] = lambda: count(remote.generate(prompts, sampling))
            rates: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(arguments.rounds + 1):
                for name, way in ways.items():
                    start = perf_counter()
                    tokens = way()
                    if number:
                        rates[name].append(tokens / (perf_counter() - start))
        finally:
            if server is not None:
                server.stop()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    note = f"{PROMPTS * GROUP} responses x {TOKENS} tokens, 0.9 M parameters, BF16"
    figures = {"local engine, against transformers": against_peer(medians["ours"], medians["transformers"], "tokens/s", note=note)}
    if "SGLang" in medians:
        figures["local engine, against SGLang on the CPU"] = against_peer(medians["ours"], medians["SGLang"], "tokens/s")
    else:
        figures["local engine"] = plain(medians["ours"], "tokens/s", "SGLang is not installed")
    emit(figures)


if __name__ == "__main__":
    main()
