"""The folder of a warm-started policy. Its name is a hash of everything that determines the policy, so it is made only once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ais_megatron.config import Config, TaskConfig
from ais_megatron.config.doors import is_own, source_digest

FORMAT_VERSION = 1  # increase it if the same configuration would give other weights


def starting_folder(config: Config) -> Path | None:
    """The folder from which RL starts: `model.path`, or that of the warm start, which may not exist yet. None for random weights."""
    if config.sft.steps:
        return cached_folder(config)
    return None if config.model.path is None else Path(config.model.path)


def cached_folder(config: Config) -> Path:
    """The folder for the warm-started policy of this configuration, which may not exist yet."""
    made_of = {
        "format": FORMAT_VERSION,
        "seed": config.run.seed,
        **{name: getattr(config, name).model_dump(mode="json", exclude={"cache_dir", "adapter"}) for name in ("model", "tokenizer", "sft")},
        "task": _problems_made_of(config.task),
    }
    if config.architecture.family.is_diffusion:
        made_of["canvas"] = config.rollout.max_response_tokens
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
