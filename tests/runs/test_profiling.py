"""Profiles of single steps: what is recorded and when, to which phase an operator belongs, and what the report makes of it."""

from __future__ import annotations

import gzip
import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ais_megatron.runs.metrics import PhaseTimer
from ais_megatron.runs.profile_page import profile_section
from ais_megatron.runs.profiling import StepProfiler, read_profiles, summary_of
from ais_megatron.runs.report import write_report


def event(name: str, start: float, end: float, own: float = 0.0, device: float = 0.0, kind: str = "CPU") -> SimpleNamespace:
    """Times in microseconds."""
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        count=1,
        self_cpu_time_total=own,
        self_device_time_total=device,
        device_type=SimpleNamespace(name=kind),
    )


EVENTS = [
    event("step 2", 0, 100e6),
    event("logprobs", 10e6, 20e6, own=9e6),
    event("train", 30e6, 60e6),
    event("logprobs", 70e6, 71e6),
    event("aten::mm", 11e6, 12e6, own=1e6),
    event("aten::mm", 70.5e6, 70.6e6, own=0.5e6),  # in the second part of the phase
    event("aten::mm", 31e6, 35e6, own=4e6),
    event("aten::add", 59.9e6, 62e6, own=2e6),  # begins in the phase, and on another thread ends after it
    event("aten::copy_", 65e6, 66e6, own=0.25e6),
]


def test_operators_belong_to_the_phase_in_which_they_begin() -> None:
    summary = summary_of(EVENTS)
    assert summary["phases"] == {"logprobs": 11.0, "train": 30.0} and not summary["uses_device"]
    rows = [(row["name"], row["phase"], row["calls"], row["cpu_s"]) for row in summary["operators"]]
    assert rows == [
        ("aten::mm", "train", 1, 4.0),
        ("aten::add", "train", 1, 2.0),
        ("aten::mm", "logprobs", 2, 1.5),
        ("aten::copy_", "other", 1, 0.25),
    ]


def test_on_a_gpu_the_kernels_decide_the_order_and_are_counted_once() -> None:
    kernels = [event("aten::mul", 40e6, 41e6, own=0.1e6, device=7e6), event("kernel", 40e6, 47e6, device=7e6, kind="CUDA")]
    summary = summary_of([*EVENTS, *kernels])
    assert summary["uses_device"] and [row["name"] for row in summary["operators"]].count("kernel") == 0
    assert {key: summary["operators"][0][key] for key in ("name", "device_s")} == {"name": "aten::mul", "device_s": 7.0}


def profiler_of(folder: Path, timer: PhaseTimer, tool: str = "trace", on_cuda: bool = False) -> StepProfiler:
    return StepProfiler([2], tool, folder, rank=1, timer=timer, on_cuda=on_cuda)


def work(timer: PhaseTimer) -> None:
    with timer.phase("train"):
        torch.ones(8, 8) @ torch.ones(8, 8)


def test_a_step_leaves_a_trace_and_a_table(tmp_path: Path) -> None:
    timer = PhaseTimer()
    profiler = profiler_of(tmp_path, timer)
    for step in (1, 2, 3):
        with profiler.step(step):
            work(timer)
        assert profiler.has_recorded == (step == 2)
        profiler.write()
    folder = tmp_path / "profile" / "step_000002"
    assert sorted(path.name for path in folder.iterdir()) == ["rank_0001.json.gz", "rank_0001.operators.json"]
    names = [e.get("name") for e in json.loads(gzip.decompress((folder / "rank_0001.json.gz").read_bytes()))["traceEvents"]]
    assert {"step 2", "train", "aten::mm"} <= set(names) and names.count("train") == 1
    ((profile,),) = read_profiles(tmp_path).values()
    assert (profile["step"], profile["rank"], list(profile["phases"])) == (2, 1, ["train"])
    assert [row["calls"] for row in profile["operators"] if (row["name"], row["phase"]) == ("aten::mm", "train")] == [1]


def test_other_steps_touch_no_profiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch.profiler, "profile"), (torch.profiler, "record_function"), (torch.cuda.nvtx, "range")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("the profiler was touched"))
    timer = PhaseTimer()
    profiler = profiler_of(tmp_path, timer, on_cuda=True)
    with profiler.step(1):
        assert timer.named_range is None
        work(timer)
    profiler.write()
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_fails_leaves_no_ranges_behind(tmp_path: Path) -> None:
    timer = PhaseTimer()
    profiler = profiler_of(tmp_path, timer)
    with pytest.raises(RuntimeError, match="diverged"), profiler.step(2), timer.phase("train"):
        raise RuntimeError("diverged")
    assert timer.named_range is None and not profiler.has_recorded
    with profiler.step(2):  # a run that goes on may profile it again
        work(timer)
    assert profiler.has_recorded


def test_for_nsys_a_step_is_only_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    @contextmanager
    def nvtx(name: str):  # noqa: ANN202
        calls.append(f"({name}")
        yield
        calls.append(f"{name})")

    monkeypatch.setattr(torch.cuda.nvtx, "range", nvtx)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    monkeypatch.setattr(torch.profiler, "profile", lambda *_, **__: pytest.fail("CUPTI serves one profiler at a time"))
    timer = PhaseTimer()
    profiler = profiler_of(tmp_path, timer, "nsys", on_cuda=True)
    with profiler.step(2):
        work(timer)
    assert calls == ["start", "(step 2", "(train", "train)", "wait", "step 2)", "stop"]
    assert not profiler.has_recorded and list(tmp_path.iterdir()) == []


def profile(rank: int, seconds: float, **changes: object) -> dict[str, object]:
    operators = [dict(name="aten::<mm>", phase="train", calls=4 * rank, cpu_s=seconds, device_s=0.0)]
    operators += [dict(name="aten::add", phase="generate", calls=2, cpu_s=1.0, device_s=0.0)]
    return dict(step=7, rank=rank, phases={"train": seconds, "sync": 0.5}, uses_device=False, operators=operators) | changes


def test_the_report_shows_phases_and_operators(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "reward_mean": 0.5}\n')
    assert "Profiled steps" not in write_report(tmp_path).read_text()
    folder = tmp_path / "profile" / "step_000007"
    folder.mkdir(parents=True)
    for number, seconds in ((0, 2.0), (1, 4.0)):
        (folder / f"rank_000{number}.operators.json").write_text(json.dumps(profile(number, seconds)))
    page = write_report(tmp_path).read_text()
    assert "<summary>Step 7, 2 ranks</summary>" in page
    assert "<tr><td>train</td><td>4.000</td><td>2.000</td></tr>" in page
    assert "<tr><td>aten::&lt;mm&gt;</td><td>train</td><td>2</td><td>3.0000</td><td>75.0%</td></tr>" in page
    assert "<tr><td>aten::add</td><td>generate</td><td>2</td><td>1.0000</td><td>25.0%</td></tr>" in page
    (folder / "rank_0001.operators.json").write_text('{"step"')
    with pytest.raises(ValueError, match=r"rank_0001.operators.json: not a table of operators .*; delete it to report without it"):
        write_report(tmp_path)


def test_only_the_newest_profile_is_open() -> None:
    page = profile_section({3: [profile(0, 1.0)], 9: [profile(0, 1.0, step=9)]})
    assert "<details><summary>Step 3, 1 rank</summary>" in page and "<details open><summary>Step 9, 1 rank</summary>" in page
