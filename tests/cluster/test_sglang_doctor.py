"""What `ais-megatron doctor CONFIG` finds out about servers before they are needed."""

import http.server
import socket
import threading

import pytest
from typer.testing import CliRunner

from ais_megatron.cli import app
from ais_megatron.cluster.ports import free_port
from ais_megatron.cluster.sglang_doctor import Check, check_sglang
from ais_megatron.config import dump_config
from tests.helpers.sglang import SGLANG_PYTHON, sglang_config


def script(tmp_path, text):
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_an_environment_with_the_plugin_and_one_without(tmp_path):
    python = script(tmp_path, """echo noise; echo '{"version": "0.5.23", "plugin": true}'""")
    port = free_port()
    assert check_sglang(sglang_config(python=python, port=port).rollout.sglang) == [
        Check(f"rollout.sglang.python={python}", True, "SGLang 0.5.23"),
        Check("plugin ais_megatron", True, "KV scales and access key"),
        Check(f"127.0.0.1:{port}", True, "free"),
    ]
    script(tmp_path, """echo '{"version": "0.5.23", "plugin": false}'""")
    plugin = check_sglang(sglang_config(python=python).rollout.sglang)[1]
    assert not plugin.ok and f"{python} -m pip install" in plugin.note


def test_a_plugin_that_does_not_know_adapters(tmp_path):
    sglang = sglang_config(python=script(tmp_path, """echo '{"version": "0.5.23", "plugin": true, "adapters": false}'""")).rollout.sglang
    (check,) = [check for check in check_sglang(sglang, with_adapters=True) if check.name == "LoRA adapters"]
    assert not check.ok and "too old for rollout.lora_sync=adapter" in check.note
    assert "LoRA adapters" not in [check.name for check in check_sglang(sglang)]


def test_environments_that_do_not_work(tmp_path):
    missing = check_sglang(sglang_config(python=str(tmp_path / "none")).rollout.sglang)[0]
    assert not missing.ok and "No such file" in missing.note and "make sglang-cpu" in missing.note
    python = script(tmp_path, "echo first >&2; echo 'ModuleNotFoundError: no sglang' >&2; exit 1")
    broken = check_sglang(sglang_config(python=python).rollout.sglang)[0]
    assert not broken.ok and broken.note.endswith("ModuleNotFoundError: no sglang")


def test_a_taken_port(tmp_path):
    python = script(tmp_path, """echo '{"version": "0.5.23", "plugin": true}'""")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        check = check_sglang(sglang_config(python=python, port=port).rollout.sglang)[-1]
    assert not check.ok and "rollout.sglang.port" in check.note


def test_named_servers_are_asked():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        there, absent = f"http://127.0.0.1:{server.server_port}", f"http://127.0.0.1:{free_port()}"
        up, down = check_sglang(sglang_config(servers=[there, absent]).rollout.sglang)
        server.shutdown()
        thread.join()
    assert up == Check(there, True, "healthy")
    assert down.name == absent and not down.ok and "ais-megatron serve" in down.note


def test_the_command_fails_with_status_1(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(sglang_config(python=str(tmp_path / "none"))))
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "config.yaml")])
    assert done.exit_code == 1 and "PROBLEM  rollout.sglang.python=" in done.stdout


@pytest.mark.sglang
def test_the_environment_of_these_tests_is_sound():
    assert all(check.ok for check in check_sglang(sglang_config(python=str(SGLANG_PYTHON), port=free_port()).rollout.sglang))
