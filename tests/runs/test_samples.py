"""samples.jsonl: pieces of tokens, repetition, garbled texts, what a line holds, and how many steps a page reads."""

import json
import time
from types import SimpleNamespace

import pytest

from ais_megatron.batch import Prompt, Rollout
from ais_megatron.config import build_config
from ais_megatron.runs.metrics import Sinks
from ais_megatron.runs.samples import SAMPLES_FILE, TokenTexts, chosen_lines, divergence, is_garbled, repetition, sample_of
from tests.helpers.batches import ARCHITECTURE

REWARD = SimpleNamespace(value=0.1, well_formed=True, correct=False, reason="3 is not 4")


class Bytes:
    """A byte-level tokenizer that, as some do, removes the space before the first token of a text. Token 300 ends a sequence."""

    def decode(self, ids):
        text = bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
        return text.removeprefix(" ")


def texts():
    return TokenTexts(Bytes().decode, anchor=ord("1"))


def test_pieces_of_bytes_are_whole_characters_with_their_spaces():
    ids = [*" aé 漢🙂".encode(), 300]
    pieces = texts().pieces(ids)
    assert pieces == [" ", "a", "é", "", " ", "漢🙂", *[""] * 6, ""]
    assert len(pieces) == len(ids) and "".join(pieces) == " aé 漢🙂"


def test_pieces_of_broken_bytes_stay_visible():
    assert texts().pieces([0xFF]) == ["\ufffd"]
    assert texts().pieces([ord("a"), 0xC3, ord("b")]) == ["a", "\ufffd", "b"]
    assert texts().pieces([]) == []


def test_repetition_by_hand():
    assert repetition([1, 2, 3]) == 0.0 and repetition([1, 2, 3, 4]) == 0.0
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)  # 1234 2341 3412 4123, and 1234 again
    assert repetition([7] * 103) == pytest.approx(0.99)


def test_garbled_texts():
    fine = ["", "<answer>1+2</answer>\n\tdone", "naïve 漢字 🙂 עברית ½", "a" * 200 + "\ufffd"]
    assert [is_garbled(text) for text in fine] == [False] * 4
    broken = ["\ufffd", "a" * 50 + "\ufffd", "ab\x07", "\ue000\ue001 text", " \u2047 \u2047 1"]
    assert [is_garbled(text) for text in broken] == [True] * 5
    assert not is_garbled("half an emoji at the limit \ufffd", cut=True)


def sample(step=1, ids=b"a+b", old=(-0.1, -0.2, -0.3), rollout=(-0.1, -0.25, -0.123456789)):
    made = Rollout(Prompt(5, "1 2=3:", (1, 2), {}), (*ids,), rollout, "stop", step - 1)
    return sample_of(step, made, REWARD, -0.5, old, Bytes().decode, texts())


def test_a_line_holds_what_a_reader_needs():
    assert sample() == {
        "step": 1,
        "prompt_index": 5,
        "prompt": "1 2=3:",
        "response": "a+b",
        "reward": 0.1,
        "correct": False,
        "well_formed": True,
        "reason": "3 is not 4",
        "advantage": -0.5,
        "finish_reason": "stop",
        "weight_version": 0,
        "length": 3,
        "repetition": 0.0,
        "garbled": False,
        "tokens": ["a", "+", "b"],
        "rollout_logprobs": [-0.1, -0.25, -0.12346],
        "old_logprobs": [-0.1, -0.2, -0.3],
    }
    assert divergence(sample()) == pytest.approx((0 + 0.0012710964 + 0.0147043) / 3, rel=1e-4)
    assert divergence(sample(old=None)) is None and sample(old=None)["old_logprobs"] is None


def sinks(folder, is_main=True, **metrics):
    return Sinks(build_config({"model": {"architecture": ARCHITECTURE}, "metrics": metrics}), folder, is_main)


def steps_in(folder):
    return [json.loads(line)["step"] for line in (folder / SAMPLES_FILE).read_text().splitlines()]


def test_samples_are_cut_with_the_metrics_when_a_run_is_resumed(tmp_path):
    with sinks(tmp_path) as log:
        for step in (1, 2, 4):
            log.log_samples([sample(step), sample(step)])
        log.truncate_after(2)
        assert steps_in(tmp_path) == [1, 1, 2, 2]
        log.log_samples([sample(4)])
    with (tmp_path / SAMPLES_FILE).open("a") as file:
        file.write('{"step": 6, "torn')
    with sinks(tmp_path) as log:
        log.truncate_after(4)
        log.log_samples([sample(6)])
    assert steps_in(tmp_path) == [1, 1, 2, 2, 4, 6]


def test_other_ranks_and_steps_without_samples_write_nothing(tmp_path):
    with sinks(tmp_path, is_main=False) as log:
        log.log_samples([sample()])
    with sinks(tmp_path) as log:
        log.log_samples([])
    assert list(tmp_path.iterdir()) == []


def test_text_that_no_file_can_hold_is_replaced(tmp_path):
    with sinks(tmp_path) as log:
        log.log_samples([sample() | {"reason": "\ud800"}])
    assert json.loads((tmp_path / SAMPLES_FILE).read_text())["reason"] == "?"


def test_wandb_gets_a_table(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with sinks(tmp_path, wandb="offline") as log:
        logged = []
        monkeypatch.setattr(log._wandb, "log", logged.append)
        log.log_samples([sample(3)])
    ((row,),) = [entry["samples"].data for entry in logged]
    table = dict(zip(logged[0]["samples"].columns, row, strict=True))
    assert logged[0]["step"] == 3 and table["response"] == "a+b" and table["reason"] == "3 is not 4"
    assert table["divergence_severity"] == pytest.approx(divergence(sample(3)))


def written(folder, steps, per_step=2):
    path = folder / SAMPLES_FILE
    with sinks(folder) as log:
        for step in steps:
            log.log_samples([sample(step)] * per_step)
    return path, len(path.read_bytes()) // (len(steps) * per_step)


def test_a_page_reads_the_newest_step_and_earlier_ones_at_equal_distances(tmp_path):
    path, size = written(tmp_path, range(1, 10))
    samples, kept, steps = chosen_lines(path, budget=100 * size)
    assert kept == steps == list(range(1, 10)) and [s["step"] for s in samples] == [s for s in steps for _ in (0, 1)]
    assert chosen_lines(path, budget=10 * size)[1] == [1, 3, 5, 7, 9]
    assert chosen_lines(path, budget=4 * size)[1] == [1, 9] or chosen_lines(path, budget=4 * size)[1] == [4, 9]
    samples, kept, _ = chosen_lines(path, budget=1)
    assert kept == [9] and len(samples) == 1


def test_an_incomplete_last_line_is_no_sample_and_a_damaged_one_is_named(tmp_path):
    path, _ = written(tmp_path, [1])
    with path.open("a") as file:
        file.write('{"step": 2, "torn')
    assert chosen_lines(path, 10**6)[1] == [1]
    path.write_text('{"step": 1, broken}\n')
    with pytest.raises(ValueError, match=r"samples\.jsonl: a line is not a sample"):
        chosen_lines(path, 10**6)


def test_a_long_response_costs_milliseconds():
    """The tokens of a long response in its language's usual words; generous, because other tests share the machine."""
    ids = [*("the duck lays 12 eggs in a naïve way. " * 200).encode()]
    known = texts()
    began = time.process_time()
    made = Rollout(Prompt(0, "", (1,), {}), tuple(ids), (-0.1,) * len(ids), "length", 0)
    sample_of(1, made, REWARD, 0.0, (-0.2,) * len(ids), Bytes().decode, known)
    assert len(ids) > 7000 and time.process_time() - began < 0.5
