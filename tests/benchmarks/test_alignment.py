"""How close aligned trainers come to the engine, measured end to end on a model of a few thousand parameters."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.paths import ROOT
from tests.helpers.runs import write


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    rollout = {"prompts_per_step": 4, "group_size": 4, "max_response_tokens": 12, "quantization": "fp4_e2m1", "kv_cache": "fp8_e4m3"}
    out = tmp_path / "figures.json"
    command = [sys.executable, ROOT / "benchmarks" / "alignment.py", write(tmp_path, rollout=rollout), "--batches", "1", "--json", out]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())["trainers"]
    assert list(figures) == ["bf16", "fp8_weights_aligned", "fp8_aligned"]
    assert figures["fp8_aligned"]["D"][0] < 0.1 * figures["bf16"]["D"][0]


def test_divergence_counts_tokens_and_its_error_responses(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    alignment = importlib.import_module("alignment")
    ours, theirs = torch.tensor([[0.0, 0.5, 9.0], [0.0, 0.0, 0.0]]), torch.zeros(2, 3)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    one = float(torch.expm1(torch.tensor(0.5)) - 0.5)
    value, error = alignment.divergence([ours], [theirs], [mask])
    assert value == pytest.approx(one / 5)
    assert error == pytest.approx(((one - 2 * one / 5) ** 2 + (3 * one / 5) ** 2) ** 0.5 / 5)
