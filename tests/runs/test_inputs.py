"""What a configuration names on the disk is checked before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from ais_megatron.config import ConfigError
from ais_megatron.config.reading import build_config
from ais_megatron.runs.inputs import input_problems
from tests.helpers.batches import ARCHITECTURE


def problems_of(**sections: object) -> list[str]:
    return input_problems(build_config({"model": {"architecture": ARCHITECTURE}, **sections}))


def test_what_exists_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("{}")
    assert problems_of(sft={"cache_dir": str(tmp_path / "new" / "cache")}) == []
    assert problems_of(task={"name": "gsm8k", "test_path": str(tmp_path / "test.jsonl")}, sft={"cache_dir": str(tmp_path)}) == []
    assert not (tmp_path / "new").exists(), "checking creates nothing"
    assert problems_of(sft={"cache_dir": "/proc/self", "steps": 40}) == [], "a shared cache may be read-only and hold all that is needed"


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        (
            {"task": {"name": "gsm8k", "test_path": "/nowhere/test.jsonl"}},
            "task.test_path=/nowhere/test.jsonl: no such file or folder; set it",
        ),
        ({"task": {"train_path": "/nowhere"}}, "task.train_path=/nowhere: no such file or folder; set it"),
        (
            {"eval": {"sets": {"a": {"task": {"test_path": "/nowhere/a.jsonl"}}}}},
            "eval.sets.a.task.test_path=/nowhere/a.jsonl: no such file or folder; set it to a file of problems",
        ),
        ({"tokenizer": {"path": "/nowhere/t.model"}}, "tokenizer.path=/nowhere/t.model: no such file or folder; give a .model file"),
        ({"tokenizer": {"kind": "hf", "path": "/nowhere"}}, "tokenizer.path=/nowhere: no such file or folder; give a folder with"),
        (
            {"rollout": {"engine": "replay", "replay_dir": "/nowhere"}},
            "rollout.replay_dir=/nowhere: no such folder; give the rollout.save_dir",
        ),
        ({"sft": {"cache_dir": "/proc/cache", "steps": 40}}, "sft.cache_dir=/proc/cache: cannot be written ("),
    ],
)
def test_what_is_missing_is_named(sections: dict[str, object], line: str) -> None:
    (found,) = problems_of(**sections)
    assert found.startswith(line)


def test_a_folder_that_is_no_run_is_refused_by_its_argument(tmp_path: Path) -> None:
    from ais_megatron.cli import _config_of

    with pytest.raises(ConfigError, match="RUN=.*: is not a run folder, because it has no config.yaml; give the run.dir of a run"):
        _config_of(tmp_path)
