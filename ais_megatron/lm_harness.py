"""Runs EleutherAI's lm-evaluation-harness (the package lm_eval, an optional one) on a run's newest checkpoint.

The checkpoint is exported as a Hugging Face folder, which is deleted afterwards. The harness runs in a process of its own, with its own
model code and prompts, so its figures can be compared with published ones. Nothing is downloaded unless HF_HUB_OFFLINE=0 is set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ais_megatron.config import Config, ConfigError

INSTALL = "pip install 'ais_megatron[lm-eval]'"
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


class HarnessOptions(NamedTuple):
    tasks: str
    """Names of the harness' tasks, or paths of YAML files that describe tasks, separated by commas."""
    limit: float | None = None
    """Number of problems per task, or below 1 their share; None: all."""
    tasks_dir: Path | None = None
    """Folder with further tasks."""
    batch_size: str = "8"
    """A number, or "auto"."""
    chat_template: bool | None = None
    """Whether prompts are wrapped by the tokenizer's chat template; None: if it has one, as in training."""


def check_harness(config: Config, options: HarnessOptions) -> None:
    """Find out, before anything is exported, whether the harness can run.

    Raises:
        ConfigError: it is not installed, it cannot read this run's tokenizer, or a file of a task is missing.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(f"--lm-eval={options.tasks}: the package lm_eval is not installed; install it with {INSTALL}")
    if config.architecture.family.is_diffusion:
        raise ConfigError(
            f"--lm-eval={options.tasks}: the harness' own model code cannot sample from model_type={config.architecture.model_type}; use "
            "`ais-megatron eval` without --lm-eval"
        )
    if config.tokenizer.kind != "hf":
        raise ConfigError(
            f"--lm-eval={options.tasks}: the harness reads Hugging Face tokenizers only, but this run has "
            f"tokenizer.kind={config.tokenizer.kind}; use `ais-megatron eval` without --lm-eval, whose eval.sets work with any tokenizer"
        )
    for name in options.tasks.split(","):
        if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
            raise ConfigError(f"--lm-eval={options.tasks}: {name}: no such file; give a YAML file of the harness, or the name of a task")
    if options.tasks_dir is not None and not options.tasks_dir.is_dir():
        raise ConfigError(f"--lm-eval-tasks-dir={options.tasks_dir}: no such folder; give a folder with YAML files of tasks")


def run_harness(run: Path, options: HarnessOptions) -> dict[str, Any]:
    """Export the newest checkpoint of `run`, let the harness measure it, and return what it reports for each task.

    Raises:
        ConfigError: the run has no checkpoint, or there is no room for its export.
        RuntimeError: the harness failed. Its own output says why.
    """
    from ais_megatron.export.run import export_run  # imports torch

    with tempfile.TemporaryDirectory(prefix="lm_eval-", dir=run) as folder:
        model, results = Path(folder) / "model", Path(folder) / "results"
        export_run(run, model)
        command = harness_command(model, results, options)
        offline = {name: os.environ.get(name, "1") for name in OFFLINE}
        if status := subprocess.run(command, env={**os.environ, **offline}, check=False).returncode:
            raise RuntimeError(f"`{' '.join(command)}` ended with status {status}; its output above says why")
        found = sorted(results.rglob("results_*.json"))
        if not found:
            raise RuntimeError(f"--lm-eval={options.tasks}: the harness ended without an error, but wrote no results")
        return dict(json.loads(found[-1].read_text(encoding="utf-8"))["results"])


def harness_command(model: Path, results: Path, options: HarnessOptions) -> list[str]:
    """The command that measures the Hugging Face folder `model` and writes to the folder `results`."""
    with_template = _has_chat_template(model) if options.chat_template is None else options.chat_template
    arguments = json.dumps({"pretrained": str(model)})  # as JSON, because a path may have a comma
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments, "--tasks", options.tasks]
    command += ["--batch_size", options.batch_size, "--output_path", str(results)]
    command += ["--limit", f"{options.limit:g}"] if options.limit is not None else []
    command += ["--include_path", str(options.tasks_dir)] if options.tasks_dir is not None else []
    return command + (["--apply_chat_template"] if with_template else [])


def _has_chat_template(model: Path) -> bool:
    if (model / "chat_template.jinja").exists():
        return True
    settings = model / "tokenizer_config.json"
    return settings.exists() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
