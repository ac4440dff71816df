r"""A user's own questions and answers: columns, turns, judges, and every message about a bad row."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from ais_megatron.config import Config, ConfigError, TaskConfig, build_config, load_config
from ais_megatron.sft import cached_folder
from ais_megatron.tasks import Problem, make_task
from ais_megatron.tasks.judging import INSTRUCTIONS, is_same_math, is_same_text, read_letter, read_plain_number
from ais_megatron.tasks.qa import QA
from tests.helpers.batches import ARCHITECTURE
from tests.helpers.ranks import RankPool
from tests.helpers.runs import rows_of, small, trained
from tests.helpers.tokenizers import THINKING_TEMPLATE, hf_folder


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def task_of(folder: Path, *rows: object, **settings: object) -> QA:
    return make_task(TaskConfig(name="qa", test_path=write(folder / "rows.jsonl", *rows), **settings), 0)


def problem_of(folder: Path, row: object, **settings: object) -> Problem:
    (problem,) = task_of(folder, row, **{"instruction": "", **settings}).test_problems(9)
    return problem


# --- columns -----------------------------------------------------------------------------------------------------------


def test_files_in_the_columns_of_aime_and_amc_need_no_keys(tmp_path: Path) -> None:
    rows = [
        {"id": 60, "problem": "A?", "solution": r"long, so \boxed{033}", "answer": "033", "url": "u", "year": "2031"},  # AIME
        {"problem": "B?", "answer": "70", "id": "0"},  # AIME, another publisher
        {"id": 3, "problem": "C?", "answer": 142.0, "url": "u"},  # AMC
        {"id": 1, "problem": "D?", "solution": r"\boxed{204}", "url": "u"},  # AIME without a column of answers
    ]
    task = task_of(tmp_path, *rows, reward="math")
    problems = task.test_problems(9)
    assert [problem.truth for problem in problems] == [{"answer": "033"}, {"answer": "70"}, {"answer": "142"}, {"answer": "204"}]
    assert problems[0].text == "A?\n" + INSTRUCTIONS["math"] and problems[2].where == f"{tmp_path}/rows.jsonl:3"
    assert [task.reward(problem.truth, problem.solution).value for problem in problems] == [1.0] * 4
    for problem, right, wrong in zip(problems, ("33", "$70.0$", "142.0", "204"), ("3", "7", "1420", "402"), strict=True):
        assert task.reward(problem.truth, rf"<think>\boxed{{9}}</think>So it is \boxed{{{right}}}.").value == 1.0
        assert task.reward(problem.truth, rf"\boxed{{{wrong}}}").value == pytest.approx(0.1)


def test_columns_by_key_and_by_their_usual_names(tmp_path: Path) -> None:
    assert problem_of(tmp_path, {"question": "q", "prompt": "p", "solution": "s", "answer": "a"}).text == "p"
    row = {"q": " mine ", "prompt": "p", "reward_model": {"ground_truth": "72", "style": "rule"}, "a.b": 5}
    problem = problem_of(tmp_path, row, prompt_key="q", answer_key="reward_model.ground_truth")
    assert (problem.text, problem.truth) == ("mine", {"answer": "72"})
    assert problem_of(tmp_path, row, answer_key="a.b").truth == {"answer": "5"}, "a column whose name has a dot comes first"
    assert problem_of(tmp_path, {"prompt": "p", "answer": "so it is 1+1.\n#### 2"}).truth == {"answer": "2"}
    assert problem_of(tmp_path, {"prompt": "p", "answer": "#### 2"}, reward="exact").truth == {"answer": "#### 2"}
    assert problem_of(tmp_path, {"prompt": "p", "answer": ["1", 2.5, 1e-7]}).truth == {"answer": ["1", "2.5", "0.0000001"]}
    assert problem_of(tmp_path, {"prompt": "p", "answer": [3]}).truth == {"answer": "3"}


def test_instructions_follow_the_reward_or_the_key(tmp_path: Path) -> None:
    row = {"prompt": "p", "answer": "A"}
    assert {kind: task_of(tmp_path, row, reward=kind).test_problems(1)[0].text for kind in INSTRUCTIONS} == {
        kind: f"p\n{text}" for kind, text in INSTRUCTIONS.items()
    }
    assert task_of(tmp_path, row, instruction="Say it.").test_problems(1)[0].text == "p\nSay it."


def test_turns(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a", "name": None},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    for row, settings in (
        ({"messages": turns, "answer": 1}, {}),
        ({"prompt": turns, "answer": 1}, {}),
        ({"prompt": "p", "chat": {"turns": turns}, "answer": 1}, {"messages_key": "chat.turns"}),
        ({"conversation": json.dumps(turns), "answer": 1}, {}),
    ):
        problem = problem_of(tmp_path, row, instruction="Now.", **settings)
        assert problem.text == "system: Be kind.\nuser: a\nassistant: b\nuser: c\nNow."
        assert problem.messages == (*turns[:1], {"role": "user", "content": "a"}, turns[2], {"role": "user", "content": "c\nNow."})
    alone = problem_of(tmp_path, {"messages": turns[3:], "answer": 1})
    assert (alone.text, alone.messages) == ("c", None), "a single question needs no chat template"


def test_an_own_reward_gets_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_judge.py").write_text(
        "def judge(truth, response, options):\n"
        "    return float(response == f\"{truth['answer']} {truth['row']['unit']} {options['end']}\")\n"
    )
    monkeypatch.chdir(tmp_path)
    own = {"reward": "own_judge:judge", "options": {"end": "!"}}
    task = task_of(tmp_path, {"question": "q", "answer": 3, "unit": "kg"}, **own)
    (problem,) = task.test_problems(9)
    assert (problem.text, problem.solution) == ("q", None)
    assert problem.truth == {"answer": 3, "row": {"answer": 3, "unit": "kg"}}
    assert task.reward(problem.truth, "3 kg !").correct and task.reward(problem.truth, "3 kg").value == 0.0
    assert task_of(tmp_path, {"question": "q"}, **own).test_problems(1)[0].truth == {"answer": None, "row": {}}


def test_csv_rows(tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question", "options", "answer"], ["q", '["red", "blue"]', "blue"], ["r, s?", '["x", "y"]', "0"]])
    first, second = make_task(TaskConfig(name="qa", reward="choice", test_path=str(tmp_path / "rows.csv")), 0).test_problems(9)
    assert first.text.startswith("q\nA. red\nB. blue\n") and first.truth == {"answer": "B", "choices": ["red", "blue"]}
    assert second.text.startswith("r, s?\nA. x") and second.truth["answer"] == "A"


def test_parquet_and_a_saved_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the `datasets` extra is not installed")
    pytest.importorskip("pyarrow", reason="pyarrow of the `datasets` extra is not installed")
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}], "choices": {"text": ["no", "yes"], "label": ["A", "B"]}, "answer": n}
        for n in range(2)
    ]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "rows.parquet")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        problems = make_task(TaskConfig(name="qa", reward="choice", test_path=str(path), instruction=""), 0).test_problems(9)
        assert [(problem.text, problem.truth["answer"]) for problem in problems] == [("0?\nA. no\nB. yes", "A"), ("1?\nA. no\nB. yes", "B")]


# --- judges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("142.0", "142", True),
        ("033", "33", True),
        ("33", "$033$", True),
        ("1,080", "1080.", True),
        ("0.5", r"\frac{1}{2}", True),
        ("5", "٥", False),
        ("-3", "3", False),
        ("33", "33 or 34", False),
    ],
)
def test_math(gold: str, answer: str, same: bool) -> None:
    assert is_same_math(gold, answer) is same


def test_exact() -> None:
    assert is_same_text("New  York", " New York\n") and is_same_text("1,000", "1000.0") and is_same_text("N", "N")
    assert not is_same_text("New York", "new york") and not is_same_text("N", "n") and not is_same_text("1.5", "1.5 kg")
    assert [read_plain_number(text) for text in ("", ".", "-", "1e3", "٥", "1 2", "12,34")] == [None] * 7


def test_choices_are_named_by_letter_or_text() -> None:
    choices = ["Paris", "Rome", "a city"]
    for answer in ("B", "b", "(B)", "B.", "B) Rome", "B: rome", "Rome", " rome ", r"\text{B}", "**B**", r"\textbf{(B)}"):
        assert read_letter(answer, choices) == "B", answer
    for answer in ("D", "A or B", "A. or B.", "A) Rome", "BA", "Paris Rome", "", "2", "B Rome"):
        assert read_letter(answer, choices) is None, answer
    assert read_letter("(d)", None) == "D" and read_letter("D. any text", None) == "D"
    assert read_letter("B", ["B", "A"]) == "A", "a choice may itself be a letter"


def test_answers_of_multiple_choice(tmp_path: Path) -> None:
    def letter(answer: object, choices: object = ("red", "blue", "0")) -> object:
        return problem_of(tmp_path, {"question": "q", "choices": choices, "answer": answer}, reward="choice").truth["answer"]

    assert [letter(answer) for answer in ("B", "(b)", "blue", 1, 1.0, "1")] == ["B"] * 6
    assert letter(0) == "A", "a number is an index, although a choice reads 0"
    assert letter(["A", "blue"]) == ["A", "B"]
    labelled = {"text": ["w", "x", "y"], "label": ["1", "2", "3"]}
    assert [letter(label, labelled) for label in ("1", "2", "3")] == ["A", "B", "C"]
    task = task_of(tmp_path, {"question": "Which? A. x B. y", "answer": "B"}, reward="choice")
    (problem,) = task.test_problems(1)
    assert problem.truth == {"answer": "B"}
    rewards = [task.reward(problem.truth, f"<answer>{answer}</answer>") for answer in ("B", "A", "both", "\u200b")]
    assert [reward.value for reward in rewards] == pytest.approx([1.0, 0.1, 0.0, 0.0])
    assert [reward.reason for reward in rewards] == [
        "answer B from the <answer> pair; equal to B",
        "answer A from the <answer> pair; expected B",
        "answer both from the <answer> pair names no single choice; expected B",
        "the <answer> pair has characters that cannot be printed",
    ]


def test_any_accepted_answer_is_right(tmp_path: Path) -> None:
    for kind, right in (("exact", ["9:15 pm", "21:15"]), ("math", ["\\boxed{9:15 pm}", "21:15"])):
        task = task_of(tmp_path, {"question": "q", "answer": ["21:15", "9:15 pm"]}, reward=kind)
        (problem,) = task.test_problems(1)
        assert all(task.reward(problem.truth, f"<answer>{text}</answer>").correct for text in right)
        wrong = task.reward(problem.truth, "<answer>9:16</answer>")
        assert not wrong.correct and wrong.reason == "answer 9:16 from the <answer> pair; expected 21:15 or 9:15 pm"


# --- bad input ---------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "q"}
BAD: list[tuple[object, dict[str, object], str]] = [
    (
        {"q": "x", "answer": 1},
        {},
        "none of the columns prompt, question, problem, query, instruction, input, messages, conversation, conversations is there; "
        "columns found: q, answer; set task.prompt_key to one of them",
    ),
    (
        {"question": "x", "reply": 1},
        {},
        "none of the columns answer, final_answer, ground_truth, target, output, label, answerKey, solution is there; columns found: "
        "question, reply; set task.answer_key to one of them",
    ),
    (
        {"question": "x", "answer": 1},
        {"prompt_key": "questions"},
        "column 'questions' (task.prompt_key) is missing; columns found: question, answer; did you mean question?",
    ),
    ({"question": "x", "a": {"b": 1}}, {"answer_key": "a.c"}, "column 'a.c' (task.answer_key) is missing; columns found: question, a"),
    ({"question": " ", "answer": 1}, {}, "column 'question' must be text, got ' '"),
    ({"question": None, "answer": 1}, {}, "column 'question' must be text or a list of {role, content} turns, got None"),
    ({"question": [], "answer": 1}, {}, "column 'question' must be text or a list of {role, content} turns, got []"),
    ({"messages": "hi", "answer": 1}, {}, "column 'messages' (task.messages_key) is not a list of turns in JSON (Expecting value: "),
    ({"messages": [USER, {"role": "user"}], "answer": 1}, {}, "turn 2: needs role and content as text, got {'role': 'user'}"),
    ({"messages": ["q"], "answer": 1}, {}, "column 'messages', turn 1: needs role and content as text, got 'q'"),
    ({"messages": [USER, {"role": "assistant", "content": "a"}], "answer": 1}, {}, "ends with a turn of the assistant, but the model"),
    (
        {"messages": [{"role": "system", "content": "s"}], "answer": 1},
        {},
        "column 'messages' has no turn with the role 'user', which",
    ),
    *(
        (
            {"question": "x", "answer": value},
            {},
            f"column 'answer' (task.answer_key) must be text, a finite number or a list of them, got {value!r}",
        )
        for value in (None, "", " ", True, [], {"a": 1})
    ),
    ('{"question": "x", "answer": NaN}', {}, "must be text, a finite number or a list of them, got nan"),
    (
        {"question": "x", "answer": "y" * 513},
        {},
        "column 'answer' (task.answer_key) has an answer of 513 characters; at most 512 are read, unless it is a solution with its answer "
        r"in \boxed{}; name the column with the final answers",
    ),
    (
        {"question": "x", "answer": "y" * 513},
        {"reward": "exact"},
        "at most 512 are read; name the column with the final answers",
    ),
    (
        {"question": "x", "answer": 1},
        {"reward": "choice"},
        "column 'answer' (task.answer_key) must be a letter from A to Z, got 1; task.choices_key names the column of choices",
    ),
    (
        {"question": "x", "choices": ["u", "v"], "answer": "C"},
        {"reward": "choice"},
        "must be a letter from A to B, the text of a choice, or its index from 0, got 'C'",
    ),
    (
        {"question": "x", "choices": ["1", "0"], "answer": "0"},
        {"reward": "choice"},
        "column 'answer' (task.answer_key): '0' may mean choice A or B; write the letter",
    ),
    *(
        (
            {"question": "x", "choices": value, "answer": "A"},
            {"reward": "choice"},
            f"column 'choices' must be a list of 2 to 26 texts, the choices, got {value!r}",
        )
        for value in (["u"], "u or v", None, ["u", ""])
    ),
    (
        {"question": "x", "answer": "A"},
        {"reward": "choice", "choices_key": "opts"},
        "column 'opts' (task.choices_key) is missing; columns found: question, answer",
    ),
]


@pytest.mark.parametrize(("row", "settings", "complaint"), BAD)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: object, settings: dict[str, object], complaint: str) -> None:
    good = '{"question": "g", "messages": [{"role": "user", "content": "g"}], "questions": "g", "a": {"c": "A"}, "opts": ["u", "v"], '
    good += '"answer": "A"}'
    with pytest.raises(ValueError) as caught:
        task_of(tmp_path, good, row, **settings)
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl:2: ") and complaint in str(caught.value)


MODEL = {"model": {"architecture": ARCHITECTURE}}
REFUSED: list[tuple[dict[str, object], str]] = [
    ({"name": "qa"}, r"^task.name=qa: its problems come from files; set task.test_path"),
    ({"name": "qaa"}, r"unknown task; allowed: countdown, .*, qa, or module:Class; did you mean qa\?$"),
    (
        {"name": "qa", "test_path": "t", "reward": "choise"},
        r"^task.reward='choise': unknown reward; allowed: math, exact, choice, module:function or http.*; did you mean choice\?$",
    ),
    ({"name": "qa", "test_path": "t", "reward": "judge"}, r"^task.reward='judge': write module:function, for example"),
    (
        {"name": "gsm8k", "test_path": "t", "reward": "math"},
        r"^task.reward=math: judges only the answers of task.name=qa, and task",
    ),
    ({"prompt_key": "q"}, r"^task.prompt_key='q': only task.name=qa reads it; leave it out, or set task.name=qa$"),
    ({"instruction": ""}, r"^task.instruction='': only task.name=qa reads it"),
    (
        {"name": "qa", "test_path": "t", "prompt_key": "q", "messages_key": "m"},
        r"^task.prompt_key=q with task.messages_key=m: a prompt comes from one column; leave out one of them",
    ),
    (
        {"name": "qa", "test_path": "t", "reward": "math", "options": {"x": 1}},
        r"^task.options=\{'x': 1\}: nothing reads them, because task.name=qa is built in and task.reward is math; leave out",
    ),
    ({"name": "qa", "test_path": "t", "prompt_style": "instruct"}, r"^task.prompt_style=instruct: only countdown and sudoku have it;"),
    ({"prompt_style": "chat"}, r"^task.prompt_style='chat': input should be 'terse' or 'instruct'"),
    ({"system_prompt": "s"}, r"^task.system_prompt='s': needs a chat template, which tokenizer.kind=sentencepiece does not have; leave it"),
    ({"template_kwargs": {"enable_thinking": False}}, r"^task.template_kwargs=\{'enable_thinking': False\}: needs a chat template"),
    ({"name": "qa", "test_path": "t", "messages_key": "m"}, r"^task.messages_key='m': needs a chat template"),
    ({"long_prompts": "dropp"}, r"^task.long_prompts='dropp': input should be 'error' or 'drop'; did you mean drop\?$"),
    ({"answer_kye": "a"}, r"^task.answer_kye: unknown key; did you mean task.answer_key\?$"),
]


@pytest.mark.parametrize(("task", "message"), REFUSED)
def test_settings_that_cannot_work_are_refused_when_the_configuration_is_read(task: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config({**MODEL, "task": task})


def test_a_starting_policy_belongs_to_the_answers_it_learned(tmp_path: Path) -> None:
    def folder(**task: object) -> Path:
        return cached_folder(build_config({**MODEL, "task": {"name": "qa", "test_path": "t", **task}}))

    assert folder(reward="math") != folder(reward="exact"), "they ask for different answers"


# --- a run -------------------------------------------------------------------------------------------------------------


def config_of(folder: Path, **task: object) -> Config:
    rows = [
        {"messages": [USER, {"role": "assistant", "content": "?"}, {"role": "user", "content": f"{n}+1"}], "answer": n} for n in range(6)
    ]
    data = small(folder, parallel={"dp": 1}, sft={"steps": 0}, train={"steps": 1, "optimizer": {"lr": 1e-3}})
    data["model"]["architecture"] |= {"vocab_size": 300, "max_position_embeddings": 256}
    data["tokenizer"] = {"kind": "hf", "path": str(hf_folder(folder / "tokenizer", THINKING_TEMPLATE, eos_token="<|im_end|>"))}
    data["task"] = {
        "name": "qa",
        "train_path": write(folder / "train.jsonl", *rows[:5], {"messages": [{"role": "user", "content": "x" * 300}], "answer": 1}),
        "test_path": write(folder / "test.jsonl", *rows[5:]),
        "messages_key": "messages",
        "long_prompts": "drop",
        "system_prompt": "Add.",
        "template_kwargs": {"enable_thinking": False},
        **task,
    }
    return build_config(data)


def says(rank: int, folder: str, config: Config) -> str:
    """What a run prints that starts in `folder`, where the user's module is."""
    import contextlib
    import io
    import os

    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        trained(rank, config)
    return said.getvalue()


def test_a_chat_models_data_train(ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns, a template with keywords, a prompt that is left out for its length, and a reward of the user's own."""
    (tmp_path / "vowels.py").write_text("def share(truth, response, options): return sum(c in 'aeiou' for c in response) / 12\n")
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, reward="vowels:share")
    (said,) = ranks.run(1, says, folder=str(tmp_path), config=config)
    (row,) = rows_of(tmp_path)
    assert row["step"] == 1 and 0.0 <= row["reward_mean"] <= 1.0
    assert load_config(tmp_path / "run" / "config.yaml") == config
    assert "1 of 6 training prompts are longer than 244 tokens (model.architecture.max_position_embeddings=256 less " in said
