"""What a configuration names on the disk is checked before anything starts."""

from __future__ import annotations

import json
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
    from ais_megatron.runs.folder import config_of

    with pytest.raises(ConfigError, match="RUN=.*: is not a run folder, because it has no config.yaml; give the run.dir of a run"):
        config_of(tmp_path)


def test_a_chat_template_is_tried_before_anything_starts(tmp_path: Path) -> None:
    def problems(name: str, template: str | list[object], **task: object) -> list[str]:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "bos_token": {"content": "<s>"}}))
        return problems_of(tokenizer={"kind": "hf", "path": str(tmp_path / name)}, task=task)

    greeting = "{{ bos_token }}{{ pad_token }}{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}"
    assert problems("fine", greeting) == [], "a special token and a field that are not there are no mistakes"
    assert problems("fine", [{"name": "default", "template": greeting}], system_prompt="S") == []
    (line,) = problems("hole", "You work for {{ company }}." + greeting)
    assert line.endswith(
        "hole: its chat template refuses the prompt: 'company' is not given; give the variables that it needs in task.template_kwargs "
        "(now: nothing), and check task.system_prompt and the roles of the turns"
    )
    assert problems("hole", "You work for {{ company }}." + greeting, template_kwargs={"company": "us"}) == []
    unread = problems("fine", greeting, template_kwargs={"thinking": False, "bos_tokens": 1})
    assert [line.partition("never")[2] for line in unread] == [
        " reads 'thinking'; it reads none",
        " reads 'bos_tokens'; it reads none; did you mean bos_token?",
    ]
    optional = "{% if date is not defined %}{% set date = 'today' %}{% endif %}{{ date }}{% generation %}x{% endgeneration %}"
    assert problems("date", optional) == problems("date", optional, template_kwargs={"date": "now"}) == []
    (line,) = problems("strict", "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}", system_prompt="S")
    assert "strict: its chat template refuses the prompt: no system; " in line
    assert problems("bent", "{% if %}", template_kwargs={"x": 1}) == [], "transformers says what is wrong with it"
