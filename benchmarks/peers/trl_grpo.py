"""TRL 1.16 GRPO on a CPU: seconds per step for 256 responses x 48 tokens with grpo_step.py's model. Prints ``steps [seconds, ...]``.

The first step includes warm-up. Random weights hardly ever end a response, so that both sides generate to the limit.

    trl_grpo.py FOLDER DATA DTYPE STEPS     a pretrained model on GSM8K's questions: 64 responses x 128 tokens
"""

import json
import os
import sys
import tempfile
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

STEPS = 6


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {chr(i): i - 29 for i in range(32, 127)} | {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model() -> Qwen3ForCausalLM:
    sizes = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=384)
    ids = dict(bos_token_id=None, eos_token_id=1, pad_token_id=0)
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **ids, vocab_size=512, tie_word_embeddings=False)).to(torch.bfloat16)


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float("1" in text) for text in completions]


def chat_reward(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    return [float("1" in turns[0]["content"]) for turns in completions]


def measure(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], judge: Any, responses: int, tokens: int, steps: int, micro: int
) -> None:
    """Print the seconds of each step. micro: number of rows in a forward pass."""
    torch.manual_seed(0)
    clock = Clock()
    batch = dict(per_device_train_batch_size=micro, gradient_accumulation_steps=responses // micro, num_generations=8, max_steps=steps)
    optimizer = dict(learning_rate=1e-5, temperature=1.0, beta=0.0, bf16=False, use_cpu=True, gradient_checkpointing=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder, logging_steps=1, report_to=[], save_strategy="no", max_completion_length=tokens, **batch, **optimizer
        )
        GRPOTrainer(
            model=model,
            reward_funcs=judge,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        ).train()
    print("steps", [round(seconds, 4) for seconds in clock.seconds])


def main() -> None:
    if len(sys.argv) == 1:
        sums = [{"prompt": f"{a}+{b}="} for a in range(10, 99) for b in range(10, 99)]
        measure(make_model(), make_tokenizer(), sums, reward, 256, 48, STEPS, 256)
        return
    folder, data, dtype, steps = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    with open(data, encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line in file]
    rows = [{"prompt": [{"role": "user", "content": question}]} for question in questions]
    measure(model, tokenizer, rows, chat_reward, 64, 128, int(steps), 16)  # more than 16 rows at a time need more than 24 GB


if __name__ == "__main__":
    main()
