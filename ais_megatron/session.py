"""Builds what a command needs from a configuration, on every rank: task, tokenizer, policy and engine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist

from ais_megatron.algorithm.objectives import check_objective
from ais_megatron.batch import Rollout
from ais_megatron.config import Config
from ais_megatron.distributed import rank, rank_consistent
from ais_megatron.generation import Generator
from ais_megatron.policy.parallel import data_parallel_group, initialize_parallel, model_parallel_group
from ais_megatron.policy.policy import Policy
from ais_megatron.prompts import Share, to_prompt, within_limit
from ais_megatron.rollout.build import build_engine
from ais_megatron.rollout.engine import Denoising, RolloutEngine, SamplingParams
from ais_megatron.runs.samples import TokenTexts
from ais_megatron.sft import starting_policy
from ais_megatron.tasks import Attempt, Reward, Task, judge_all, make_task
from ais_megatron.tokenizer import Tokenizer, make_tokenizer, response_text
from ais_megatron.turns import Turns
from ais_megatron.weight_sync import WeightSync

NUM_PROBE_PROMPTS = 2  # number of prompts that each server answers after each sync


@dataclass(frozen=True)
class Session:
    config: Config
    task: Task
    tokenizer: Tokenizer
    policy: Policy
    engine: RolloutEngine
    sync: WeightSync
    generator: Generator
    share: Share
    turns: Turns

    def score(self, rollouts: list[Rollout]) -> list[Reward]:
        """The task's reward for each response. A response that was dropped or could not be judged has the value NaN."""
        none = Reward(float("nan"), well_formed=False, correct=False)
        present = [r for r in rollouts if not r.is_dropped]
        texts = [response_text(self.tokenizer, r.prompt.token_ids, r.token_ids) for r in present]
        attempts = [Attempt(r.prompt.truth, text, r.prompt.text, r.prompt.index) for r, text in zip(present, texts, strict=True)]
        rewards = iter(judge_all(self.task, attempts))
        return [none if r.is_dropped else next(rewards) for r in rollouts]

    @cached_property
    def texts(self) -> TokenTexts:
        """The texts of single tokens, for `samples.jsonl`."""
        return TokenTexts(self.tokenizer.decode, anchor=self.tokenizer.encode_response("1")[0])

    @property
    def sampling(self) -> SamplingParams:
        """How to sample training responses. (The prompt numbers of the stream never repeat, so all steps use the same seed.)"""
        rollout = self.config.rollout
        return SamplingParams(
            num_samples=rollout.group_size,
            max_tokens=rollout.max_response_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            seed=self.config.run.seed,
            denoising=denoising(self.config, self.config.rows_per_response),
        )


def denoising(config: Config, num_views: int) -> Denoising | None:
    """How a diffusion model samples, with `num_views` scored masks of each response; None for other models."""
    if not config.architecture.family.is_diffusion:
        return None
    chosen = config.diffusion
    return Denoising(
        block_length=chosen.block_length,
        steps_per_block=chosen.steps_per_block(config.rollout.max_response_tokens),
        remasking=chosen.remasking,
        likelihood=chosen.likelihood,
        likelihood_temperature=config.likelihood_temperature,
        num_views=num_views,
        prompt_mask=chosen.prompt_mask,
    )


def build_task(config: Config) -> tuple[Task, Tokenizer]:
    """Create task and tokenizer, and try an objective of the user's own. All ranks raise an error together."""
    with rank_consistent():
        task = make_task(config.task, config.run.seed)
        tokenizer = make_tokenizer(config, task)
        task, notes = within_limit(task, tokenizer, config)
        check_objective(config.objective)
    for note in notes if rank() == 0 else ():
        print(note, flush=True)
    return task, tokenizer


def build_policy(config: Config, from_checkpoint: bool = False) -> tuple[Policy, Task, Tokenizer]:
    """Create process groups, task, tokenizer and policy. The starting policy is made first if it is not in the cache.

    from_checkpoint: the caller will load a checkpoint, so weights that it has stay random.
    """
    initialize_parallel(config)
    task, tokenizer = build_task(config)
    needs_start = not from_checkpoint or config.policy.lora.rank  # a checkpoint of LoRA has only the factors
    path = starting_policy(config, task, tokenizer) if needs_start else None
    updates = config.train.steps * config.train.updates_per_batch
    return Policy(config, config.train.optimizer, updates, config.likelihood_temperature, path), task, tokenizer


def build_session(config: Config, from_checkpoint: bool = False) -> Session:
    """`build_policy`, and an engine without weights."""
    return with_engine(config, *build_policy(config, from_checkpoint))


def with_engine(config: Config, policy: Policy, task: Task, tokenizer: Tokenizer) -> Session:
    """A session of this policy with a new engine for `config.rollout`, which has no weights yet."""
    if config.rollout.colocated:
        policy.rest()  # servers that are started now need the memory
    engine = build_engine(config, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
    with rank_consistent():
        turns = Turns(policy, engine, config.rollout.colocated)
        probe = [to_prompt(task.train_problem(i), i, tokenizer) for i in range(NUM_PROBE_PROMPTS)]
    sync = WeightSync(policy, engine, config.rollout, probe)
    return Session(config, task, tokenizer, policy, engine, sync, Generator(engine, sync, config.rollout), share_of_this_rank(), turns)


def share_of_this_rank() -> Share:
    dp, mp = data_parallel_group(), model_parallel_group()
    return Share(dist.get_rank(dp), dist.get_world_size(dp), dist.get_rank(mp), dist.get_world_size(mp))
