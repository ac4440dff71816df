"""The example that makes arithmetic problems from GSM8K's solutions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ais_megatron.config import TaskConfig
from ais_megatron.tasks import make_task
from examples import gsm8k_calculations


def test_calculations_become_problems_of_qa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = "She sold 48/2 = <<48/2=24>>24 in May, 48+24 = <<48+24=72>>72 in all, and paid $<<72*.5=36>>36. Again <<48/2=24>>24.\n#### 36"
    test = "That is <<48+24=72>>72 and <<100-30=70>>70.\n#### 70"
    (source := tmp_path / "gsm8k").mkdir()
    for split, solution in (("train", train), ("test", test)):
        (source / f"{split}.jsonl").write_text(json.dumps({"question": "?", "answer": solution}) + "\n")
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["gsm8k_calculations", str(source), str(out)])
    gsm8k_calculations.main()
    rows = {split: [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()] for split in ("train", "test")}
    assert rows["train"] == [{"question": "What is 48 / 2?", "answer": 24}], "once, without decimals, and without those of the test file"
    assert sorted(row["answer"] for row in rows["test"]) == [70, 72]

    config = TaskConfig(name="qa", reward="exact", train_path=str(out / "train.jsonl"), test_path=str(out / "test.jsonl"))
    task = make_task(config, 0)
    problem = task.train_problem(0)
    assert problem.solution is not None and task.reward(problem.truth, problem.solution).correct
