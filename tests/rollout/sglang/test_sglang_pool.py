"""The pool restarts what dies, up to its limit, and stops everything; `ais-megatron serve` from outside."""

import json
import os
import signal
import subprocess
import sys

import pytest

from ais_megatron.config import ConfigError, dump_config, load_config
from ais_megatron.rollout.sglang.pool import ServerPool, compile_kernels, serve
from ais_megatron.rollout.sglang.server import server_command
from tests.helpers.processes import is_running, wait_for
from tests.helpers.sglang import sglang_config


def test_two_servers_and_a_restart(fake_sglang, tmp_path):
    fake = fake_sglang("healthy", num_servers=2, max_restarts=1)
    port = fake.config.rollout.sglang.port
    with ServerPool(fake.config, tmp_path / "servers") as pool:
        assert pool.urls == [f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"]
        first = fake.pids()[0]
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: sum(pool.restarts) == 1 and fake.pids()[:1] not in ([], [first]))
        for server in pool.servers:
            server.wait_until_healthy(10)
        assert not pool.given_up
    assert not any(server.alive for server in pool.servers) and not any(is_running(pid) for pid in fake.pids())


def test_given_up_after_its_restarts(fake_sglang, tmp_path):
    fake = fake_sglang("once", max_restarts=2)
    with ServerPool(fake.config, tmp_path / "servers") as pool:
        os.kill(fake.pids()[0], signal.SIGKILL)
        wait_for(lambda: pool.given_up)
        assert pool.restarts == [2]
        assert "max_restarts=2" in pool.given_up[pool.urls[0]] and "second start" in pool.given_up[pool.urls[0]]


def test_a_pool_that_cannot_start_leaves_nothing(fake_sglang, tmp_path):
    fake = fake_sglang("crash", num_servers=2)
    pool = ServerPool(fake.config, tmp_path / "servers")
    with pytest.raises(RuntimeError, match="status 3"):
        pool.start()
    assert not any(server.alive for server in pool.servers)


def test_serve_ends_with_an_error_when_a_server_is_given_up(fake_sglang, tmp_path):
    fake = fake_sglang("crash", max_restarts=0)
    with pytest.raises(RuntimeError, match="status 3"):
        serve(fake.config, tmp_path / "servers")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_command_stops_on_a_signal(fake_sglang, tmp_path, number, status):
    fake = fake_sglang("healthy")
    (tmp_path / "config.yaml").write_text(dump_config(fake.config))
    command = [sys.executable, "-m", "ais_megatron", "serve", str(tmp_path / "config.yaml"), f"run.dir={tmp_path / 'run'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    port = fake.config.rollout.sglang.port
    assert process.stdout.readline() == f"http://127.0.0.1:{port}\n"
    assert (tmp_path / "run" / "servers" / f"127.0.0.1-{port}" / "server.log").exists()
    process.send_signal(number)
    assert process.wait(120) == status
    assert not any(is_running(pid) for pid in fake.pids())


def test_kernels_are_compiled_with_the_servers_own_arguments(tmp_path):
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\necho "$@" "key=$AIS_MEGATRON_KEY_FILE" > {tmp_path}/said\nexit $FAKE\n')
    script.chmod(0o755)
    settings = dict(python=str(script), device="cuda", host="0.0.0.0", key_file=str(tmp_path / "key"), env={"FAKE": "0"})
    config = sglang_config(**settings)
    compile_kernels(config, tmp_path / "servers")
    folder = tmp_path / "servers" / "model"
    expected = ["sglang.compile_deep_gemm" if word == "sglang.launch_server" else word for word in server_command(config, folder, 30000)]
    assert (tmp_path / "said").read_text().split() == [*expected[1:], "--host", "127.0.0.1", "key="]
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["weight_block_size"] == [128, 128]
    with pytest.raises(RuntimeError, match="status 3; run the command again"):
        compile_kernels(sglang_config(**settings | {"env": {"FAKE": "3"}}), tmp_path / "servers")
    with pytest.raises(ValueError, match="device=cpu: there are no DeepGEMM kernels"):
        compile_kernels(sglang_config(), tmp_path / "servers")


def test_serve_wants_the_sglang_engine():
    from ais_megatron.cli import serve as command

    with pytest.raises(ConfigError, match="rollout.engine=local"):
        command("configs/tiny_countdown.yaml", compile_only=False)
    assert load_config("configs/tiny_countdown.yaml").rollout.engine == "local"
