"""Which NCCL an environment has, and the switches that trainer and servers must share."""

import json
import subprocess
import sys
from importlib import metadata

import pytest

from ais_megatron.cluster import nccl
from tests.helpers.sglang import sglang_config

REMOTE = dict(device="cuda", servers=["http://node2:30000"])


def sglang(**settings):
    return sglang_config(**settings).rollout.sglang


@pytest.mark.parametrize(
    ("settings", "travels"),
    [
        (REMOTE, True),
        (dict(device="cuda"), False),  # the trainer's own servers on loopback: shared memory
        (dict(device="cuda", transport="distributed"), True),
        (dict(device="cuda", host="0.0.0.0", key_file="k"), True),
        (REMOTE | dict(device="cpu"), False),  # gloo
        (REMOTE | dict(transport="disk"), False),
    ],
)
def test_switches_are_set_only_where_weights_travel_over_nccl(settings, travels):
    environment = {}
    nccl.match_sglang_nccl_environment(sglang(**settings), environment)
    assert environment == ({"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"} if travels else {})


def test_the_trainer_follows_its_servers_but_not_against_the_user():
    servers = sglang(**REMOTE, extra_args=["--enable-symm-mem"])
    environment = {"NCCL_NVLS_ENABLE": "0"}
    nccl.match_sglang_nccl_environment(servers, environment)
    assert environment == {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}
    assert nccl.server_switches(servers, environment) == {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "1"}
    inherited = nccl.server_switches(sglang(**REMOTE, env={"NCCL_CUMEM_ENABLE": "1"}), {"NCCL_NVLS_ENABLE": "2"})
    assert inherited == {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "2"}
    only_nvls = nccl.server_switches(sglang(**REMOTE, extra_args=["--enable-nccl-nvls"]), {})
    assert only_nvls == {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "1"}


def pretend(monkeypatch, versions, requirements):
    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(nccl.metadata, "version", version)
    monkeypatch.setattr(nccl.metadata, "requires", lambda name: requirements)


def test_the_package_that_torch_requires_says_the_version(monkeypatch):
    monkeypatch.setattr(nccl, "_ask_torch", lambda: pytest.fail("torch is not imported for what a package says"))
    versions = {"torch": "2.14.1", "nvidia-nccl-cu13": "2.30.7", "nvidia-nccl-cu12": "2.27.3"}
    pretend(monkeypatch, versions, ["filelock", 'nvidia-nccl-cu13==2.30.7; platform_system == "Linux"'])
    assert nccl.installed() == {"torch": "2.14.1", "nccl": "2.30.7"}
    pretend(monkeypatch, versions | {"torch": "2.13.0+cpu"}, ["filelock"])
    assert nccl.installed() == {"torch": "2.13.0+cpu", "nccl": None}
    pretend(monkeypatch, {}, None)
    assert nccl.installed() == {"torch": None, "nccl": None}


def test_a_containers_torch_is_asked(monkeypatch, tmp_path):
    pretend(monkeypatch, {"torch": "2.14.0a0+nv26.09"}, ["filelock"])
    (tmp_path / "python").write_text("#!/bin/sh\necho 2.30.7\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(nccl.sys, "executable", str(tmp_path / "python"))
    assert nccl.installed() == {"torch": "2.14.0a0+nv26.09", "nccl": "2.30.7"}


def test_another_interpreter_describes_itself_by_running_the_file():
    done = subprocess.run([sys.executable, "-P", nccl.__file__], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["torch"] == metadata.version("torch")
