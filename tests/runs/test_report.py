"""The report page: one file, what it says of charts it cannot draw, and which data it gives to its script."""

import json
import re

import pytest

from ais_megatron.runs.charts import Run, columns, held_out, held_out_points, phases, position_label, positions, truncation
from ais_megatron.runs.plotting import moving_average
from ais_megatron.runs.report import write_report

ROW = {
    "reward_mean": 0.5,
    "accuracy": 0.4,
    "well_formed": 0.9,
    "held_out_accuracy": 0.3,
    "alpha": 0.5,
    "weight_reliability": 0.99,
    "weight_reliability_raw": 0.98,
    "divergence_severity": 2e-3,
    "divergence_by_position": [1e-3, 2e-3, 4e-3],
    "variance_amplification": 1.0,
    "response_length_mean": 20.0,
    "finished_fraction": 0.75,
    "entropy": 1.5,
    "zero_signal_groups": 0.25,
    "solved_groups": 0.75,
    "distinct_responses": 0.5,
    "grad_norm": 0.5,
    "tokens_per_second": 100.0,
    "time/generate": 2.0,
    "time/train": 1.0,
    "time/step": 3.5,
    "idle/trainer": 0.5,
    "idle/engine": 0.25,
}


def write_rows(folder, rows, file="metrics.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def run_of(rows, evaluations=(), summary=None):
    return Run(rows, evaluations, summary)


def test_a_full_report_is_one_file(tmp_path):
    run = tmp_path / "a<b>&c"
    write_rows(run, [{"step": step, **ROW, "divergence_severity": 1e-3 * step} for step in range(1, 4)])
    (run / "config.yaml").write_text("# <script>alert(1)</script>\nrun: {}\n")
    (run / "summary.json").write_text(json.dumps({"start_accuracy": 0.25, "final_accuracy": 0.5, "mean_alpha": 0.125, "wall_seconds": 60}))
    (run / "report").mkdir()
    (run / "report" / "ais.png").write_text("of an earlier version")
    index = write_report(run)
    page = index.read_text(encoding="utf-8")
    assert [path.name for path in index.parent.iterdir()] == ["index.html"]
    assert not re.search(r"\b(src|href)=(?!\"#)", page), "it loads nothing"
    assert '<h1 id="overview">Run a&lt;b&gt;&amp;c</h1>' in page and "&lt;script&gt;alert" in page
    assert "<dt>change</dt><dd>+25.0 points</dd>" in page and "<dt>mean alpha</dt><dd>0.125</dd>" in page
    assert "Left out" not in page and "not finished" not in page
    assert "This run has no samples.jsonl" in page and "metrics.samples_every=10" in page
    data = data_of(page)
    assert data["steps"] == [1, 2, 3] and data["columns"]["divergence_severity"] == [1e-3, 2e-3, 3e-3] and data["samples"] == []


def test_missing_columns_leave_their_chart_out_and_the_page_says_so(tmp_path):
    write_rows(tmp_path, [{"step": 1, "reward_mean": 0.5, "accuracy": None, "response_length_mean": 3.0}])
    page = write_report(tmp_path).read_text()
    assert re.findall(r"no row of metrics.jsonl has ([^.]*)\.", page) == [
        "eval/&lt;set&gt;/pass@1 or held_out_accuracy",
        "finished_fraction",
        "entropy",
        "zero_signal_groups",
        "solved_groups, distinct_responses",
        "grad_norm",
        "alpha",
        "weight_reliability, weight_reliability_raw",
        "divergence_severity",
        "variance_amplification",
        "divergence_by_position",
        "divergence_by_position",
        "time/&lt;phase&gt;",
        "tokens_per_second",
        "idle/trainer, idle/engine",
    ]
    assert [[series["key"] for series in chart["series"]] for chart in data_of(page)["charts"]] == [
        ["reward_mean"],
        ["response_length_mean"],
    ]
    assert "there is no config.yaml" in page


def test_an_unfinished_run_is_summarized_from_its_rows(tmp_path):
    write_rows(tmp_path, [{"step": 1, **ROW}, {"step": 2, **ROW, "alpha": 0.25}])
    page = write_report(tmp_path).read_text()
    assert "2 steps recorded, 1 to 2. The run has not finished" in page
    assert "<dt>mean alpha</dt><dd>0.375</dd>" in page
    assert "<dt>wall time (h:mm:ss)</dt><dd>0:00:07</dd>" in page
    assert "<dt>held-out pass@1 at the end</dt><dd>-</dd>" in page


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


def test_every_set_has_a_curve_with_its_errors():
    evaluations = [
        {"step": step, "set": name, "pass@1": 0.25, "pass@1_se": 0.01, "pass@4": 0.5, "truncated_fraction": 0.125}
        for step in (0, 10)
        for name in ("gsm8k", "math")
    ]
    curves = held_out(run_of([{"step": 1, "held_out_accuracy": 0.9}], evaluations))["series"]
    assert [curve["name"] for curve in curves] == ["gsm8k, pass@1", "gsm8k, pass@4", "math, pass@1", "math, pass@4"]
    assert (curves[0]["x"], curves[0]["y"], curves[0]["error"]) == ([0, 10], [0.25, 0.25], [0.01, 0.01])
    assert curves[1]["error"] == [None, None]
    cut = truncation(run_of([{"step": 1, "finished_fraction": 0.75}], evaluations))["series"]
    assert [curve["name"] for curve in cut] == ["training", "gsm8k", "math"] and cut[1]["y"] == [0.125, 0.125]
    assert columns(run_of([{"step": 1, "finished_fraction": 0.75}]))["truncated_fraction"] == [0.25]
    from_rows = held_out(run_of([{"step": 5, "eval/gsm8k/pass@1": 0.5, "eval/gsm8k/pass@1_se": 0.02}]))["series"]
    assert from_rows == [{"name": "gsm8k, pass@1", "always": True, "x": [5], "y": [0.5], "error": [0.02]}]


def test_held_out_points_come_from_the_rows_first_and_then_the_summary():
    rows = [{"step": 1}, {"step": 2, "held_out_accuracy": 0.5}, {"step": 3}]
    assert held_out_points(run_of(rows)) == {2: 0.5}
    both = held_out_points(run_of(rows, (), {"start_accuracy": 0.25, "final_accuracy": 0.75}))
    assert both == {0: 0.25, 2: 0.5, 3: 0.75}
    assert held_out_points(run_of(rows[:2], (), {"start_accuracy": None, "final_accuracy": 0.75})) == {2: 0.5}


def test_positions_have_labels_a_range_and_profiles_of_the_ends():
    assert [position_label(i) for i in range(4)] == ["1", "2–3", "4–7", "8–15"]
    rows = [{"step": step, "divergence_by_position": [0.001 * step, 0.002] + [0.003] * (step > 15)} for step in range(1, 21)]
    grid, profile = positions(run_of(rows))
    assert grid["labels"] == ["1", "2–3", "4–7"] and grid["range"] == (0.001, 0.02) and len(grid["values"]) == 20
    first, last = profile["series"]
    assert (first["name"], first["x"], first["y"]) == ("first 2 steps", [0, 1], pytest.approx([0.0015, 0.002]))
    assert (last["name"], last["y"]) == ("last 2 steps", pytest.approx([0.0195, 0.002, 0.003]))
    assert positions(run_of([{"step": 1}])) is None and positions(run_of([{"step": 1, "divergence_by_position": [0.0]}])) is None


def test_what_no_phase_accounts_for_is_shown():
    row = {"step": 1, "time/generate": 2.0, "time/train": 1.0, "time/step": 3.5, "time/evaluate": 9.0}
    assert [series["name"] for series in phases(run_of([row]))["series"]] == ["generate", "train", "evaluate", "other"]
    assert columns(run_of([row]))["time/other"] == [0.5]


def test_moving_average_by_hand():
    assert moving_average([1.0, 2.0, 6.0, 4.0], 3) == [1.5, 3.0, 4.0, 5.0]
