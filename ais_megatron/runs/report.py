"""Writes a run's report, finished or not: ``report/index.html`` with five plots and the closing figures.

Everything comes from the run folder: ``metrics.jsonl``, and ``config.yaml`` and ``summary.json`` if they exist. So a report can be
drawn again at any time and on any machine, even for a run that was killed. The page loads only the images beside it.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ais_megatron.runs.folder import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, write_text_atomic
from ais_megatron.runs.metrics import read_metrics
from ais_megatron.runs.plotting import PLOTS, Curves, Plot, missing_columns, save_plot
from ais_megatron.runs.summary import is_number, summarize, summary_lines

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff; }}
h1 {{ margin-bottom: 0; }}
h2 {{ margin: 2.5rem 0 0.25rem; }}
p {{ margin: 0.25rem 0 0.75rem; color: #555; }}
table {{ border-collapse: collapse; margin-top: 1.5rem; }}
td {{ padding: 0.35rem 1.5rem 0.35rem 0; border-bottom: 1px solid #ddd; }}
td + td {{ text-align: right; font-variant-numeric: tabular-nums; padding-right: 0; }}
img {{ max-width: 100%; height: auto; }}
pre {{ overflow-x: auto; background: #f6f6f6; padding: 1rem; font-size: 13px; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{subtitle}</p>
<table>
{table}
</table>
{plots}
{config}
</body>
</html>
"""


def write_report(run_dir: Path) -> Path:
    """Draw the plots into ``run_dir/report/`` and return the path of its ``index.html``. An earlier report is replaced.

    A plot is left out if no row has its columns. The page then names the missing columns.

    Raises:
        ValueError: ``metrics.jsonl`` is missing or has no row, or a line before the last is damaged.
    """
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir)
    if not rows:
        raise ValueError(
            f"{run_dir / METRICS_FILE}: there is no step to report on; give the folder of a run that has finished at least one step"
        )
    run = Curves(rows, _read_summary(run_dir))
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    missing = {plot.file: missing_columns(plot, run) for plot in PLOTS}
    for plot in PLOTS:
        if missing[plot.file]:
            (folder / plot.file).unlink(missing_ok=True)  # an earlier report's image would not belong to these rows
        else:
            save_plot(plot, run, folder / plot.file)
    index = folder / "index.html"
    write_text_atomic(index, _page(run_dir, run, missing))
    return index


def _read_summary(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / SUMMARY_FILE
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it to report from {METRICS_FILE} alone") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(summary).__name__}")
    return summary


def _page(run_dir: Path, run: Curves, missing: dict[str, list[str]]) -> str:
    summary, steps = run.summary, [row["step"] for row in run.rows]
    subtitle = f"{len(steps)} steps recorded, {steps[0]} to {steps[-1]}"
    if summary is None:
        seconds = math.fsum(row["time/step"] for row in run.rows if is_number(row.get("time/step")))
        summary = summarize(run.rows, None, None, seconds)
        subtitle += f". The run has not finished (no {SUMMARY_FILE}): wall time is the sum of its steps"
    table = "\n".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>" for name, text in summary_lines(summary))
    return _PAGE.format(
        title=html.escape(f"Run {run_dir.resolve().name}"),
        subtitle=html.escape(subtitle + "."),
        table=table,
        plots="\n".join(_plot_section(plot, missing[plot.file]) for plot in PLOTS),
        config=_config_section(run_dir / CONFIG_FILE),
    )


def _plot_section(plot: Plot, missing: Sequence[str]) -> str:
    heading, caption = html.escape(plot.heading), html.escape(plot.caption)
    if missing:
        body = f"<p>Left out: no row of {METRICS_FILE} has {html.escape(', '.join(missing))}.</p>"
    else:
        body = f'<p>{caption}</p>\n<img src="{plot.file}" alt="{heading}">'
    return f"<h2>{heading}</h2>\n{body}"


def _config_section(path: Path) -> str:
    """The configuration as text, with the comments that name its revision. It is only shown, so it may be from any version."""
    if not path.exists():
        return f"<h2>Configuration</h2>\n<p>Left out: there is no {CONFIG_FILE}.</p>"
    text = html.escape(path.read_text(encoding="utf-8", errors="replace"))
    return f"<h2>Configuration</h2>\n<details><summary>{CONFIG_FILE}</summary>\n<pre>{text}</pre>\n</details>"
