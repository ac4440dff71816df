"""Supervised warm start: the policy learns the task's own worked solutions, with the same Megatron code as RL.

The result is a Hugging Face folder in the cache. Its name is a hash of everything that determines it, so a second run with the same
configuration starts immediately.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from ais_megatron.algorithm.masking import mask_generator, supervised
from ais_megatron.batch import Batch, Canvas, Prompt, Rollout, View, assemble
from ais_megatron.config import Config
from ais_megatron.config.policy import PolicyConfig
from ais_megatron.distributed import rank_consistent
from ais_megatron.policy.hf_export import save_hf
from ais_megatron.policy.parallel import data_parallel_group
from ais_megatron.policy.policy import Policy
from ais_megatron.prompts import encode
from ais_megatron.runs.warm_start import cached_folder
from ais_megatron.tasks import Task
from ais_megatron.tokenizer import Tokenizer


def starting_policy(config: Config, task: Task, tokenizer: Tokenizer) -> str | None:
    """The folder from which RL starts: `model.path`, or the result of the warm start. None for random weights."""
    if config.sft.steps == 0:
        return config.model.path
    folder = cached_folder(config)
    with rank_consistent():
        cached = (folder / "config.json").is_file()
    if cached:
        _say(f"starting policy: {folder} (from the cache)")
        return str(folder)
    warm_start(config, task, tokenizer, folder)
    return str(folder)


def warm_start(config: Config, task: Task, tokenizer: Tokenizer, folder: Path) -> None:
    """Train for `sft.steps` steps and write the policy to `folder`, which appears only when it is complete. Collective.

    Raises:
        ValueError: the task has no worked solutions.
    """
    all_weights = config.model_copy(update={"policy": PolicyConfig()})  # LoRA freezes what the warm start has made
    policy = Policy(all_weights, config.sft.optimizer, config.sft.steps, temperature=1.0, path=config.model.path)
    every = max(1, config.sft.steps // 10)
    for step in range(config.sft.steps):
        with rank_consistent():
            batch = solutions(config, task, tokenizer, step)
        metrics = policy.sft_step(batch)
        if (step + 1) % every == 0:
            _say(f"warm start {step + 1}/{config.sft.steps}  loss {metrics['loss']:.3f} nats/token")
    partial = folder.with_name(folder.name + ".partial")
    save_hf(
        policy.export_buckets(2**30), config.architecture, config.model.dtype, partial, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id
    )
    with rank_consistent():
        if dist.get_rank() == 0:
            tokenizer.save(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)


def solutions(config: Config, task: Task, tokenizer: Tokenizer, step: int) -> Batch:
    """This data-parallel rank's rows of one SFT batch. The problems have very large indices in the training stream, so that the model does
    not memorise the first prompts of RL."""
    group = data_parallel_group()
    rows = config.sft.batch_size // dist.get_world_size(group)
    first = 2**40 + step * config.sft.batch_size + dist.get_rank(group) * rows
    examples = []
    for index in range(first, first + rows):
        problem = task.train_problem(index)
        if problem.solution is None:
            raise ValueError(
                f"sft.steps={config.sft.steps}: task {task.name} has no worked solution for problem {index}; set sft.steps=0, or provide "
                "solutions"
            )
        prompt = Prompt(index, problem.text, encode(problem, tokenizer), problem.truth)
        response = tuple(tokenizer.encode_response(problem.solution))
        examples.append(Rollout(prompt, response, (0.0,) * len(response), "stop", -1))
    if config.architecture.family.is_diffusion:
        return _masked(config, examples, tokenizer.eos_id)
    return assemble(examples, torch.zeros(rows), torch.zeros(rows))


def _masked(config: Config, examples: list[Rollout], eos_id: int) -> Batch:
    """Solutions for a diffusion model: padded with ends of sequence to the length of its responses, and partly masked.

    A row of L tokens, n of them masked, has the weight L / n (`algorithm.masking`). The loss divides by the number of masked tokens, so the
    weights are scaled by its share of all tokens.
    """
    mask_id, size = config.architecture.mask_token_id, config.rollout.max_response_tokens
    assert mask_id is not None  # an architecture without one was refused
    masked = []
    for example in examples:
        if len(example.token_ids) > size:
            raise ValueError(
                f"sft.steps={config.sft.steps}: the solution of problem {example.prompt.index} has {len(example.token_ids)} tokens, but "
                f"rollout.max_response_tokens={size} is the length of a diffusion model's canvas; raise it"
            )
        tokens = example.token_ids + (eos_id,) * (size - len(example.token_ids))
        mask = supervised(len(example.prompt.token_ids), size, mask_generator(config.run.seed, example.prompt.index, 0))
        canvas = Canvas(tokens, (), (View(mask.hidden, mask.scored, torch.zeros(size)),), mask_id)
        masked.append(replace(example, canvas=canvas))
    counts = torch.tensor([int(example.canvas.views[0].scored.sum()) for example in masked if example.canvas], dtype=torch.float32)
    return assemble(masked, torch.zeros(len(masked)), counts.mean() / counts)


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
