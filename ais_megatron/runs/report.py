"""Writes a run's report, finished or not: ``report/index.html``, one file that needs no network and nothing beside it.

Everything comes from the run folder: ``metrics.jsonl``, and ``samples.jsonl``, ``evaluations.jsonl``, ``config.yaml``,
``summary.json`` and ``profile/`` if they exist. So a report can be written again at any time and on any machine, even for a run that
was killed.

The page draws its charts from data in it. A response is hostile text: it is in the page only as JSON without ``<``, and reaches the
screen only as text nodes. A content security policy also allows no script and no style but ours, named by their hashes, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ais_megatron.runs import charts
from ais_megatron.runs.charts import Run
from ais_megatron.runs.folder import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, encode_json, write_text_atomic
from ais_megatron.runs.metrics import read_evaluations, read_metrics
from ais_megatron.runs.profile_page import profile_section
from ais_megatron.runs.profiling import read_profiles
from ais_megatron.runs.samples import SAMPLES_FILE, Sample, chosen_lines
from ais_megatron.runs.summary import is_number, summarize, summary_lines

SAMPLE_BYTES = 24_000_000  # most of samples.jsonl that the page holds
REPETITIVE = 0.5  # a response with a larger share of repeated 4-grams is marked
_OLD_IMAGES = ("ais", "held_out_accuracy", "phase_times", "response_length", "reward")  # reports of earlier versions had these files

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<div class="bar"><nav aria-label="Sections">
<a href="#overview">Overview</a> <a href="#learning">Learning</a> <a href="#mismatch">Engine and trainer</a> <a href="#time">Time</a>
<a href="#samples">Samples</a> <a href="#configuration">Configuration</a>
<button type="button" id="theme">Dark colours</button>
</nav></div>
<main>
<h1 id="overview">{title}</h1>
<p class="note">{subtitle}</p>
<noscript><p class="empty">The charts and the samples are drawn by a script in this page, and scripts are switched off.</p></noscript>
<dl class="figures">
{figures}
</dl>
{sections}
</main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""
_CONTROLS = """<div class="controls" role="search" aria-label="Filter of the samples">
<div class="field"><label for="step">Step</label><div class="row"><button type="button" id="earlier" aria-label="Earlier step">‹</button>
<select id="step"></select><button type="button" id="later" aria-label="Later step">›</button></div></div>
<label>Outcome <select id="outcome"><option value="all">all</option><option value="correct">correct</option>
<option value="wrong">wrong</option><option value="malformed">no answer found</option></select></label>
<div class="field">Reward from, to<div class="row"><input id="least" type="number" step="any" aria-label="Least reward">
<input id="most" type="number" step="any" aria-label="Largest reward"></div></div>
<label>Marked as <select id="flag"><option value="all">anything</option><option value="repetitive">repetitive</option>
<option value="garbled">garbled</option><option value="cut">cut at the limit</option></select></label>
<label>Order <select id="order"><option value="sampled">as sampled</option><option value="best">largest reward</option>
<option value="worst">smallest reward</option><option value="disagreement">largest D</option><option value="longest">longest</option>
<option value="repetition">most repetitive</option></select></label>
<label class="grow">Search <input id="search" type="search" placeholder="in prompt, response, reason"></label>
<label class="check"><input id="marked" type="checkbox"> underline repeats</label>
</div>
<div class="shades"><label class="check"><input id="shaded" type="checkbox" checked> Shade tokens by log ratio</label>
<span>engine gave more probability <span id="low"></span></span><span class="ramp" role="img"
aria-label="Red: the engine gave the token more probability. Blue: the trainer did."></span>
<span><span id="high"></span> trainer did</span> <label>scale <select id="scale"></select></label></div>
<p class="note"><strong id="count" aria-live="polite"></strong> <span id="spoken" class="note" aria-live="polite" hidden></span></p>
<div id="list"></div>"""


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report/index.html`` and return its path. An earlier report is replaced.

    A chart is left out if no row has its columns. The page then names the missing columns.

    Raises:
        ValueError: ``metrics.jsonl`` is missing or has no row, or a line of a file before the last is damaged.
    """
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir)
    if not rows:
        raise ValueError(
            f"{run_dir / METRICS_FILE}: there is no step to report on; give the folder of a run that has finished at least one step"
        )
    run = Run(rows, read_evaluations(run_dir), _read_summary(run_dir))
    path = run_dir / SAMPLES_FILE
    samples, kept, steps = chosen_lines(path, SAMPLE_BYTES) if path.exists() else ([], [], [])
    page = _page(run_dir, run, samples, _samples_note(samples, kept, steps))
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    for name in _OLD_IMAGES:
        (folder / f"{name}.png").unlink(missing_ok=True)
    index = folder / "index.html"
    write_text_atomic(index, page)
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


def _samples_note(samples: Sequence[Sample], kept: Sequence[int], steps: Sequence[int]) -> str:
    note = (
        "What the policy wrote, and what engine and trainer thought of it. Point at a token to see the probability that each of them gave "
        "it, or walk through a response with the arrow keys."
    )
    if len(kept) < len(steps):
        note += (
            f" {SAMPLES_FILE} has {len(steps)} steps. This page has {len(kept)} of them, the newest and earlier ones at equal distances, "
            f"because it holds at most {SAMPLE_BYTES // 1_000_000} MB of responses."
        )
        if len(kept) == 1:
            note += f" Of this step it has the first {len(samples)} responses."
    if any(sample["old_logprobs"] is None for sample in samples):
        note += " Some responses were written without the trainer's log-probabilities, so their tokens are not shaded."
    return note


def _page(run_dir: Path, run: Run, samples: Sequence[Sample], samples_note: str) -> str:
    summary, steps = run.summary, [row["step"] for row in run.rows]
    subtitle = f"{len(steps)} steps recorded, {steps[0]} to {steps[-1]}"
    if summary is None:
        seconds = math.fsum(row["time/step"] for row in run.rows if is_number(row.get("time/step")))
        summary = summarize(run.rows, None, None, seconds)
        subtitle += f". The run has not finished (no {SUMMARY_FILE}): wall time is the sum of its steps"
    figures = [
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(text).replace(' nats/token', ' <small>nats/token</small>')}</dd></div>"
        for name, text in summary_lines(summary)
    ]
    cards = _Cards(run)
    sections = [
        _learning(cards),
        _mismatch(cards),
        _time(cards),
        profile_section(read_profiles(run_dir)),
        _samples(samples, samples_note),
        _configuration(run_dir / CONFIG_FILE),
    ]
    data = {"steps": steps, "columns": cards.columns, "charts": cards.specs, "samples": samples, "repetitive": REPETITIVE}
    style, script = _asset("report.css"), _asset("charts.js") + _asset("samples.js")
    return _PAGE.format(
        policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'",
        title=html.escape(f"Run {run_dir.resolve().name}"),
        subtitle=html.escape(subtitle + "."),
        figures="\n".join(figures),
        sections="\n".join(sections),
        data=_inert(data),
        style=style,
        script=script,
    )


def _asset(name: str) -> str:
    return resources.files("ais_megatron.runs").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content security policy calls an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inert(data: Any) -> str:
    """JSON that no HTML parser takes for a tag or a comment, whatever the texts in it."""
    return encode_json(data).encode(errors="replace").decode().replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


class _Cards:
    """Cards of charts as HTML. `specs` collects what the script needs to draw them."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.columns = charts.columns(run)
        self.specs: list[dict[str, Any]] = []

    def card(self, heading: str, caption: str, spec: dict[str, Any] | None, missing: str, wide: bool = False) -> str:
        kind = 'class="chart wide"' if wide else 'class="chart"'
        if spec is None:
            text = f"Left out: no row of {METRICS_FILE} has {missing}."
            return f'<section class="chart missing"><h3>{html.escape(heading)}</h3><p>{html.escape(text)}</p></section>'
        self.specs.append(spec)
        number = len(self.specs) - 1
        return f'<section {kind} data-chart="{number}"><h3>{html.escape(heading)}</h3><p>{html.escape(caption)}</p></section>'

    def of(self, chart: charts.Chart) -> str:
        return self.card(chart.heading, chart.caption, chart.spec(self.run), chart.missing)


def _section(name: str, heading: str, note: str, cards: Sequence[str]) -> str:
    return f'<h2 id="{name}">{heading}</h2>\n<p class="note">{note}</p>\n<div class="charts">\n' + "\n".join(cards) + "\n</div>"


def _learning(cards: _Cards) -> str:
    held_out = cards.card(
        "Held-out problems",
        "Share of correct responses on problems that never occur in training. The bands are one standard error.",
        charts.held_out(cards.run),
        "eval/<set>/pass@1 or held_out_accuracy",
    )
    truncation = cards.card(
        "Truncation", "Share of responses that were cut at the length limit.", charts.truncation(cards.run), "finished_fraction"
    )
    reward, length, *others = (cards.of(chart) for chart in charts.LEARNING)
    return _section(
        "learning",
        "Learning",
        "Point at a chart to read its values. If a run has many steps, the thick line is a moving average.",
        [reward, held_out, length, truncation, *others],
    )


def _mismatch(cards: _Cards) -> str:
    note = (
        "The rollout engine samples with quantised weights, the trainer computes in BF16. D measures the difference, and alpha sets how "
        "strongly importance weights correct for it."
    )
    by_position = charts.positions(cards.run) or (None, None)
    profile = "The same bins from left to right. A KV cache whose error accumulates shows as a rise towards later tokens."
    return _section(
        "mismatch",
        "Engine and trainer",
        note,
        [
            *(cards.of(chart) for chart in charts.MISMATCH),
            cards.card(
                "D by position in the response",
                "In nats per token, over the steps. Bins double in size: token 1, tokens 2 and 3, 4 to 7, and so on.",
                by_position[0],
                charts.POSITIONS,
            ),
            cards.card("D along the response", profile, by_position[1], charts.POSITIONS),
        ],
    )


def _time(cards: _Cards) -> str:
    names = "".join(f"<option>{html.escape(name)}</option>" for name in cards.columns)
    anything = (
        f'<section class="chart"><h3>Any metric</h3><p>All columns of {METRICS_FILE} that are numbers.</p>'
        f'<select id="metric" aria-label="Metric">{names}</select></section>'
    )
    parts = "Wall seconds of each phase of a step, stacked."
    spec = charts.phases(cards.run)
    return _section(
        "time",
        "Time",
        "Of the main rank, which waits for the others wherever ranks communicate.",
        [
            cards.card("Where the time goes", parts, spec, "time/<phase>", wide=True),
            cards.of(charts.THROUGHPUT),
            cards.of(charts.IDLE),
            *([anything] if names else []),
        ],
    )


def _samples(samples: Sequence[Sample], note: str) -> str:
    heading = '<h2 id="samples">Samples</h2>'
    if samples:
        return f'{heading}\n<p class="note">{html.escape(note)}</p>\n{_CONTROLS}'
    return (
        f'{heading}\n<p class="empty">This run has no {SAMPLES_FILE}. With <code>metrics.samples_every=10</code> a run writes responses, '
        "rewards with their reasons, and the log-probabilities of engine and trainer every ten steps.</p>"
    )


def _configuration(path: Path) -> str:
    """The configuration as text, with the comments that name its revision. It is only shown, so it may be from any version."""
    heading = '<h2 id="configuration">Configuration</h2>'
    if not path.exists():
        return f"{heading}\n<p>Left out: there is no {CONFIG_FILE}.</p>"
    text = html.escape(path.read_text(encoding="utf-8", errors="replace"))
    return f"{heading}\n<details><summary>{CONFIG_FILE}</summary>\n<pre>{text}</pre>\n</details>"
