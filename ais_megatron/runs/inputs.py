"""What a configuration names on the disk, checked before any process starts. Nothing here imports torch.

`train` refuses a run with these problems at once. `doctor` lists them, so a job learns of a missing file before it starts a server.
"""

from __future__ import annotations

from pathlib import Path

from ais_megatron.config import Config
from ais_megatron.config.chat_template import keyword_problems, read_chat_template, rendering_problems
from ais_megatron.runs.folder import check_can_create


def input_problems(config: Config) -> list[str]:
    """Files and folders that are missing or cannot be written, one line each: the key, its value and what to change."""
    task, tokenizer, problems = config.task, config.tokenizer, []
    paths = {"task.train_path": task.train_path, "task.test_path": task.test_path}
    for name, chosen in config.eval.sets.items():
        paths |= {f"eval.sets.{name}.task.{key}": chosen.task.get(key) for key in ("train_path", "test_path")}
    for key, path in paths.items():
        if path is not None and not Path(path).exists():
            problems.append(
                f"{key}={path}: no such file or folder; set it to a file of problems, see `ais-megatron keys task.{key.rpartition('.')[2]}`"
            )
    if tokenizer.path is not None and not Path(tokenizer.path).exists():
        what = "a .model file of SentencePiece" if tokenizer.kind == "sentencepiece" else "a folder with a Hugging Face tokenizer"
        problems.append(f"tokenizer.path={tokenizer.path}: no such file or folder; give {what}")
    problems += _template_problems(config)
    if config.rollout.engine_traits.replays and not Path(config.rollout.replay_dir or "").is_dir():
        problems.append(f"rollout.replay_dir={config.rollout.replay_dir}: no such folder; give the rollout.save_dir of an earlier run")
    keeps_something = config.sft.steps or (tokenizer.kind == "sentencepiece" and tokenizer.path is None)
    cache = Path(config.sft.cache_dir)
    if keeps_something and not cache.is_dir():  # a cache that exists may be read-only, and hold what this run needs
        try:
            check_can_create(cache)
        except OSError as error:
            problems.append(f"sft.cache_dir={config.sft.cache_dir}: cannot be written ({error}); choose another folder")
    return problems


def _template_problems(config: Config) -> list[str]:
    """What the chat template of a Hugging Face tokenizer lacks or refuses, as far as one question shows it."""
    task, folder = config.task, config.tokenizer.path or config.model.path
    if config.tokenizer.kind != "hf" or folder is None or not (Path(folder) / "tokenizer_config.json").is_file():
        return []
    template, tokens = read_chat_template(folder)
    if template is None:  # or transformers finds one elsewhere; the ranks see it when they load the tokenizer
        return []
    problems = keyword_problems(template, task.template_kwargs, task.system_prompt is not None, f"tokenizer.path={folder}")
    if problems or task.messages_key is not None:  # turns of the user's own may have what a template asks for
        return problems
    return rendering_problems(template, tokens, task.template_kwargs, task.system_prompt, f"tokenizer.path={folder}")
