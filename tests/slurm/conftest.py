"""A real Slurm with four pretended nodes of eight pretended H100s, and what the tests do to it: submit, signal, wait."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}
NUM_NODES = 4
SMALL = (
    "model.architecture={vocab_size: 32, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,"
    " num_key_value_heads: 2, head_dim: 16, max_position_embeddings: 64, tie_word_embeddings: true}",
    *("rollout.prompts_per_step=4", "rollout.group_size=2", "rollout.max_response_tokens=12", "eval.num_prompts=4", "sft.steps=0"),
    *("train.steps=4", "train.optimizer.warmup_steps=0", "eval.every=0"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


class Slurm:
    """Jobs of one test: their run folders and outputs lie below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, list[str]()
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "AIS_"))}
        self.environment |= {"AIS_PYTHON": sys.executable, "AIS_RUN_ROOT": str(folder / "runs"), "OMP_NUM_THREADS": "1"}

    def sbatch(self, *arguments: object, status: int = 0, **environment: object) -> str:
        """What sbatch says, stdout and stderr."""
        env = self.environment | {name: str(value) for name, value in environment.items()}
        command = ["sbatch", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, script: str, *overrides: object, options: tuple[str, ...] = (), **environment: object) -> str:
        """The id of a job from slurm/`script`."""
        said = self.sbatch("--parsable", f"--output={self.folder}/%A_%a.out", *options, f"slurm/{script}", *overrides, **environment)
        self.jobs.append(said.split()[0])
        return self.jobs[-1]

    def output(self, job: str) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"{job}_*.out")))

    def run_dir(self, job: str) -> Path:
        (folder,) = (self.folder / "runs").glob(f"*-{job}")
        return folder

    def states(self, job: str) -> list[str]:
        """Of a job, or of every task of an array."""
        done = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True, timeout=240, check=False)
        return re.findall(r"JobState=(\w+)", done.stdout)

    def wait(self, job: str, *expected: str, timeout: float = 600.0) -> str:
        """Until the job, and every part of it, has ended; returns its output. The limit only catches hangs: others share the cores."""
        self.until(lambda: ENDED.issuperset(self.states(job)), job, timeout)
        assert set(self.states(job)) == set(expected or ("COMPLETED",)), f"{self.states(job)}\n{self.output(job)}\n{self.logs()}"
        return self.output(job)

    def until(self, true: Callable[[], bool], job: str, timeout: float = 300.0) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < deadline, f"{self.states(job)}\n{self.output(job)}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("runs/**/logs/*.log")))


def why_not() -> str | None:
    """Why no cluster can be started here, None if one can. `cluster.sh` needs root, and Debian's packages or apt to fetch them."""
    if os.geteuid() != 0:
        return "needs root, because slurmd does; run `make test` as root"
    missing = [program for program in ("slurmctld", "slurmd", "sbatch", "munge", "shellcheck") if shutil.which(program) is None]
    if missing and shutil.which("apt-get") is None:
        return f"{', '.join(missing)}: not installed, and there is no apt-get to install them with"
    return None


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    if reason := why_not():
        pytest.skip(f"real Slurm: {reason}")
    script = Path(__file__).with_name("cluster.sh")
    done = subprocess.run([script, "start", str(NUM_NODES)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    yield
    subprocess.run([script, "stop"], capture_output=True, timeout=360, check=True)


@pytest.fixture
def slurm(cluster: None, tmp_path: Path) -> Iterator[Slurm]:
    slurm = Slurm(tmp_path)
    yield slurm
    for job in slurm.jobs:
        subprocess.run(["scancel", job], capture_output=True, timeout=240, check=False)


def fake_model(folder: Path) -> Path:
    """A checkpoint folder with Qwen3-8B's shape and nothing in it."""
    model = folder / "Qwen3-8B"
    model.mkdir()
    (model / "config.json").write_text(
        '{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,'
        ' "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}'
    )
    (model / "model.safetensors").write_bytes(b"x")
    return model


STAND_IN = '''#!{python}
"""In the place of python -m ais_megatron: the parts of a job without their work. STAND_IN_… says how each behaves."""
import os, signal, sys, time
from pathlib import Path
command, arguments, env = sys.argv[3], sys.argv[4:], os.environ
if command in ("layout", "report"):
    os.execv("{python}", ["{python}", *sys.argv[1:]])
folder = Path(next(a for a in arguments if a.startswith("run.dir=")).partition("=")[2])
def note(what):
    with open(folder / "notes", "a") as file:
        file.write(what + "\\n")
if command == "doctor":
    sys.exit(int(env.get("STAND_IN_DOCTOR", "0")))
where = f"{{os.uname().nodename}} {{env.get('CUDA_VISIBLE_DEVICES', '-')}} {{env['SLURM_PROCID']}}/{{env['SLURM_NTASKS']}}"
resumed = "run.resume=true" in arguments
note(f"{{command}} {{where}} resumed={{resumed}} master={{env.get('MASTER_ADDR')}} {{' '.join(a for a in arguments if 'sglang' in a)}}")
if command == "serve":
    time.sleep(1)
    if env.get("STAND_IN_SERVE") == "fail":
        sys.exit(7)
    time.sleep(600)
if env.get("STAND_IN_TRAIN") == "fail" and env["SLURM_PROCID"] == "1":
    print("out of memory, say"); sys.exit(3)
if env.get("STAND_IN_TRAIN") == "finish" or resumed:
    sys.exit(0)
def stop(*_):
    time.sleep(1)
    note(f"saved {{env['SLURM_PROCID']}}")
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
note("ready")
time.sleep(600)
'''


@pytest.fixture
def stand_in(slurm: Slurm) -> Slurm:
    """`slurm` with an interpreter that only pretends to train and to serve."""
    path = slurm.folder / "python"
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    slurm.environment["AIS_PYTHON"] = str(path)
    return slurm
