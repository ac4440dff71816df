"""The benchmarks for a GPU run on a CPU at their smallest size, through the driver that a GPU machine would start."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

FOLDER = ROOT / "benchmarks" / "gpu"
HELPERS = {"bench", "model", "run", "driver", "machine"}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch):  # noqa: ANN201
    monkeypatch.syspath_prepend(str(FOLDER))
    import driver

    return driver


@pytest.mark.slow
def test_every_script_passes_its_checks_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, FOLDER / "run.py", "--device", "cpu", "--tiny", "--packages", tmp_path, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1440)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert {"python", "torch", "CUDA", "driver", "triton", "transformers", "megatron-core", "GPU", "date", "revision"} <= report.keys()
    assert [script["name"] for script in report["scripts"]] == [s.stem for s in in_order() if s.stem not in HELPERS]
    for script in report["scripts"]:
        assert [run["status"] for run in script["runs"]] == ["ok"], script
        if script["name"] == "serving":
            assert [entry["what"] for entry in script["skipped"]] == ["everything"] and not script["rows"]
            continue
        assert script["checks"] and all(check["passed"] for check in script["checks"])
        assert any(isinstance(cell, dict) and cell["value"] is not None for row in script["rows"] for cell in row.values())
        assert f"{script['name']}  " in done.stdout.split("script  ")[-1]


def in_order() -> list[Path]:
    """The scripts in the order of run.py's table, and none forgotten there."""
    names = [line.split('"')[1] for line in (FOLDER / "run.py").read_text().splitlines() if line.startswith('    Script("')]
    assert set(names) == {path.stem for path in FOLDER.glob("*.py")} - HELPERS
    return [FOLDER / f"{name}.py" for name in names]


FAKE = """
import argparse, json, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--json")
parser.add_argument("--only-checks", action="store_true")
options, _ = parser.parse_known_args()
data = {"finished": FINISHED, "checks": [{"what": "sums", "passed": PASSED, "detail": ""}], "rows": []}
data["skipped"] = [{"what": "a part", "why": "too new"}]
if not options.only_checks:
    data["rows"] = [{"variant": "plain", "time": {"value": 1.0, "unit": "s", "text": "1 s"}}]
with open(options.json, "w") as file:
    json.dump(data, file)
print("the last words")
END
"""


@pytest.mark.slow
def test_the_driver_goes_on_after_failures_and_stops_in_time(tmp_path: Path, driver, capsys: pytest.CaptureFixture) -> None:  # noqa: ANN001
    endings = {
        "good": ("True", ""),
        "hanging": ("True", "time.sleep(600)"),  # with its table finished
        "wrong": ("False", "sys.exit(1)"),
        "broken": ("True", "raise ValueError('a bug')"),
        "slow": ("True", "time.sleep(0 if options.only_checks else 600)"),
        "late": ("True", ""),
    }
    for name, (passed, end) in endings.items():
        (tmp_path / f"{name}.py").write_text(FAKE.replace("PASSED", passed).replace("FINISHED", str(name == "hanging")).replace("END", end))
    seconds = {"good": 4.0, "hanging": 4.0, "slow": 6.0}  # beside those the last one's share is too little to start with
    scripts = [driver.Script(name, seconds.get(name, 0.01)) for name in endings]
    options = argparse.Namespace(device="cuda", tiny=True, sglang_python="python")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "LEAST_SECONDS", 0.5)
        patch.setattr(driver, "GRACE_SECONDS", 0.1)
        patch.setattr(driver, "CHECKS_SHARE", 0.8)
        runs = driver.Driver(options, tmp_path, tmp_path, {}, time.monotonic() + 9.0).run(scripts)
    results = {result["name"]: result for result in runs}
    assert list(results) == list(endings)
    statuses = {name: [(run["run"], run["status"]) for run in result["runs"]] for name, result in results.items()}
    assert statuses == {
        "good": [("checks", "ok"), ("times", "ok")],
        "hanging": [("checks", "ok"), ("times", "ok")],
        "wrong": [("checks", "a check failed")],
        "broken": [("checks", "broke with status 1")],
        "slow": [("checks", "ok"), ("times", "no time left")],
        "late": [("checks", "ok"), ("times", "no time left")],
    }
    assert results["good"]["rows"] == results["slow"]["rows"] != [], "what a killed script had written is kept"
    assert results["broken"]["runs"][0]["last_lines"][-1] == "ValueError: a bug" and "a bug" in capsys.readouterr().out
    assert {"what": "the times", "why": "the checks ended with: a check failed"} in results["wrong"]["skipped"]
    assert {"what": "the rest of the times", "why": "no time left"} in results["late"]["skipped"]
    assert [driver.has_failed(result) for result in runs] == [False, False, True, True, False, False]


def test_without_a_gpu_nothing_is_started(tmp_path: Path) -> None:
    done = subprocess.run([FOLDER / "run.sh", "--packages", tmp_path], env={"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 2 and "torch sees no CUDA device here; --device cpu --tiny" in done.stderr
