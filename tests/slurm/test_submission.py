"""What sbatch is given and what a dry run prints; bad input ends a job in its first seconds, before anything is started."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.slurm.conftest import Slurm, fake_model, why_not

SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch"))


def test_where_no_cluster_can_be_started_the_reason_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert why_not() == "needs root, because slurmd does; run `make test` as root"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_not() == "slurmctld, slurmd, sbatch, munge, shellcheck: not installed, and there is no apt-get to install them with"


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_accepts_every_file(slurm: Slurm, script: str) -> None:
    assert re.search(r"Job \d+ to start at", slurm.sbatch("--test-only", "-A", "acct", f"slurm/{script}"))


def test_a_dry_run_prints_the_command_of_every_part(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit("qwen3_8b_ais.sbatch", "train.steps=20", AIS_DRY_RUN=1, AIS_MODEL=fake_model(tmp_path))
    output = slurm.wait(job)
    servers = re.findall(r"^srun .*--nodelist=node2 .* CUDA_VISIBLE_DEVICES=(\d) .* serve .*rollout.sglang.port=(\d+) ", output, re.M)
    assert servers == [(str(i), str(30000 + i)) for i in range(8)]
    (trainer,) = re.findall(r"^srun .* train .*$", output, re.M)
    assert "--nodes=1 --ntasks=8 --nodelist=node1" in trainer and "--ntasks-per-node=8 env MASTER_ADDR=node1" in trainer
    assert trainer.count("http://node2:3000") == 8 and "train.steps=20" in trainer and f"model.path={tmp_path}/Qwen3-8B" in trainer
    trainers, rollouts = re.findall(r"^srun .*--nodelist=(node\d) .* doctor configs/qwen3_8b_ais.yaml (.*)$", output, re.M)
    assert trainers[0] == "node1" and "--local-ranks 8 --part trainer --facts runs/" in trainers[1].replace(f"{slurm.folder}/", "")
    assert rollouts[0] == "node2" and "rollout.sglang.host=0.0.0.0" in rollouts[1] and "--part servers --facts " in rollouts[1]
    assert "would be refused" not in output
    assert not (slurm.folder / "runs").exists(), "a dry run leaves nothing"


def test_a_dry_run_with_experts_and_a_container(slurm: Slurm) -> None:
    output = slurm.wait(slurm.submit("qwen3_30b_a3b_ais.sbatch", AIS_DRY_RUN=1))
    assert "CUDA_VISIBLE_DEVICES=6\\,7" in output and "--nodes=2 --ntasks=16 --nodelist=node1\\,node2" in output
    assert output.count(" serve ") == 8 and "this job would be refused: AIS_MODEL=models/Qwen3-30B-A3B: no such folder" in output
    output = slurm.wait(slurm.submit("tiny.sbatch", AIS_DRY_RUN=1, AIS_CONTAINER="/images/ais.sqsh"))
    mounts = f"--container-mounts={ROOT}:{ROOT}\\,{slurm.folder}/runs:{slurm.folder}/runs --container-workdir={ROOT}"
    assert output.count(f"--container-image=/images/ais.sqsh {mounts}") == 2, "doctor and trainer"


def test_a_dry_run_needs_no_slurm(slurm: Slurm) -> None:
    command = ["bash", "slurm/qwen3_8b_ais.sbatch"]
    done = subprocess.run(command, cwd=ROOT, env=slurm.environment | {"AIS_DRY_RUN": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count(" serve ") == 8 and "models/Qwen3-8B: no such folder" in done.stderr
    done = subprocess.run(command, cwd=ROOT, env=slurm.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "not inside a Slurm job: submit with sbatch, or set AIS_DRY_RUN=1" in done.stderr


@pytest.mark.parametrize(
    ("script", "options", "overrides", "environment", "message"),
    [
        ("qwen3_8b_ais.sbatch", [], [], {}, "AIS_MODEL=models/Qwen3-8B: no such folder; give the folder of a Hugging Face checkpoint"),
        ("qwen3_8b_ais.sbatch", [], [], {"AIS_MODEL": "BROKEN"}, "model-00002-of-00002.safetensors is missing, empty or cannot be read"),
        ("qwen3_8b_ais.sbatch", ["--nodes=1"], [], {"AIS_MODEL": "MODEL"}, "no rollout nodes: rollout.engine=sglang needs at least one"),
        ("tiny.sbatch", ["--nodes=3"], [], {"AIS_TRAINER_NODES": "1"}, r"AIS_TRAINER_NODES=1 \+ AIS_ROLLOUT_NODES=0: the job has 3 nodes"),
        ("tiny.sbatch", [], [], {"AIS_TRAINER_NODES": "4", "AIS_ROLLOUT_NODES": ""}, "AIS_TRAINER_NODES=4.*the job has 2 nodes"),
        ("tiny.sbatch", [], [], {"AIS_TRAINER_NODES": "two"}, "AIS_TRAINER_NODES=two: must be a number"),
        ("tiny.sbatch", ["--nodes=3"], [], {}, "2 ranks cannot be spread evenly over 3 trainer nodes"),
        ("tiny.sbatch", [], ["train.step=3"], {}, r"train.step: unknown key; did you mean train.steps\?"),
        ("qwen3_8b_ais.sbatch", [], ["rollout.sglang.tp=3"], {"AIS_MODEL": "MODEL"}, "rollout.sglang.tp=3: does not divide"),
        ("tiny.sbatch", [], [], {"AIS_CONFIG": "configs/none.yaml"}, "AIS_CONFIG=configs/none.yaml: no such file"),
        ("tiny.sbatch", [], [], {"STAND_IN_DOCTOR": "1"}, "something that it needs is missing .*; nothing was started"),
        ("tiny.sbatch", [], [], {"AIS_PORT": "BUSY"}, r"port \d+ of node1 is in use: end what listens there, or choose another \(AIS_PORT"),
    ],
)
def test_refusals(
    stand_in: Slurm, tmp_path: Path, script: str, options: list[str], overrides: list[str], environment: dict[str, str], message: str
) -> None:
    model = fake_model(tmp_path)
    (broken := tmp_path / "broken").mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    (broken / "model-00001-of-00002.safetensors").write_bytes(b"x")
    (broken / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    with socket.create_server(("127.0.0.1", 0)) as busy:
        replaced = {"MODEL": str(model), "BROKEN": str(broken), "BUSY": str(busy.getsockname()[1])}
        environment = {key: replaced.get(value, value) for key, value in environment.items()}
        output = stand_in.wait(stand_in.submit(script, *overrides, options=tuple(options), **environment), "FAILED")
    assert re.search(message, output), output
    assert not list(stand_in.folder.glob("runs/*/notes")), "nothing was started"


def test_shell_is_clean(request: pytest.FixtureRequest) -> None:
    if shutil.which("shellcheck") is None:
        request.getfixturevalue("cluster")  # installs it, or skips and says why
    files = [*(ROOT / "slurm").iterdir(), ROOT / "tests" / "slurm" / "cluster.sh"]
    shell = [str(path) for path in files if path.suffix in (".sh", ".sbatch")]
    done = subprocess.run(["shellcheck", "-x", *shell], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
