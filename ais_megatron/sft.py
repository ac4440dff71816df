"""Supervised warm start: the policy learns the task's own worked solutions, with the same Megatron code as RL.

The result is a Hugging Face folder in the cache. Its name is a hash of everything that determines it, so a second run with the same
configuration starts immediately.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ais_megatron.batch import Batch, Prompt, Rollout, assemble
from ais_megatron.config import Config, TaskConfig
from ais_megatron.config.doors import is_own, source_digest
from ais_megatron.distributed import rank_consistent
from ais_megatron.policy.hf_export import save_hf
from ais_megatron.policy.policy import Policy, data_parallel_group
from ais_megatron.prompts import encode
from ais_megatron.tasks import Task
from ais_megatron.tokenizer import Tokenizer

FORMAT_VERSION = 1  # increase it if the same configuration would give other weights


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


def cached_folder(config: Config) -> Path:
    """The folder for the warm-started policy of this configuration, which may not exist yet."""
    made_of = {
        "format": FORMAT_VERSION,
        "seed": config.run.seed,
        **{name: getattr(config, name).model_dump(mode="json", exclude={"cache_dir"}) for name in ("model", "tokenizer", "sft")},
        "task": _problems_made_of(config.task),
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    return Path(config.sft.cache_dir) / f"policy-{digest}"


def _problems_made_of(task: TaskConfig) -> dict[str, Any]:
    """What determines the worked solutions: the settings, and the source of a class of the user's own. Rewards do not matter, except the
    built-in ones of task.name=qa, which ask for different answers."""
    unread = {key for key in TaskConfig.model_fields if key.startswith("reward")} | (set() if task.options else {"options"})
    if task.reward is not None and not task.has_own_reward:
        unread.remove("reward")
    settings = task.model_dump(mode="json", exclude=unread)
    return settings | ({"source": source_digest(task.name)} if is_own(task.name) else {})


def warm_start(config: Config, task: Task, tokenizer: Tokenizer, folder: Path) -> None:
    """Train for `sft.steps` steps and write the policy to `folder`, which appears only when it is complete. Collective.

    Raises:
        ValueError: the task has no worked solutions.
    """
    policy = Policy(config, config.sft.optimizer, config.sft.steps, temperature=1.0, path=config.model.path)
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
    return assemble(examples, torch.zeros(rows), torch.zeros(rows))


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
