"""The scaling report: efficiency by hand, and a row for every task that the grid asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ais_megatron.comparison.scaling import efficiencies, measure, read_grid, write_scaling_report

GRID = "# comment\nstrong\tone\t1\t0\t\nstrong\ttwo\t1\t1\tparallel.tp=2\nweak\tgone\t1\t0\ta=1\nweak\tdead\t1\t0\ta=2\n"


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """Two finished tasks of 8 and 16 GPUs, one that was never started, one that died in its second step."""
    (tmp_path / "grid.tsv").write_text(GRID)
    for folder, servers, seconds in (("01-strong-one", 0, [9.0, 4.0, 4.0]), ("02-strong-two", 1, [9.0, 2.5, 2.5])):
        make_run(tmp_path / folder, servers, seconds)
        (tmp_path / folder / "summary.json").write_text("{}")
    make_run(tmp_path / "04-weak-dead", 0, [9.0])
    (tmp_path / "04-weak-dead" / "exit_status").write_text("3\n")
    return tmp_path


def make_run(folder: Path, servers: int, seconds: list[float]) -> None:
    folder.mkdir()
    lines = ["trainer\tnode1\t8"] + ["server\tnode2\t30000\t0,1,2,3,4,5,6,7"] * servers
    (folder / "layout.tsv").write_text("\n".join(lines) + "\n")
    rows = [
        {"step": i, "time/step": s, "num_response_tokens": 800, "time/generate": s / 2, "time/train": s / 4}
        for i, s in enumerate(seconds, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_efficiency_is_throughput_per_worker_without_the_first_step(parent: Path) -> None:
    tasks = [measure(task, parent) for task in read_grid(parent / "grid.tsv")]
    assert (tasks[0].workers, tasks[0].seconds, tasks[0].tokens_per_second) == (8, 4.0, 200.0)
    assert (tasks[1].workers, tasks[1].seconds, tasks[1].tokens_per_second) == (16, 2.5, 320.0)
    assert efficiencies(tasks) == {1: 1.0, 2: (320.0 / 16) / (200.0 / 8)}, "t0 g0 / (t g) = 4 * 8 / (2.5 * 16) = 0.8"
    assert dict(tasks[0].phases)["generate"] == 2.0


def test_every_task_has_a_row_and_every_absence_a_name(parent: Path) -> None:
    text = write_scaling_report(parent)
    assert text.count("\n| ") == 1 + 4 and "80%" in text and "generate 50%" in text
    assert "2 of 4 tasks finished" in text and "03-weak-gone: missing: never started" in text
    assert "04-weak-dead: failed: ended with status 3 after 1 steps" in text
    assert "| 3    | weak   | gone" in text and (parent / "scaling.png").stat().st_size > 10_000
    assert "04-weak-dead" in (parent / "scaling.md").read_text()


def test_nothing_finished_is_still_a_report(parent: Path) -> None:
    for path in parent.glob("*/summary.json"):
        path.unlink()
    assert "0 of 4 tasks finished" in write_scaling_report(parent) and not (parent / "scaling.png").exists()


def test_folders_that_hold_no_experiment(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="grid.tsv: no such file; give the folder that slurm/scaling.sbatch wrote"):
        write_scaling_report(tmp_path)
    (tmp_path / "grid.tsv").write_text("strong one 1 1\n")
    with pytest.raises(ValueError, match="task 1: expected series, name, trainer_nodes.*separated by tabs"):
        write_scaling_report(tmp_path)
