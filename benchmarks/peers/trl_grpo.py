"""TRL 1.16 GRPO on a CPU: seconds per step for 256 responses x 48 tokens with grpo_step.py's model. Prints ``steps [seconds, ...]``.

The first step includes warm-up. Random weights hardly ever end a response, so that both sides generate to the limit.
"""

import os
import tempfile
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback  # noqa: E402
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


def main() -> None:
    torch.manual_seed(0)
    clock = Clock()
    batch = dict(
        per_device_train_batch_size=256, gradient_accumulation_steps=1, num_generations=8, max_completion_length=48, max_steps=STEPS
    )
    optimizer = dict(learning_rate=1e-4, temperature=1.0, beta=0.0, bf16=False, use_cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(output_dir=folder, logging_steps=1, report_to=[], save_strategy="no", **batch, **optimizer)
        GRPOTrainer(
            model=make_model(),
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(10, 99) for b in range(10, 99)]),
            processing_class=make_tokenizer(),
            callbacks=[clock],
        ).train()
    print("steps", [round(seconds, 4) for seconds in clock.seconds])


if __name__ == "__main__":
    main()
