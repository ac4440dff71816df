"""EleutherAI's lm-evaluation-harness on an exported run. The real one runs if it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ais_megatron import lm_harness
from ais_megatron.cli import app
from ais_megatron.config import ConfigError, build_config, dump_config
from ais_megatron.lm_harness import HarnessOptions, check_harness, harness_command
from tests.helpers.paths import DATA, ROOT
from tests.helpers.ranks import RankPool
from tests.helpers.runs import command, small, trained
from tests.helpers.tokenizers import hf_folder

LOCAL_TASK = ROOT / "configs" / "lm_eval" / "gsm8k_local.yaml"


def test_the_command(tmp_path: Path) -> None:
    options = HarnessOptions("gsm8k", 20, tmp_path, "auto")
    plain = harness_command(tmp_path / "model", tmp_path / "results", options)
    assert plain[:6] == [sys.executable, "-m", "lm_eval", "run", "--model", "hf"] and "--apply_chat_template" not in plain
    assert [plain[plain.index(key) + 1] for key in ("--tasks", "--limit", "--include_path", "--batch_size")] == [
        *("gsm8k", "20", str(tmp_path), "auto")
    ]
    hf_folder(tmp_path / "model", "{{ messages }}", eos_token="<eos>")
    assert "--apply_chat_template" in harness_command(tmp_path / "model", tmp_path / "results", options), "prompts as in training"
    without = harness_command(tmp_path / "model", tmp_path / "results", options._replace(chat_template=False))
    assert "--apply_chat_template" not in without


def test_what_is_refused_before_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_hf = build_config(small(tmp_path, tokenizer={"kind": "hf", "path": str(tmp_path)}))
    monkeypatch.setattr(lm_harness, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"--lm-eval=gsm8k: .* tokenizer.kind=sentencepiece; use `ais-megatron eval` without"):
        check_harness(build_config(small(tmp_path)), HarnessOptions("gsm8k"))
    with pytest.raises(ConfigError, match=r"none.yaml: no such file; give a YAML file of the harness"):
        check_harness(with_hf, HarnessOptions("gsm8k,none.yaml"))
    with pytest.raises(ConfigError, match=r"--lm-eval-tasks-dir=none: no such folder"):
        check_harness(with_hf, HarnessOptions("gsm8k", tasks_dir=Path("none")))
    monkeypatch.setattr(lm_harness, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the package lm_eval is not installed; install it with pip install 'ais_megatron\[lm-eval\]'"):
        check_harness(with_hf, HarnessOptions("gsm8k"))
    monkeypatch.undo()

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(with_hf))
    for arguments, message in (
        ([str(run / "config.yaml"), "--lm-eval", "gsm8k"], "--lm-eval measures the newest checkpoint of a run"),
        ([str(run), "eval.samples=2", "--lm-eval", "gsm8k"], "--lm-eval takes no key=value"),
    ):
        assert message in str(CliRunner().invoke(app, ["eval", *arguments]).exception)


@pytest.mark.slow
def test_gsm8k_from_local_files(ranks: RankPool, tmp_path: Path) -> None:
    """Two problems, a model with random weights: every part is real, and no answer is right."""
    pytest.importorskip("lm_eval", reason="the optional package lm_eval is not installed: pip install 'ais_megatron[lm-eval]'")
    if not (DATA / "gsm8k").is_dir():
        pytest.skip(f"{DATA / 'gsm8k'} is not there")
    data = small(tmp_path, parallel={"dp": 1}, tokenizer={"kind": "hf", "path": str(hf_folder(tmp_path / "hf", eos_token="<eos>"))})
    data["model"]["architecture"] |= {"vocab_size": 260, "max_position_embeddings": 1024}
    data |= {"train": {"steps": 1}, "sft": {"steps": 0}, "checkpoint": {"every": 0}}
    ranks.run(1, trained, config=build_config(data))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "gsm8k").symlink_to(DATA / "gsm8k")
    arguments = ["eval", tmp_path / "run", "--lm-eval", LOCAL_TASK, "--lm-eval-limit", 2, "--out", tmp_path / "out.json"]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}  # not the package that happens to be installed
    done = subprocess.run(command(*arguments), cwd=tmp_path, env=here, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())["lm_eval"]["gsm8k_local"]
    assert figures["exact_match,strict-match"] == 0.0 and 0.0 <= figures["exact_match,flexible-extract"] <= 1.0
    assert "gsm8k_local" in done.stdout and "exact_match" in done.stdout
    assert [path.name for path in (tmp_path / "run").glob("lm_eval-*")] == [], "the exported model is deleted"
