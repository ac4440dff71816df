"""The report page: which plots it draws, what it says of those it cannot, and that it loads nothing from elsewhere."""

import json
import re

import pytest

from ais_megatron.runs.plotting import Curves, bins_of, held_out_points, moving_average
from ais_megatron.runs.report import write_report

PLOTS = ["ais.png", "held_out_accuracy.png", "phase_times.png", "response_length.png", "reward.png"]
ROW = {
    "reward_mean": 0.5,
    "accuracy": 0.4,
    "held_out_accuracy": 0.3,
    "alpha": 0.5,
    "weight_reliability": 0.99,
    "divergence_severity": 2e-3,
    "variance_amplification": 1.0,
    "response_length_mean": 20.0,
    "time/generate": 2.0,
    "time/train": 1.0,
    "time/step": 3.5,
}


def write_rows(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def images(folder):
    return sorted(path.name for path in (folder / "report").glob("*.png"))


def test_a_full_report(tmp_path):
    run = tmp_path / "a<b>&c"
    write_rows(run, [{"step": step, **ROW, "divergence_severity": 1e-3 * step} for step in range(3)])
    (run / "config.yaml").write_text("# <script>alert(1)</script>\nrun: {}\n")
    (run / "summary.json").write_text(json.dumps({"start_accuracy": 0.25, "final_accuracy": 0.5, "mean_alpha": 0.125, "wall_seconds": 60}))
    index = write_report(run)
    page = index.read_text(encoding="utf-8")
    assert index == run / "report" / "index.html"
    assert images(run) == PLOTS
    assert all((index.parent / name).read_bytes().startswith(b"\x89PNG") for name in PLOTS)
    assert sorted(re.findall(r'src="([^"]*)"', page)) == PLOTS  # by relative path, and nothing else is loaded
    assert "http" not in page and "<script" not in page
    assert "<h1>Run a&lt;b&gt;&amp;c</h1>" in page and "&lt;script&gt;" in page
    assert "<td>change</td><td>+25.0 points</td>" in page and "<td>mean alpha</td><td>0.125</td>" in page
    assert "Left out" not in page and "not finished" not in page


def test_missing_columns_leave_their_plot_out_and_the_page_says_so(tmp_path):
    write_rows(tmp_path, [{"step": 1, **ROW}])
    write_report(tmp_path)
    assert images(tmp_path) == PLOTS
    write_rows(tmp_path, [{"step": 1, "reward_mean": 0.5, "accuracy": None, "response_length_mean": 3.0}])
    page = write_report(tmp_path).read_text()
    assert images(tmp_path) == ["response_length.png"]  # the earlier report's images are gone
    assert re.findall(r"no row of metrics.jsonl has ([^.]*)\.", page) == [
        "held_out_accuracy",
        "accuracy",
        "alpha, weight_reliability, divergence_severity, variance_amplification",
        "time/&lt;phase&gt;",
    ]
    assert re.findall(r'src="([^"]*)"', page) == ["response_length.png"]
    assert "there is no config.yaml" in page


def test_an_unfinished_run_is_summarized_from_its_rows(tmp_path):
    write_rows(tmp_path, [{"step": 1, **ROW}, {"step": 2, **ROW, "alpha": 0.25}])
    page = write_report(tmp_path).read_text()
    assert "2 steps recorded, 1 to 2. The run has not finished" in page
    assert "<td>mean alpha</td><td>0.375</td>" in page
    assert "<td>wall time (h:mm:ss)</td><td>0:00:07</td>" in page
    assert "<td>held-out pass@1 at the end</td><td>-</td>" in page


def test_zero_divergence_and_many_steps_draw_without_warnings(tmp_path, recwarn):
    write_rows(tmp_path, [{"step": step, **ROW, "divergence_severity": 0.0} for step in range(150)])
    write_report(tmp_path)
    assert images(tmp_path) == PLOTS
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("content", [None, "", '{"step": 1'])
def test_no_rows_is_an_error_that_names_the_file(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: there is no step to report on"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_a_damaged_summary_is_an_error_that_names_the_file(tmp_path):
    write_rows(tmp_path, [{"step": 1, **ROW}])
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json: not valid JSON"):
        write_report(tmp_path)


def test_held_out_points_come_from_the_rows_first_and_then_the_summary():
    rows = [{"step": 1}, {"step": 2, "held_out_accuracy": 0.5}, {"step": 3}]
    assert held_out_points(Curves(rows, None)) == ([2], [0.5])
    assert held_out_points(Curves(rows, {"start_accuracy": 0.25, "final_accuracy": 0.75})) == ([0, 2, 3], [0.25, 0.5, 0.75])
    assert held_out_points(Curves(rows[:2], {"start_accuracy": None, "final_accuracy": 0.75})) == ([2], [0.5])


def test_moving_average_by_hand():
    assert moving_average([1.0, 2.0, 6.0, 4.0], 3) == [1.5, 3.0, 4.0, 5.0]


def test_long_runs_are_binned_without_losing_a_step():
    bins, edges = bins_of(Curves([{"step": step} for step in range(1, 252)], None))
    assert [len(rows) for rows in bins] == [3] * 83 + [2]
    assert (edges[0], edges[1], edges[-1]) == (0.5, 3.5, 251.5) and len(edges) == len(bins) + 1
