"""Prompts that are too long: named, or left out once and for all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ais_megatron.config import Config, ConfigError, build_config
from ais_megatron.prompts import Share, encode, held_out_prompts, to_prompt, training_prompts, within_limit
from ais_megatron.tasks import Problem, Task, make_task
from ais_megatron.tokenizer import HFTokenizer, make_tokenizer
from tests.helpers.batches import ARCHITECTURE
from tests.helpers.tokenizers import THINKING_TEMPLATE, hf_folder

QUESTIONS = ["short?", "s" * 60 + "?", "brief?", "l" * 80 + "?", "tiny?"]


def config_of(folder: Path, **task: object) -> Config:
    for split, questions in (("train", QUESTIONS), ("test", ["held?", "h" * 90])):
        lines = [json.dumps({"question": question, "answer": 1}) + "\n" for question in questions]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    files = {"train_path": str(folder / "train.jsonl"), "test_path": str(folder / "test.jsonl")}
    return build_config(
        {
            "model": {"architecture": {**ARCHITECTURE, "vocab_size": 300, "max_position_embeddings": 80}},
            "rollout": {"max_response_tokens": 40},
            "tokenizer": {"kind": "hf", "path": str(folder / "tokenizer")},
            "task": {"name": "qa", "instruction": "", **files, **task},
        }
    )


def limited(config: Config) -> tuple[Task, list[str], HFTokenizer]:
    tokenizer = HFTokenizer(str(config.tokenizer.path))
    return *within_limit(make_task(config.task, 3), tokenizer, config), tokenizer


def test_long_prompts_are_left_out_once_and_counted(tmp_path: Path) -> None:
    hf_folder(tmp_path / "tokenizer", eos_token="<eos>")  # a token per byte
    config = config_of(tmp_path, long_prompts="drop")
    task, notes, tokenizer = limited(config)
    why = "(model.architecture.max_position_embeddings=80 less rollout.max_response_tokens=40) and were dropped"
    assert notes == [
        f"2 of 5 training prompts are longer than 40 tokens {why}",
        f"1 of 2 held-out prompts are longer than 40 tokens {why}",
    ]
    alone = Share(0, 1, 0, 1)
    stream = training_prompts(task, tokenizer, 0, 9, alone)
    assert {prompt.text for prompt in stream[:3]} == {"short?", "brief?", "tiny?"} == {prompt.text for prompt in stream[3:6]}
    again, _, _ = limited(config)
    assert training_prompts(again, tokenizer, 4, 5, alone) == stream[4:], "a resumed run sees the same stream"
    assert [prompt.text for prompt in held_out_prompts(task, tokenizer, 9, alone)] == ["held?"]


def test_a_limit_of_the_users_own_counts_the_templates_tokens(tmp_path: Path) -> None:
    hf_folder(tmp_path / "tokenizer", THINKING_TEMPLATE, eos_token="<|im_end|>")
    assert len(HFTokenizer(tmp_path / "tokenizer").encode_prompt("")) == 41
    with pytest.raises(ValueError, match=r"train\.jsonl:1: the prompt has 47 tokens, but at most 40 fit \(task\.max_prompt_tokens=40\)"):
        limited(config_of(tmp_path, max_prompt_tokens=40))


def test_a_long_prompt_is_an_error_that_names_its_line(tmp_path: Path) -> None:
    hf_folder(tmp_path / "tokenizer", eos_token="<eos>")
    with pytest.raises(ValueError) as caught:
        limited(config_of(tmp_path, test_path=str(tmp_path / "train.jsonl"), train_path=None))
    assert str(caught.value) == (
        f"{tmp_path}/train.jsonl:2: the prompt has 61 tokens, but at most 40 fit (model.architecture.max_position_embeddings=80 less "
        "rollout.max_response_tokens=40); 2 of 5 held-out prompts are too long; set task.long_prompts=drop to leave such prompts out, "
        "or make room"
    )
    with pytest.raises(ValueError, match=r"train\.jsonl:1: the prompt has 6 tokens, .* 5 of 5 training prompts are too long; make room$"):
        limited(config_of(tmp_path, max_prompt_tokens=4, long_prompts="drop"))
    with pytest.raises(ConfigError, match=r"^task\.max_prompt_tokens=41: with rollout.max_response_tokens=40 .* allowed: 1 to 40$"):
        config_of(tmp_path, max_prompt_tokens=41)


def test_a_users_reward_and_generated_puzzles_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_folder(tmp_path / "tokenizer", eos_token="<eos>")
    (tmp_path / "judging_half.py").write_text("def half(truth, response, options): return 0.5\n")
    monkeypatch.chdir(tmp_path)
    task, notes, tokenizer = limited(config_of(tmp_path, reward="judging_half:half", long_prompts="drop"))
    assert len(notes) == 2 and task.reward({}, "").value == 0.5 and task.train_problem(0).where.startswith(str(tmp_path / "train.jsonl"))
    puzzles = build_config({"model": {"architecture": ARCHITECTURE}, "task": {"name": "sudoku"}})
    assert within_limit(make_task(puzzles.task, 0), tokenizer, puzzles)[1] == []


def test_turns_are_rendered_and_a_refusal_names_the_row(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m.content }}|{% endfor %}"
    tokenizer = HFTokenizer(hf_folder(tmp_path, template, eos_token="<eos>"))
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    prompt = to_prompt(Problem("user: a ...", {}, None, turns, "f.jsonl:4"), 0, tokenizer)
    assert prompt.text == "user: a ..." and tokenizer.decode(prompt.token_ids) == "a|b|c|"
    with pytest.raises(ValueError, match="^f.jsonl:4: tokenizer.path=.*refuses the prompt: no tools; "):
        encode(Problem("", {}, None, ({"role": "tool", "content": "a"},), "f.jsonl:4"), tokenizer)


def test_a_set_of_held_out_problems_has_its_own_limit_and_template_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """eval.sets: the run's system prompt and template variables are the model's, so a set with another task keeps them."""
    from ais_megatron.evaluation import _prepare
    from ais_megatron.session import Session

    hf_folder(tmp_path / "tokenizer", THINKING_TEMPLATE, eos_token="<|im_end|>")
    base = config_of(tmp_path, instruction="", template_kwargs={"enable_thinking": False}).model_dump()
    base["model"]["architecture"]["max_position_embeddings"] = 256
    same, other, thinking, long = (
        {},
        {"task": {"name": "countdown"}},
        {"task": {"template_kwargs": {"enable_thinking": True}}},
        {"task": {"long_prompts": "drop"}, "max_response_tokens": 150},
    )
    config = build_config(base | {"eval": {"sets": {"same": same, "other": other, "thinking": thinking, "long": long}}})
    task = make_task(config.task, 0)
    tokenizer = make_tokenizer(config, task)
    session = Session(config, task, tokenizer, None, None, None, None, Share(0, 1, 0, 1), None)
    found = {chosen.name: _prepare(session, chosen) for chosen in config.evaluation_sets}
    assert found["same"].session == session
    assert found["other"].session.task.name == "countdown" and found["other"].session.tokenizer is tokenizer
    assert tokenizer.decode(tokenizer.encode_prompt("1")).endswith("</think>\n\n")
    assert tokenizer.decode(found["thinking"].session.tokenizer.encode_prompt("1")).endswith("assistant\n")
    assert [prompt.text for prompt in found["long"].prompts] == ["held?"], "the limit of training prompts stays what it was"
    assert capsys.readouterr().out == (
        "eval.sets.long: 1 of 2 held-out prompts are longer than 106 tokens (model.architecture.max_position_embeddings=256 less "
        "rollout.max_response_tokens=150) and were dropped\n"
    )
    plain = {key: value for key, value in base.items() if key not in ("task", "tokenizer")}
    with pytest.raises(
        ConfigError, match=r"^eval\.sets\.x\.task\.system_prompt='S': needs a chat template, which tokenizer\.kind=sentence"
    ):
        build_config(plain | {"eval": {"sets": {"x": {"task": {"system_prompt": "S"}}}}})
