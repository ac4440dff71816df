"""Comparisons: what is asked for, what is left to do, and a table and a figure by hand. Runs are a stand-in's; one test trains."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ais_megatron.cluster.exits import EXIT_REQUEUE
from ais_megatron.comparison import runs as comparison_module
from ais_megatron.comparison.config import Comparison, load_comparison, select
from ais_megatron.comparison.records import read_results, write_results
from ais_megatron.comparison.report import difference, has_collapsed, held_out, lines_of, steps_to, write_comparison_report
from ais_megatron.comparison.runs import Result, final_changes, least_reliability, result_of, run_cells
from ais_megatron.config import ConfigError, dump_config, load_config
from tests.helpers.paths import ROOT
from tests.helpers.runs import small

ARMS = {"bf16": {"rollout.quantization": "none", "correction": "none"}, "ais": {"correction": "ais", "train": {"optimizer": {"lr": 2e-3}}}}


@pytest.fixture
def write(tmp_path: Path):
    def write(**changes: object) -> Path:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(small(tmp_path, parallel={"dp": 1})))
        data = {"base": "base.yaml", "dir": str(tmp_path / "out"), "seeds": [0, 1], "arms": ARMS} | changes
        path = tmp_path / "compare.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}, sort_keys=False))
        return path

    return write


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_arms_times_seeds_times_tasks(write, tmp_path: Path) -> None:
    tasks = {"easy": {"task.max_number": 9}, "hard": {"task": {"max_number": 50}}}
    comparison, cells = load_comparison(write(tasks=tasks, overrides={"train.steps": 2, "task.max_number": 3}))
    assert [cell.name for cell in cells[:4]] == ["easy/bf16/0", "easy/ais/0", "hard/bf16/0", "hard/ais/0"] and len(cells) == 8
    cell = cells[-1]
    assert (cell.name, cell.folder) == ("hard/ais/1", tmp_path / "out" / "hard" / "ais" / "seed_1")
    assert cell.config == load_config(cell.base, cell.overrides), "what the command line gets is what was checked"
    assert (cell.config.task.max_number, cell.config.train.optimizer.lr, cell.config.run.seed, cell.config.train.steps) == (50, 2e-3, 1, 2)
    assert cells[0].config.rollout.quantization == "none" and comparison.reference_arm == "bf16"
    (first, *_), (_, *some) = load_comparison(write())[1], select(cells, ["ais/0", "hard/bf16/1"])
    assert first.name == "countdown/bf16/0", "without tasks: the base's"
    assert [c.name for c in some] == ["hard/ais/0", "hard/bf16/1"]


def test_an_aligned_model_is_evaluated_with_its_own_engine(write) -> None:
    arms = {"fp8": {"rollout.quantization": "fp8_e4m3"}, "aligned": {"policy.forward_precision": "fp8_aligned"}}
    path = write(arms=arms, overrides={"rollout.quantization": "fp8_e4m3"}, seeds=[0])
    comparison, (fp8, aligned) = load_comparison(path, ["final_eval={rollout.quantization: none, eval.num_prompts: 4}"])
    assert final_changes(fp8, comparison, path) == ["rollout.quantization=none", "eval.num_prompts=4"]
    assert final_changes(aligned, comparison, path) == ["eval.num_prompts=4"]


def test_arms_of_a_diffusion_model_have_no_cache_for_auto_either(write, tmp_path: Path) -> None:
    base = small(tmp_path, diffusion={"block_length": 6, "steps": 4})
    base["model"]["architecture"] |= {"model_type": "llada", "vocab_size": 40, "mask_token_id": 39}
    path = write(arms={"bf16": {"rollout": {"quantization": "none", "kv_cache": "auto"}}, "fp8": {"rollout.quantization": "fp8_e4m3"}})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    cells = load_comparison(path)[1]
    assert {(cell.arm, cell.config.rollout.quantization, cell.config.rollout.kv_cache) for cell in cells} == {
        ("bf16", "none", "none"),
        ("fp8", "fp8_e4m3", "none"),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": {}}, "arm: unknown key; did you mean arms"),
        ({"treshold": 0.3}, "treshold: unknown key; did you mean threshold"),
        ({"arms": {"ais": {"correctoin": "ais"}}}, r"arm ais: correctoin: unknown key; did you mean correction"),
        ({"arms": {"x": {"train.step": 3}}}, r"task countdown, arm x: train.step: unknown key; did you mean train.steps"),
        ({"tasks": {"t": {"task.name": "countdow"}}, "arms": {"x": {"correction": "mask"}}}, "correction='mask'"),
        ({"arms": {"x": {"run.seed": 3}}}, "arms.x.run.seed=3: the comparison sets this key itself"),
        ({"arms": {"a/b": {}}}, "is used as the name of a folder"),
        ({"arms": {}}, "arms"),
        ({"seeds": [1, 1]}, "a seed occurs twice"),
        ({"reference": "fp8"}, "reference=fp8: unknown arm; allowed: bf16, ais"),
        ({"contrasts": [["fp8", "ais"]]}, r"contrasts=\['fp8', 'ais'\]: fp8 is not an arm; allowed: bf16, ais"),
        ({"contrasts": [["ais", "ais"]]}, "compares an arm with itself"),
        ({"base": "none.yaml"}, "none.yaml does not exist"),
        ({"base": None}, "base: missing"),
    ],
)
def test_typos_end_before_anything_starts(write, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_comparison(write(**changes))


def test_a_selection_that_names_nothing(write) -> None:
    with pytest.raises(ConfigError, match=r"--only bf16/3: there is no such run; did you mean bf16/\d\?"):
        select(load_comparison(write())[1], ["bf16/3"])


def test_shipped_comparisons_are_valid(tmp_path: Path) -> None:
    """Those of a pretrained model with the config.json of SmolLM2-135M, because its folder need not be there."""
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    architecture = sizes | {"model_type": "llama", "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(architecture))
    files = sorted((ROOT / "configs").glob("compare_*.yaml"))
    assert files
    for path in files:
        changes = [f"overrides.model.path={tmp_path}"] if "base: smollm2" in path.read_text() else []
        assert load_comparison(path, changes)[1]


# --- what is left to do -----------------------------------------------------------------------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, statuses: dict[str, int]) -> list[list[str]]:
    """In place of processes: each run writes what a run writes, and ends with the status that its folder's parent is given."""
    calls: list[list[str]] = []

    def run_ranks(num_ranks: int, arguments: list[str], log) -> int:  # noqa: ANN001
        calls.append(arguments)
        if arguments[0] == "eval":
            Path(arguments[arguments.index("--out") + 1]).write_text('{"accuracy": 0.75}')
            return 0
        overrides = dict(item.split("=", 1) for item in arguments[2:])
        folder = Path(overrides["run.dir"])
        status = statuses.pop(f"{folder.parent.name}/{folder.name[-1]}", 0)
        (folder / "config.yaml").write_text(dump_config(load_config(arguments[1], arguments[2:])))
        (folder / "metrics.jsonl").write_text('{"step": 1, "alpha": 0.5, "held_out_accuracy": 0.25}\n')
        if status:
            log.write(b"error: it broke\n")
        else:
            (folder / "summary.json").write_text('{"start_accuracy": 0.125, "final_accuracy": 0.25}')
        return status

    monkeypatch.setattr(comparison_module, "run_ranks", run_ranks)
    return calls


def test_a_failing_arm_ends_no_other_and_only_it_is_run_again(write, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # noqa: ANN001
    path = write()
    comparison, cells = load_comparison(path)
    calls = stand_in(monkeypatch, {"ais/0": 2})
    assert run_cells(comparison, path, cells) == 0 and len(calls) == 4
    states = [result_of(cell, comparison).state for cell in cells]
    assert states == ["finished", "crashed (status 2 after 1 steps)", "finished", "finished"]
    assert "countdown/ais/0: crashed (status 2 after 1 steps)" in capsys.readouterr().out
    text = write_comparison_report(comparison, [result_of(cell, comparison) for cell in cells], "compare")
    assert "1/2, 1 crashed" in text and "countdown/ais/0: crashed (status 2 after 1 steps): error: it broke" in text
    calls.clear()
    run_cells(comparison, path, cells)
    assert len(calls) == 1 and "run.resume=true" in calls[0] and result_of(cells[1], comparison).finished


def test_a_signal_stops_the_comparison_and_the_final_evaluation_is_caught_up(write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    comparison, cells = load_comparison(path)
    calls = stand_in(monkeypatch, {"ais/0": EXIT_REQUEUE})
    assert run_cells(comparison, path, cells) == EXIT_REQUEUE and len(calls) == 2
    results = [result_of(cell, comparison) for cell in cells]
    assert [result.state for result in results[1:3]] == ["unfinished (1 of 3 steps)", "missing"]
    assert "missing: countdown/bf16 (seeds 1), countdown/ais (seeds 1)" in write_comparison_report(comparison, results, "x")
    comparison, cells = load_comparison(path, ["final_eval={rollout.quantization: none}"])
    calls.clear()
    assert result_of(cells[0], comparison).state == "trained, without its final evaluation"
    run_cells(comparison, path, cells, may_train=False)
    assert [call[0] for call in calls] == ["eval"] and "rollout.quantization=none" in calls[0]
    assert result_of(cells[0], comparison).final_accuracy == 0.75


def test_a_run_of_another_configuration_is_not_taken_for_this_one(write, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, cells = load_comparison(path := write())
    stand_in(monkeypatch, {})
    run_cells(comparison, path, cells)
    comparison, cells = load_comparison(path, ["overrides.metrics.tensorboard=true"])
    assert result_of(cells[0], comparison).finished, "not part of the experiment"
    comparison, cells = load_comparison(path, ["overrides.train.steps=9"])
    with pytest.raises(ConfigError, match=r"seed_0: holds a run with train.steps=3, but the comparison now has train.steps=9; delete"):
        result_of(cells[0], comparison)


# --- table and figure -------------------------------------------------------------------------------------------------


def made_up(cells, accuracies: dict[str, list[float]]) -> list[Result]:  # noqa: ANN001
    results = []
    for cell in cells:
        curve = accuracies[f"{cell.arm}/{cell.seed}"]
        rows = [
            {"step": 10 * i, "held_out_accuracy": a, "alpha": 0.5, "weight_reliability": 1 - 0.1 * i, "divergence_severity": 1e-3}
            for i, a in enumerate(curve[1:], start=1)
        ]
        summary = {"start_accuracy": curve[0], "final_accuracy": curve[-1]}
        results.append(Result(cell, True, True, "0", rows, summary, curve[-1]))
    return results


def test_figures_of_the_table(write, tmp_path: Path) -> None:
    comparison, cells = load_comparison(write(threshold=0.5))
    curves = {"bf16/0": [0.3, 0.4, 0.6], "bf16/1": [0.3, 0.5, 0.4], "ais/0": [0.3, 0.6, 0.7], "ais/1": [0.3, 0.4, 0.1]}
    results = made_up(cells, curves)
    assert held_out(results[0]) == [(0, 0.3), (10, 0.4), (20, 0.6)]
    assert [steps_to(result, 0.5) for result in results] == [20, 10, 10, None]
    assert [has_collapsed(result, 0.5) for result in results] == [False, False, False, True], "0.1 < 0.5 * 0.4"
    bf16, ais = lines_of(comparison, results)
    mean, error, seeds = difference(ais, bf16)
    assert (mean, error, seeds) == (pytest.approx(-0.1), pytest.approx(0.2), 2), "gaps 0.1 and -0.3: mean -0.1, sd 0.2828, / sqrt 2"
    alone = difference(lines_of(comparison, [r for r in results if r.cell.seed == 0])[1], bf16)
    assert alone[0] == pytest.approx(0.1) and math.isnan(alone[1])
    text = write_comparison_report(comparison, results, "ais-megatron compare x.yaml")
    assert "50.0 ± 14.1" in text and "-10.0 ± 20.0" in text and "15 (2/2)" in text and "10 (1/2)" in text and "| 1/2 " in text
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
    assert "`ais-megatron compare x.yaml`" in (tmp_path / "out" / "comparison.md").read_text()


def test_runs_of_another_machine_count_as_finished(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # noqa: ANN001
    """Its results come as a file. Their table is the same, and only what is missing is run."""
    path = write(contrasts=[["ais", "bf16"]])
    comparison, cells = load_comparison(path)
    results = made_up(cells, {"bf16/0": [0.3, 0.4, 0.6], "bf16/1": [0.3, 0.5, 0.4], "ais/0": [0.3, 0.6, 0.7], "ais/1": [0.3, 0.4, 0.5]})
    there = write_comparison_report(comparison, results, "there")
    elsewhere = read_results(tmp_path / "out" / "results.jsonl", cells)
    again = write_comparison_report(comparison, [elsewhere[cell.name] for cell in cells], "here")
    assert again == there and "| +10.0 ± 0.0 " in there and "| ais | bf16    | 2 " in there and "| 0.5 | 0.5 " in there

    (tmp_path / "some.jsonl").write_text("".join((tmp_path / "out" / "results.jsonl").read_text().splitlines(keepends=True)[:3]))
    calls = stand_in(monkeypatch, {})
    assert run_cells(comparison, path, cells, elsewhere=read_results(tmp_path / "some.jsonl", cells)) == 0
    assert len(calls) == 1 and "countdown/ais/0: finished elsewhere" in capsys.readouterr().out
    changed, cells = load_comparison(path, ["overrides.train.steps=9"])
    with pytest.raises(
        ConfigError, match=r"line 1: countdown/bf16/0 was a run with train.steps=3, but the comparison now has train.steps=9"
    ):
        read_results(tmp_path / "some.jsonl", cells)
    (tmp_path / "some.jsonl").write_text('{"run": 3\n')
    with pytest.raises(ConfigError, match=r"some.jsonl, line 1: not a result of a run .*; delete this line"):
        read_results(tmp_path / "some.jsonl", cells)


def test_curves_of_results_are_means_of_five_steps_and_the_least_reliability_is_exact(write, tmp_path: Path) -> None:
    comparison, cells = load_comparison(write(seeds=[0], arms={"ais": {}}))
    rows = [{"step": s, "alpha": s / 10, "weight_reliability": 1 - s / 100} for s in range(1, 8)]
    write_results(tmp_path / "r.jsonl", [Result(cells[0], True, True, "0", rows, {}, 0.5)])
    result = read_results(tmp_path / "r.jsonl", cells)["countdown/ais/0"]
    assert [(row["step"], row["alpha"]) for row in result.rows] == [(5, 0.3), (7, 0.65)]
    assert least_reliability(result) == pytest.approx(0.93) and result.rows[1]["weight_reliability"] == 0.935


def test_nothing_is_there_yet(write) -> None:
    comparison, cells = load_comparison(write())
    text = write_comparison_report(comparison, [result_of(cell, comparison) for cell in cells], "x")
    assert "0 of 4 runs finished" in text and "missing: all of countdown/bf16, all of countdown/ais" in text and "0/2" in text
    assert isinstance(comparison, Comparison) and not (Path(comparison.dir) / "comparison.png").exists()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_trains_reports_and_finds_everything_done(write, tmp_path: Path) -> None:
    """Two arms, one of which fails in its first step; then the list, and a second start."""
    arms = {"ais": {"train.steps": 2}, "broken": {"model.path": str(tmp_path / "model")}}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(small(tmp_path)["model"]["architecture"] | {"model_type": "qwen3"}))
    path = write(arms=arms, seeds=[3], final_eval={"rollout.quantization": "none"})

    def compare(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ais_megatron", "compare", str(path), *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)

    done = compare()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "countdown/ais/3: finished in" in done.stdout and "countdown/broken/3: crashed (status 2 after 0 steps)" in done.stdout
    assert "1 of 2 runs finished" in done.stdout and (tmp_path / "out" / "comparison.png").exists()
    assert 0 <= json.loads((tmp_path / "out/countdown/ais/seed_3/final_eval.json").read_text())["accuracy"] <= 1
    again = compare("--only", "ais")
    assert again.returncode == 0 and "countdown/ais/3: finished, not run again" in again.stdout, again.stdout + again.stderr
    name, base, folder, *overrides = compare("--list").stdout.splitlines()[0].split("\t")
    assert (name, base, folder) == ("countdown/ais/3", str(tmp_path / "base.yaml"), str(tmp_path / "out/countdown/ais/seed_3"))
    assert "train.steps=2" in overrides and "run.seed=3" in overrides


@pytest.mark.slow
def test_an_array_task_is_one_run_of_the_list(write, tmp_path: Path) -> None:
    path = write()
    environment = os.environ | {"AIS_DRY_RUN": "1", "AIS_GPUS_PER_NODE": "0", "AIS_TRAINER_NODES": "1", "AIS_ROLLOUT_NODES": "0"}
    environment |= {"AIS_COMPARISON": str(path), "AIS_PYTHON": sys.executable}

    def task(number: int, *overrides: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "slurm/compare.sbatch", *overrides]
        variables = environment | {"SLURM_ARRAY_TASK_ID": str(number)} | more
        return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=360, check=False)

    done = task(2)
    folder = tmp_path / "out" / "countdown" / "ais" / "seed_0"
    assert done.returncode == 0 and f" train {tmp_path}/base.yaml run.dir={folder} " in done.stdout, done.stdout + done.stderr
    assert "correction=ais train.optimizer.lr=0.002 run.seed=0" in done.stdout and "run.resume" not in done.stdout
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    assert "run.resume=true" in task(1, "seeds=[0]", AIS_ONLY="ais").stdout
    (folder / "summary.json").write_text("{}\n")
    assert "finished already" in task(2).stdout
    assert "has only 4 runs; submit with sbatch --array=1-4" in task(5).stderr
