"""`doctor CONFIG` on the two sides of a job: each judges itself, and the servers' side what the trainer's left for it."""

import json

import pytest
from typer.testing import CliRunner

from ais_megatron.cli import app
from ais_megatron.cluster import nccl, needs
from ais_megatron.cluster.needs import check_needs, compare
from ais_megatron.cluster.ports import free_port
from ais_megatron.config import dump_config
from tests.helpers.sglang import sglang_config

TORCH, NEWER = {"torch": "2.13.0", "nccl": "2.29.7"}, {"torch": "2.14.1", "nccl": "2.30.7"}
OFF = {"switches": {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}}


@pytest.fixture
def python(tmp_path, monkeypatch):
    """An interpreter that has SGLang 0.5.23 beside a CUDA torch, and whatever NCCL its argument says; the trainer has NEWER."""
    for name in (nccl.CUMEM, nccl.NVLS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nccl, "installed", lambda: dict(NEWER))

    def make(facts=NEWER):
        path = tmp_path / "python"
        sglang = '{"version": "0.5.23", "plugin": true}'
        path.write_text(f"#!/bin/sh\ncase \"$*\" in *nccl.py) echo '{json.dumps(facts)}';; *) echo '{sglang}';; esac\n")
        path.chmod(0o755)
        return str(path)

    return make


def config(python, **sglang):
    return sglang_config(**(dict(python=python, device="cuda", port=free_port(), transport="distributed") | sglang))


def by_name(checks):
    return {check.name: check for check in checks}


def test_one_machine_with_one_nccl(python):
    checks = by_name(check_needs(config(python())))
    assert checks["NCCL version"].ok and "trainer NCCL 2.30.7 (torch 2.14.1), servers NCCL 2.30.7" in checks["NCCL version"].note
    assert checks["NCCL switches"].ok and checks["NCCL switches"].note == "NCCL_CUMEM_ENABLE=0, NCCL_NVLS_ENABLE=0"


def test_two_versions_are_a_problem_that_names_both(python):
    found = by_name(check_needs(config(python({"torch": "2.15.0", "nccl": "2.31.0"}))))["NCCL version"]
    assert not found.ok and "NCCL 2.30.7 (torch 2.14.1)" in found.note and "NCCL 2.31.0 (torch 2.15.0)" in found.note
    assert "install torch==2.15.0 in the trainer's environment" in found.note


def test_an_unknown_version_is_no_agreement():
    nobody = {"torch": None, "nccl": None}
    assert not compare(nobody | OFF, nobody | OFF, "python")[0].ok


def test_switches_that_differ(python, monkeypatch):
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    found = by_name(check_needs(config(python(), env={"NCCL_CUMEM_ENABLE": "0"})))["NCCL switches"]
    assert not found.ok and found.note.startswith("NCCL_CUMEM_ENABLE is 1 at the trainer, 0 here; set the same value on both sides")


def test_weights_that_travel_otherwise_need_no_nccl(python):
    for settings in (dict(device="cpu"), dict(transport="tensor"), dict(transport="disk")):
        assert not [check for check in check_needs(config(python(), **settings)) if "NCCL" in check.name]


def test_the_two_sides_of_a_job(python, tmp_path, monkeypatch):
    folder, servers = tmp_path / "facts", ["http://node2:30000"]
    trainer = check_needs(config(python(), servers=servers), "trainer", folder)
    assert [(check.name, check.ok) for check in trainer] == [("files", True), ("NCCL of the trainer", True)], (
        "servers that do not run yet are not asked"
    )
    (left,) = folder.iterdir()
    assert json.loads(left.read_text()) == NEWER | OFF
    fits, differs = config(python(), host="0.0.0.0", key_file="k"), {"torch": "2.13.0", "nccl": "2.29.7"}
    assert all(check.ok for check in check_needs(fits, "servers", folder))
    found = by_name(check_needs(config(python(differs), host="0.0.0.0", key_file="k"), "servers", folder))["NCCL version"]
    assert not found.ok and f"trainer ({left.stem}) NCCL 2.30.7" in found.note


def test_nothing_to_compare_with_is_a_problem(python, tmp_path):
    found = by_name(check_needs(config(python()), "servers", tmp_path / "empty"))["NCCL"]
    assert not found.ok and "--part trainer" in found.note


def test_gpus_of_the_trainers_side_only(python, monkeypatch):
    monkeypatch.setattr(needs, "gpu_problems", lambda config, ranks: [f"no GPU for {ranks} ranks"])
    base = config(python())
    wanting = base.model_copy(update={"run": base.run.model_copy(update={"backend": "cuda"})})
    assert by_name(check_needs(wanting, "trainer", local_ranks=8))["GPUs"].note == "no GPU for 8 ranks"
    assert "GPUs" not in by_name(check_needs(wanting, "servers"))


def test_the_command_of_a_gpu_job_on_a_machine_without_one(tmp_path):
    settings = sglang_config(device="cpu").model_copy(update={"rollout": sglang_config().rollout.model_copy(update={"engine": "local"})})
    (tmp_path / "config.yaml").write_text(dump_config(settings))
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "config.yaml"), "run.backend=cuda", "--part", "trainer"])
    assert done.exit_code == 1 and "PROBLEM  GPUs: run.backend=cuda: torch" in done.stdout, done.output
