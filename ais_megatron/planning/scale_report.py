"""Writes a sweep (`scale.sweep`) as a page with tables, as JSON and as a plot: ``sweep.md``, ``sweep.json`` and ``sweep.png``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from ais_megatron.config import Config
from ais_megatron.planning.cost import DISK_GB_S, NVLINK_HOP_US, PCIE_GB_S, SERVER_MEM_FRACTION, Assumptions, row_tokens
from ais_megatron.planning.parameters import total_parameters
from ais_megatron.planning.plan import Plan
from ais_megatron.planning.scale import CONTEXT_SIZES, ROUTES, SHARES, SHORTEST_SLICE, WORTH_IT, Limit, Point, as_json, limits
from ais_megatron.runs.folder import write_json_atomic, write_text_atomic
from ais_megatron.runs.plotting import BLUE, GREEN, ORANGE, PURPLE, STYLE

PAGE, DATA, PLOT = "sweep.md", "sweep.json", "sweep.png"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
ROUTE_STYLES = ("-", "--", ":")


def assumption_lines(config: Config, assumed: Assumptions, measured: Mapping[str, float]) -> list[str]:
    """Every assumption of a sweep as one line. measured: those that come from a calibration."""
    rollout, train = config.rollout, config.train
    lines = [f"card: {assumed.card.name}, {assumed.memory:g} GiB, {assumed.flops / 1e12:g} TFLOP/s BF16, {assumed.bandwidth / 1e9:g} GB/s"]
    for field in fields(assumed):
        if field.name in ("card", "gpu_memory_gib", "peak_tflops", "memory_gb_s", "response_tokens", "rollout_gpus"):
            continue  # in the line above, or varied by the sweep
        origin = " (measured, from --calibration)" if field.name in measured else ""
        lines.append(f"{field.name}: {getattr(assumed, field.name):g}{origin}")
    share = SERVER_MEM_FRACTION if rollout.sglang.mem_fraction is None else rollout.sglang.mem_fraction
    return [
        *lines,
        f"batch: rollout.prompts_per_step={rollout.prompts_per_step} x group_size={rollout.group_size}, whatever the number of GPUs; "
        f"rollout.ahead={rollout.ahead}, train.tokens_per_microbatch={train.tokens_per_microbatch}, "
        f"updates_per_batch={train.updates_per_batch}",
        f"responses: all have the full length, so there is no tail of a few long ones; prompts of {row_tokens(config, assumed)[0]} tokens",
        f"division: 1/{', 1/'.join(map(str, SHARES))} of the GPUs train; servers of 1, 2, 4 or 8 GPUs with at most "
        f"{rollout.sglang.max_running or rollout.sglang.max_concurrency} requests each, and a share of {share:g} of their memory",
        f"generation: {rollout.quantization}, KV cache {rollout.kv_cache}; TP within a server costs only the latency of a layer",
        f"trainer: context parallelism of {', '.join(map(str, CONTEXT_SIZES))} with at least {SHORTEST_SLICE:,} tokens of a row on a rank; "
        "collectives do not overlap with computation; gradients are reduced once per update",
        f"sync: one after the other gathering, quantising, sending; transport={rollout.sglang.transport}, buckets of "
        f"{rollout.sync_bucket_mb:g} MiB; NVLink hop {NVLINK_HOP_US:g} us, PCIe {PCIE_GB_S:g} and disk {DISK_GB_S:g} GB/s",
        f"a length stops scaling where twice the GPUs give less than {WORTH_IT:g} times the throughput",
    ]


def layout_text(plan: Plan) -> str:
    """Such as ``TP 4 DP 16, recomputed``."""
    p = plan.config.parallel
    names = [f"{key.upper()} {value}" for key in ("tp", "pp", "cp", "dp", "ep", "etp") if (value := getattr(p, key)) > 1]
    return (" ".join(names) or "one GPU") + (", recomputed" if plan.config.model.recompute == "full" else "")


def markdown(points: Sequence[Point], lines: Sequence[str], title: str) -> str:
    parts = [f"# {title}", "", "Estimates, not measurements. Assumptions:", "", *(f"- {line}" for line in lines), ""]
    parts += ["## Where it stops", "", *(f"- {_limit_text(limit)}" for limit in limits(points)), "", f"![throughput and sync]({PLOT})", ""]
    for length in dict.fromkeys(point.response_tokens for point in points):
        parts += [f"## Responses of {length:,} tokens", "", *_table([p for p in points if p.response_tokens == length]), ""]
    return "\n".join(parts).rstrip() + "\n"


def _limit_text(limit: Limit) -> str:
    if limit.gpus is None:
        return f"{limit.response_tokens:,} tokens: {limit.why}"
    return f"{limit.response_tokens:,} tokens: scales to {limit.gpus:,} GPUs; {limit.why}"


def _table(points: Sequence[Point]) -> list[str]:
    header = ["GPUs", "trainer", "server", "GiB of a rank", "generate [s]", "trainer [s]", "sync: chain, tree [s]", "tokens/s", "per GPU"]
    header.append("bottleneck")
    rows = [header, ["---"] * len(header)]
    for point in points:
        if point.plan is None:
            rows.append([f"{point.gpus:,}", *["-"] * (len(header) - 2), point.bottleneck])
            continue
        plan, time = point.plan, point.plan.time
        sglang = plan.config.rollout.sglang
        server = f"{plan.servers.engines:,} x TP {sglang.tp}" + (f" EP {sglang.ep}" if sglang.ep > 1 else "")
        rows.append(
            [
                f"{point.gpus:,}",
                f"{plan.gpus:,}: {layout_text(plan)}",
                server,
                f"{plan.peak / 2**30:.0f}",
                f"{time.generate:.3g}",
                f"{time.trainer:.3g}",
                f"{point.sync[0]:.3g}, {point.sync[1]:.3g}",
                f"{point.tokens_per_second:,.0f}",
                f"{point.tokens_per_second / point.gpus:,.0f}",
                point.bottleneck,
            ]
        )
    return ["| " + " | ".join(row) + " |" for row in rows]


def write_sweep(folder: Path, config: Config, assumed: Assumptions, points: Sequence[Point], measured: Mapping[str, float]) -> str:
    """Write the three files into `folder`, which is made if it is missing. Returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = assumption_lines(config, assumed, measured)
    a = config.architecture
    page = markdown(points, lines, f"{total_parameters(a) / 1e9:.3g} B parameters ({a.model_type}) on {_span(points)} GPUs")
    write_text_atomic(folder / PAGE, page)
    found = [dict(response_tokens=limit.response_tokens, gpus=limit.gpus, why=limit.why) for limit in limits(points)]
    write_json_atomic(folder / DATA, {"assumptions": lines, "limits": found, "points": as_json(points)})
    save_plot(points, folder / PLOT)
    return page


def _span(points: Sequence[Point]) -> str:
    gpus = sorted({point.gpus for point in points})
    return f"{gpus[0]:,} to {gpus[-1]:,}" if len(gpus) > 1 else f"{gpus[0]:,}"


def save_plot(points: Sequence[Point], path: Path) -> None:
    """Throughput with the ideal, throughput per GPU, and the seconds of a sync by each route."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16.0, 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        whole, each, sync = figure.subplots(1, 3)
        lengths = list(dict.fromkeys(point.response_tokens for point in points))
        for length, colour in zip(lengths, COLOURS * len(lengths), strict=False):
            fitting = [p for p in points if p.response_tokens == length and p.plan is not None]
            if not fitting:
                continue
            gpus, rates = [p.gpus for p in fitting], [p.tokens_per_second for p in fitting]
            whole.plot(gpus, rates, "o-", color=colour, label=f"{length:,} tokens")
            whole.plot(gpus, [rates[0] / gpus[0] * n for n in gpus], "--", linewidth=1.0, color=colour)
            each.plot(gpus, [rate / n for rate, n in zip(rates, gpus, strict=True)], "o-", color=colour, label=f"{length:,} tokens")
            if length == lengths[0]:
                for number, (route, style) in enumerate(zip(ROUTES, ROUTE_STYLES, strict=True)):
                    sync.plot(gpus, [p.sync[number] for p in fitting], style, marker="o", color=COLOURS[number], label=route)
        whole.set_yscale("log")
        sync.set_yscale("log")
        each.set_ylim(bottom=0.0)
        for axes, title, label in (
            (whole, "Throughput (dashed: ideal)", "response tokens per second"),
            (each, "Throughput per GPU", "response tokens per second and GPU"),
            (sync, f"A sync, responses of {lengths[0]:,} tokens", "seconds"),
        ):
            axes.set_title(title)
            axes.set_ylabel(label)
            axes.set_xlabel("GPUs, of trainer and servers together")
            axes.set_xscale("log", base=2)
            ticks = sorted({p.gpus for p in points})
            axes.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=45)
            axes.minorticks_off()
            if axes.lines:
                axes.legend(loc="best")
        figure.savefig(path)
