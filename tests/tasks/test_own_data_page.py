"""docs/own_data.md: its files are those in examples/, its rows parse, its commands are accepted, and its first ones train."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ais_megatron.config import Config, TaskConfig, load_config
from ais_megatron.tasks import make_task
from ais_megatron.tasks.judging import INSTRUCTIONS
from tests.helpers.paths import ROOT
from tests.helpers.ranks import RankPool
from tests.helpers.runs import rows_of, trained

PAGE = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [text for kind, text in BLOCKS if not kind]
ROWS = [text for kind, text in BLOCKS if kind == "json"]


def config_of(command: str, *overrides: str) -> Config:
    program, verb, path, *keys = shlex.split(command.replace("\\\n", " "))
    assert (program, verb) == ("ais-megatron", "train")
    return load_config(ROOT / path, [*keys, *overrides])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config_of(command)


def test_the_pages_rows_are_those_of_the_example() -> None:
    assert (ROOT / "examples" / "own_data" / "train.jsonl").read_text(encoding="utf-8") == ROWS[0]
    assert INSTRUCTIONS["math"] in PAGE.replace("\n", " ")


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_every_row_of_the_page_parses(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "rows.jsonl").write_text(ROWS[number], encoding="utf-8")
    following = next(text for kind, text in BLOCKS[BLOCKS.index(("json", ROWS[number])) :] if not kind)
    settings = {"task.train_path": "null", "task.test_path": f"{tmp_path}/rows.jsonl"}
    task = make_task(config_of(following, *(f"{key}={value}" for key, value in settings.items())).task, 0)
    problems = task.test_problems(9)
    assert [task.reward(problem.truth, problem.solution).value for problem in problems] == [1.0] * ROWS[number].count("\n")


def test_what_a_wrong_row_says_is_on_the_page(tmp_path: Path) -> None:
    for row in ('{"question": "x", "reply": 1}', '{"question": "x", "answer": null}'):
        (tmp_path / "train.jsonl").write_text(row)
        with pytest.raises(ValueError) as caught:
            make_task(TaskConfig(name="qa", train_path=str(tmp_path / "train.jsonl")), 0)
        assert str(caught.value).partition(":1: ")[2] in PAGE


def _trains_from_the_checkout(rank: int, config: Config) -> Path:
    import os

    os.chdir(ROOT)
    return trained(rank, config)


SMALL = ("train.steps=1", "parallel.dp=1", "eval.num_prompts=2", "rollout.group_size=2", "rollout.max_response_tokens=8")


@pytest.mark.parametrize("title", ["own_data.yaml run.dir=runs/mine", "close_enough", "my_data", "drop"])
def test_the_commands_for_a_laptop_train(title: str, ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = (text for text in COMMANDS if title in text)
    overrides = [*SMALL, f"run.dir={tmp_path}/run", f"sft.cache_dir={tmp_path}/cache", "sft.steps=0"]
    monkeypatch.chdir(ROOT)
    if title == "my_data":
        pytest.importorskip("datasets", reason="the `datasets` extra is not installed")
        (script,) = (text for kind, text in BLOCKS if kind == "python")
        monkeypatch.chdir(tmp_path)
        exec(script, {})
        overrides += [f"task.train_path={tmp_path}/my_data", f"task.test_path={tmp_path}/my_data"]
        monkeypatch.chdir(ROOT)
    ranks.run(1, _trains_from_the_checkout, config=config_of(command, *overrides))
    assert [row["step"] for row in rows_of(tmp_path)] == [1]


def test_close_enough_by_hand() -> None:
    task = make_task(TaskConfig(name="qa", reward="examples.close_enough_reward:close_enough", options={"tolerance": 0.1}), 0)
    answers = {"105": 1.0, "110": 1.0, "155": 0.5, "45": 0.5, "201": 0.0, "many": 0.0}
    rewards = {given: task.reward({"answer": "100"}, rf"\boxed{{{given}}}") for given in answers}
    assert {given: reward.value for given, reward in rewards.items()} == pytest.approx(answers)
    assert [given for given, reward in rewards.items() if reward.correct] == ["105", "110"]
    assert task.reward({"answer": ["1", "2"]}, r"\boxed{1}").value == 0.0 == task.reward({"answer": None}, "").value
