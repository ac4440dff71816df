"""The sweep over numbers of GPUs: it finds the fastest division, its causes add up, and it says where and why scaling stops."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ais_megatron.cli import app
from ais_megatron.config import ConfigError, load_config
from ais_megatron.planning.calibration import read_calibration
from ais_megatron.planning.cost import Assumptions, Servers, SyncBytes, sync_parts
from ais_megatron.planning.plan import fitting_plans, revised, suggest
from ais_megatron.planning.scale import Point, _context_sizes, limits, sweep
from ais_megatron.planning.scale_report import assumption_lines, markdown
from tests.helpers.paths import ROOT

CONFIGS = ROOT / "configs"
DENSE, LARGE, TINY = (CONFIGS / f"{name}.yaml" for name in ("qwen3_8b_ais", "qwen3_235b_a22b_ais", "tiny_countdown"))


@pytest.fixture(scope="module")
def points() -> list[Point]:
    return sweep(load_config(DENSE), Assumptions(), [16, 64, 256, 1024], [4096, 32768])


def test_no_division_of_the_gpus_is_faster(points: list[Point]) -> None:
    """By trying all: an eighth, a quarter or a half of 16 GPUs train, with every size of server."""
    best = 0.0
    for training in (2, 4, 8):
        for tp in (1, 2, 4, 8):
            sglang = load_config(DENSE).rollout.sglang.model_dump() | {"tp": tp}
            for cp in (1, 2, 4):
                config = revised(load_config(DENSE), rollout={"sglang": sglang}, parallel={"dp": 1, "cp": cp})
                if not isinstance(config, str) and (16 - training) % tp == 0:
                    found = suggest(config, Assumptions(rollout_gpus=16 - training), training, count=100)
                    best = max([best, *(plan.time.tokens_per_second for plan in found)])
    (point,) = (p for p in points if (p.gpus, p.response_tokens) == (16, 4096))
    assert point.tokens_per_second == pytest.approx(best, rel=1e-3)  # the shortest trainer, of steps that generation decides


def test_long_rows_are_spread_over_ranks() -> None:
    """Where the trainer decides, with context parallelism only if no layout without it is as fast."""
    (point,) = sweep(load_config(DENSE), Assumptions(), [16], [32768])
    plan = point.plan
    assert plan is not None and plan.config.parallel.cp > 1 and point.critical == "trainer"
    without = fitting_plans(plan.config, plan.assumed, plan.gpus, [1])
    assert all(plan.time.trainer + plan.time.sync < other.time.trainer + other.time.sync for other in without)
    for length, sizes in ((1024, [1]), (4096, [1, 2, 4]), (32768, [1, 2, 4, 8])):
        config = revised(load_config(DENSE), rollout={"max_response_tokens": length})
        assert not isinstance(config, str) and _context_sizes(config, Assumptions()) == sizes, "1,024 tokens or more on each rank"


def test_causes_add_up_to_the_step(points: list[Point]) -> None:
    for point in points:
        plan = point.plan
        assert plan is not None and plan.problems == [] and plan.gpus + plan.servers.gpus == point.gpus
        seconds = {phase: sum(s for p, _, s in point.causes if p == phase) for phase in ("generate", "trainer", "sync")}
        assert seconds == pytest.approx({phase: getattr(plan.time, phase) for phase in seconds})
        assert plan.time.total == pytest.approx(max(seconds["generate"], seconds["trainer"]) + seconds["sync"])
        assert point.sync[0] == pytest.approx(plan.time.sync) and point.bottleneck.startswith(point.critical)


def test_a_broadcast_by_hand() -> None:
    """45 GB in 10 buckets to 16 servers of one GPU on two nodes, over 45 GB/s between nodes and 400 within."""
    config = load_config(DENSE, ["rollout.quantization=none"])
    moved = SyncBytes(gathered=0, broadcast=0, pushed=45 * 10**9, buckets=10)
    servers = Servers(gpus=16, tp=1, weights=0, kv_per_token=1, kv_tokens=1, concurrency=1)
    chunk = 0.5 * 2**20
    hop, inside = 14e-6 + chunk / 45e9, 3.4e-6 + chunk / 400e9
    chain, tree, direct = (sync_parts(config, Assumptions(), moved, servers, route) for route in ("chain", "tree", "direct"))
    assert [parts["bytes to the servers"] for parts in (chain, tree, direct)] == [1.0, 1.0, 16.0]
    assert chain["hops of the broadcast"] == pytest.approx(10 * (2 * hop + 14 * inside))
    assert tree["hops of the broadcast"] == pytest.approx(10 * (2 * 2 * hop + 7 * inside))
    assert chain["requests to all servers"] == pytest.approx(11 * 16 * 250e-6)
    assert chain["the servers' own work"] == pytest.approx(0.2)
    # The chain grows with the servers, and the tree with their logarithm.
    many = replace(servers, gpus=16 * 64)
    assert sync_parts(config, Assumptions(), moved, many)["hops of the broadcast"] == pytest.approx(10 * 64 * (2 * hop + 14 * inside))
    assert sync_parts(config, Assumptions(), moved, many, "tree")["hops of the broadcast"] == pytest.approx(10 * (2 * 8 * hop + 7 * inside))


def test_a_batch_of_sixteen_responses_stops_early_and_says_why() -> None:
    config = load_config(DENSE, ["rollout.prompts_per_step=8", "rollout.group_size=2"])
    found = sweep(config, Assumptions(), [16, 32, 64, 128], [4096])
    (limit,) = limits(found)
    assert limit.gpus is not None and limit.gpus < 128
    at = [point.gpus for point in found].index(limit.gpus)
    assert found[at + 1].tokens_per_second < 1.4 * found[at].tokens_per_second
    assert all(b.tokens_per_second >= 1.4 * a.tokens_per_second for a, b in zip(found[:at], found[1 : at + 1], strict=True))
    assert f"{found[at + 1].gpus} GPUs give" in limit.why and f"Bottleneck: {found[at + 1].bottleneck}" in limit.why


def test_what_does_not_fit_is_a_line_of_the_table() -> None:
    config = load_config(LARGE)
    found = sweep(config, Assumptions(), [16], [4096])
    assert found[0].plan is None
    page = markdown(found, assumption_lines(config, Assumptions(), {}), "title")
    assert "| 16 | - | - | - | - | - | - | - | - | no layout fits into the memory |" in page
    assert "4,096 tokens: no layout fits into the memory of so few GPUs" in page


def test_experts_are_spread_over_servers_whose_shards_are_whole_blocks() -> None:
    """Servers of 8 GPUs need EP 2: 1536 columns on 8 GPUs would be shards of 192."""
    (point,) = sweep(load_config(LARGE), Assumptions(), [512], [4096])
    assert point.plan is not None
    sglang = point.plan.config.rollout.sglang
    assert 1536 // (sglang.tp // sglang.ep) % 128 == 0
    memory = point.plan.servers
    assert ceil(memory.weights / 2**30) < 80 * 0.85 and memory.kv_tokens >= 4352


@pytest.mark.parametrize(
    ("path", "gpus", "lengths", "message"),
    [
        (TINY, [16], [64], "--sweep: rollout.engine=local has no servers"),
        (DENSE, [], [64], "--sweep-gpus : must be one or more numbers"),
        (DENSE, [16], [0], "--responses 0: must be one or more numbers, each 1 or more"),
        (DENSE, [1], [64], "--sweep-gpus 1: must be 2 or more"),
        (DENSE, [16], [50000], "--responses 50000: rollout.max_response_tokens=50000: leaves no room"),
    ],
)
def test_what_a_sweep_refuses(path: Path, gpus: list[int], lengths: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        sweep(load_config(path), Assumptions(), gpus, lengths)


def test_a_calibration_replaces_assumptions_and_is_named(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"machine": "any", "assumptions": {"train_ratio": 2.5, "request_us": 400}}))
    assert read_calibration(file) == {"train_ratio": 2.5, "request_us": 400.0}
    command = ["plan", str(DENSE), "--sweep", "--sweep-gpus", "16", "--responses", "4096", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--calibration", str(file), "--request-us", "300"], catch_exceptions=False)
    assert "- train_ratio: 2.5 (measured, from --calibration)" in done.output and "- request_us: 300\n" in done.output
    file.write_text('{"assumptions": {"mfu": 0.9}}')
    with pytest.raises(ConfigError, match=r"unknown assumptions mfu; allowed: train_ratio, "):
        read_calibration(file)
    file.write_text("[]")
    with pytest.raises(ConfigError, match=r"measured.json: cannot be used .*; give the file that benchmarks/plan_calibration.py"):
        read_calibration(file)


def test_the_command_writes_a_page_data_and_a_plot_without_torch(tmp_path: Path) -> None:
    code = "import sys; from ais_megatron.cli import app; app(sys.argv[1:], standalone_mode=False); assert 'torch' not in sys.modules"
    options = ["--sweep", "--sweep-gpus", "32,16", "--responses", "4096", "--out", str(tmp_path / "a" / "b")]
    command = [sys.executable, "-c", code, "plan", str(DENSE), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "a" / "b"
    assert sorted(path.name for path in folder.iterdir()) == ["sweep.json", "sweep.md", "sweep.png"]
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((folder / "sweep.json").read_text())
    assert [(row["gpus"], row["trainer_gpus"] + row["rollout_gpus"]) for row in data["points"]] == [(16, 16), (32, 32)]
    assert data["points"][1]["sync_seconds"].keys() == {"chain", "tree", "direct"} and data["limits"][0]["gpus"] in (16, 32)
    page = (folder / "sweep.md").read_text()
    for name in ("mfu: 0.4", "train_ratio: 3", "network_gb_s: 45", "batch: rollout.prompts_per_step=64", "NVLink hop 3.4 us"):
        assert name in page and name in done.stdout
