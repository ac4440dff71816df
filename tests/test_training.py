"""Whole runs: the command line as a user types it, and bad input on all ranks together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from ais_megatron.cli import app
from ais_megatron.config import build_config, load_config
from ais_megatron.runs.profiling import read_profiles
from tests.helpers.paths import ROOT
from tests.helpers.ranks import RankPool
from tests.helpers.runs import assert_same_rows, command, refusal, rows_of, run, samples_of, small, trained, write

ROW_KEYS = set(
    "step alpha weight_reliability weight_reliability_raw divergence_severity variance_amplification k1_kl ppl_ratio chi2_token "
    "is_weight_mean is_weight_min is_weight_max fraction_truncated prob_diff_mean prob_diff_max reward_mean reward_std accuracy "
    "divergence_by_position fraction_rejected mean_weight prompts_sampled reference_kl "
    "repetition_at_the_end unlikely_fraction rank_work_max_over_mean microbatch_work_max_over_mean computed_over_real_tokens "
    "response_length_mean finished_fraction zero_signal_groups solved_groups distinct_responses "
    "loss entropy grad_norm lr clip_fraction policy_ratio_mean "
    "num_response_tokens tokens_per_second staleness mixed_version_fraction "
    "dropped_fraction stale_fraction idle/trainer idle/engine q_amax kv_saturated_fraction time/generate time/reward time/logprobs "
    "time/diagnose time/train time/calibrate time/sync time/step".split()
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of three steps on two ranks that `train` started itself."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run("train", write(folder))


def test_the_run_folder_holds_what_scripts_rely_on(finished: tuple[Path, str]) -> None:
    folder, output = finished
    run_dir = folder / "run"
    assert load_config(run_dir / "config.yaml") == load_config(folder / "config.yaml")
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row.keys() >= ROW_KEYS
    assert "held_out_accuracy" in rows[-1]
    evaluations = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [(row["step"], row["set"], row["problems"]) for row in evaluations] == [(0, "held_out", 8), (3, "held_out", 8)]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert set(summary) == {
        *("start_accuracy", "final_accuracy", "mean_alpha", "mean_weight_reliability"),
        *("mean_divergence_severity", "tokens_per_second", "wall_seconds"),
    }
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step_000002", "step_000003"]
    assert [path.name for path in (run_dir / "report").iterdir()] == ["index.html"]
    samples = samples_of(folder)
    assert [sample["step"] for sample in samples] == [1] * 4 + [3] * 4, "the first and the last step, what the main rank generated"
    assert_samples_fit(samples)
    assert "held-out pass@1 at the end" in output and str(run_dir / "report" / "index.html") in output
    assert "Warning" not in output, output


def assert_samples_fit(samples: list[dict[str, object]]) -> None:
    for sample in samples:
        assert sample["length"] == len(sample["tokens"]) == len(sample["rollout_logprobs"]) == len(sample["old_logprobs"])
        assert "".join(sample["tokens"]) == sample["response"] and sample["reward"] >= 0.0
        ratios = [old - new for old, new in zip(sample["old_logprobs"], sample["rollout_logprobs"], strict=True)]
        assert 0.0 < max(map(abs, ratios)) < 0.5, "an FP8 engine is close to its trainer; a wrong row or column is not"


def test_figures_of_a_row_fit_together(finished: tuple[Path, str]) -> None:
    for row in rows_of(finished[0]):
        assert 0.0 <= row["alpha"] <= 1.0 and 0.0 < row["weight_reliability"] <= 1.0 and row["divergence_severity"] > 0.0
        assert row["policy_ratio_mean"] == pytest.approx(1.0, abs=1e-6), "one update per batch starts on the policy"
        assert row["num_response_tokens"] == pytest.approx(row["response_length_mean"] * 8)
        assert row["staleness"] == 0


@pytest.mark.slow
def test_the_same_configuration_makes_the_same_run(finished: tuple[Path, str], ranks: RankPool, tmp_path: Path) -> None:
    """In other processes, every figure that is not a time is equal to the last bit; and the warm start is reused."""
    folder, _ = finished
    cached = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*")}
    config = load_config(write(tmp_path, sft=small(folder)["sft"]), ["train.steps=2", "checkpoint.every=0"])
    ranks.run(2, trained, config=config)
    assert cached and {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*")} == cached
    assert_same_rows(tmp_path, folder)


@pytest.mark.slow
def test_a_run_is_not_overwritten_but_continued(finished: tuple[Path, str], ranks: RankPool, tmp_path: Path) -> None:
    """Resumed from step 2 of 3, with every row and weight as if it had never stopped."""
    folder, _ = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    config = write(tmp_path, sft=small(folder)["sft"])
    assert "already holds a run" in run("train", config, status=2)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000003")
    ranks.run(2, trained, config=load_config(config, ["run.resume=true"]))
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]
    assert_same_rows(tmp_path, folder)
    assert samples_of(tmp_path) == samples_of(folder), "the samples of step 3 were cut and written again"


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        {"objective": {"name": "dapo", "max_refills": 2, "entropy_bonus": 0.1}, "ais": {"tau": "auto", "auto_batches": 5, "ema": 0.5}},
        {
            "objective": {"name": "tbpo", "kl_coefficient": 0.01, "entropy_bonus": 0.01},
            "ais": {"lag": 1, "tau": "auto", "ema": 0.5, "alpha_min": 0.1},
        },
    ],
    ids=["dapo", "tbpo-lagged"],
)
def test_what_a_method_remembers_survives_a_resume(
    finished: tuple[Path, str], ranks: RankPool, tmp_path: Path, method: dict[str, object]
) -> None:
    """The moving average, the automatic tau, the lagged alpha, the reference policy and the stream's position."""
    sft, whole, again = small(finished[0])["sft"], tmp_path / "whole", tmp_path / "again"
    whole.mkdir()
    steps = ["train.steps=4", "checkpoint.keep=4"]
    ranks.run(2, trained, config=load_config(write(whole, sft=sft, **method), steps))
    rows = rows_of(whole)
    assert all(row.keys() >= ROW_KEYS for row in rows)
    if method["objective"]["name"] == "dapo":
        assert any(row["prompts_sampled"] > 4 for row in rows), "groups without a signal must have been replaced"
    else:
        assert_samples_fit(samples_of(whole))  # log pi_old comes from the training pass
        assert rows[0]["alpha"] == 0.1 and rows[0]["policy_ratio_mean"] == 1.0 and rows[1]["reference_kl"] > 0.0
    shutil.copytree(whole / "run", again / "run")
    shutil.rmtree(again / "run" / "checkpoints" / "step_000004")
    ranks.run(2, trained, config=load_config(write(again, sft=sft, **method), [*steps, "run.resume=true"]))
    assert len(rows_of(again)) == 4
    assert_same_rows(again, whole)


@pytest.mark.slow
def test_export_and_eval_of_a_run(finished: tuple[Path, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from ais_megatron.tokenizer import MODEL_FILE, SentencePieceTokenizer

    folder, _ = finished
    out = tmp_path / "hf"
    assert str(out) in run("export", folder / "run", out)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = SentencePieceTokenizer.load(out / MODEL_FILE)
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 1, "pad_token_id": 0}
    assert model.dtype is torch.bfloat16 and model.generation_config.eos_token_id == tokenizer.eos_id
    logits = model(torch.tensor([tokenizer.encode_prompt("3 2 1=6:")])).logits
    assert torch.isfinite(logits).all()
    measured = run("eval", folder / "run", "--out", tmp_path / "scores.json", "eval.samples=2")
    assert "held-out pass@1: 0." in measured and "pass@2" in measured and "±" in measured
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == {"accuracy", "num_prompts", "samples", "sets"} and (scores["num_prompts"], scores["samples"]) == (8, 2)
    assert scores["accuracy"] == scores["sets"]["held_out"]["pass@1"] <= scores["sets"]["held_out"]["pass@2"]


@pytest.mark.slow
def test_torchrun_joins_with_tensor_parallelism(tmp_path: Path) -> None:
    config = write(tmp_path, parallel={"tp": 2, "sequence_parallel": True})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ais_megatron"]
    done = subprocess.run(
        [*torchrun, "train", str(config), "train.steps=1"], cwd=ROOT, capture_output=True, text=True, timeout=540, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows_of(tmp_path)) == 1


@pytest.mark.slow
def test_an_interrupt_ends_every_rank(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("train", write(tmp_path), "train.steps=100000"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step"):
        assert process.poll() is None
    family = psutil.Process(process.pid).children(recursive=True)
    assert len([child for child in family if "ais_megatron" in " ".join(child.cmdline())]) >= 2
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=240) == 130
    deadline = time.monotonic() + 60
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in family):
        assert time.monotonic() < deadline, "a rank outlived the interrupt"
        time.sleep(0.1)


def test_report_and_doctor_and_a_typo(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert "index.html" in CliRunner().invoke(app, ["report", str(folder / "run")]).stdout
    doctor = CliRunner().invoke(app, ["doctor"]).stdout
    assert all(word in doctor for word in ("torch", "megatron-core", "Transformer Engine", "NVIDIA Apex", "SGLang", "Slurm", "nemo-run"))
    without_torch = "import sys; sys.modules['torch'] = None; from ais_megatron.cli import main; main()"  # whose import takes seconds
    typo = [sys.executable, "-c", without_torch, "train", str(folder / "config.yaml"), "train.step=1"]
    done = subprocess.run(typo, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "did you mean train.steps?" in done.stderr, done.stdout + done.stderr


def refusals(ranks: RankPool, folder: Path, poison: str | None = None, **changes: object) -> str:
    """The one message that both ranks raised."""
    config = build_config(small(folder, sft={"steps": 0, "cache_dir": str(folder / "cache")}, **changes))
    first, second = ranks.run(2, refusal, config=config, poison=poison, timeout=360)
    assert first.removeprefix("ConfigError").removeprefix("ValueError") == second.removeprefix("ConfigError").removeprefix("ValueError")
    return first


def test_bad_input_is_one_error_on_all_ranks(ranks: RankPool, tmp_path: Path, untied_checkpoint: Path) -> None:
    assert "no such file or folder" in refusals(ranks, tmp_path, task={"name": "countdown", "test_path": str(tmp_path / "none.jsonl")})
    assert "prompt" in (long := refusals(ranks, tmp_path, rollout={**small(tmp_path)["rollout"], "max_response_tokens": 60}))
    assert "max_position_embeddings=64" in long
    message = refusals(ranks, tmp_path, parallel={"dp": 3}, rollout={"prompts_per_step": 6, "max_response_tokens": 12})
    assert "this job has 2 ranks" in message


@pytest.mark.slow
def test_a_moe_run_with_replayed_routing(ranks: RankPool, tmp_path: Path) -> None:
    """Experts over both ranks, FP8 per expert, the engine's routing replayed by the trainer."""
    data = small(tmp_path, parallel={"dp": 2, "ep": 2}, moe={"routing_replay": True})
    data["model"]["architecture"] |= dict(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    data["rollout"] |= {"return_routed_experts": True}
    assert ranks.run(2, refusal, config=build_config(data), timeout=360) == ["finished"] * 2
    for row in rows_of(tmp_path):
        assert 1.0 <= row["expert_load_max_over_mean"] <= 2.0, "at most all tokens on 2 of 4 experts"
        assert 0.0 <= row["routing_differs_fraction"] < 0.5 and row["divergence_severity"] > 0.0


@pytest.mark.slow
def test_a_run_over_context_parallel_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """Both ranks generate their part of the responses and train on their part of every row: the same figures as on one rank."""
    for cp in (1, 2):
        data = small(tmp_path / str(cp), parallel={"dp": 1, "cp": cp}, ais={"coefficient": "measured"})
        data["model"] |= {"dtype": "fp32"}
        (tmp_path / str(cp)).mkdir()
        assert ranks.run(cp, refusal, config=build_config(data), timeout=360) == ["finished"] * cp
    one, two = (rows_of(tmp_path / str(cp))[0] for cp in (1, 2))
    assert one["num_responses"] == two["num_responses"] == 8
    for name in ("response_length_mean", "entropy", "loss", "grad_norm", "divergence_severity", "weight_reliability", "k_scale_max"):
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(("poison", "message"), [("nan", "logprob nan at response token 0"), ("empty", "the response is empty")])
def test_a_corrupt_engine_stops_all_ranks(ranks: RankPool, tmp_path: Path, poison: str, message: str) -> None:
    error = refusals(ranks, tmp_path, poison=poison)
    assert "[rank 1]" in error and message in error


def test_checkpoints_that_cannot_be_loaded(ranks: RankPool, tmp_path: Path, untied_checkpoint: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((untied_checkpoint / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config))
    assert "neither model.safetensors nor model.safetensors.index.json" in refusals(ranks, tmp_path, model={"path": str(broken)})
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    assert "cannot read model.safetensors" in refusals(ranks, tmp_path, model={"path": str(broken)})
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    os.replace(untied_checkpoint / "model.safetensors", broken / "model.safetensors")
    try:
        assert "has shape (96, 64), but its config.json implies (128, 64)" in refusals(ranks, tmp_path, model={"path": str(broken)})
    finally:
        os.replace(broken / "model.safetensors", untied_checkpoint / "model.safetensors")


def test_profiled_steps_leave_traces_of_every_rank_and_change_nothing(ranks: RankPool, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("plain", "profiled")}
    for name, folder in folders.items():
        folder.mkdir()
        data = small(folder, sft={"steps": 0}, checkpoint={"every": 0})
        data["run"] |= {"profile_steps": "2-3"} if name == "profiled" else {}
        ranks.run(2, trained, config=build_config(data))
    assert_same_rows(folders["profiled"], folders["plain"])
    assert not (folders["plain"] / "run" / "profile").exists()
    profiles = read_profiles(folders["profiled"] / "run")
    assert {step: [p["rank"] for p in profiles[step]] for step in profiles} == {2: [0, 1], 3: [0, 1]}
    for profile in (p for step in profiles.values() for p in step):
        assert {"generate", "reward", "logprobs", "diagnose", "train", "calibrate", "sync"} == set(profile["phases"])
        assert {"generate", "logprobs", "train"} <= {row["phase"] for row in profile["operators"]}
