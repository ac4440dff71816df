"""`fake_sglang` gives stand-ins for SGLang servers that start at once, and `servers` gives such servers in threads of this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ais_megatron.cluster.ports import free_port
from ais_megatron.config import Config
from tests.helpers.sglang import sglang_config
from tests.rollout.sglang.fake_server import RUN, FakeServer

FAKE = '''#!{python}
"""Stands in for SGLang's interpreter: takes the same command line, starts at once, has a child process, does what FAKE says."""
import http.server, os, pathlib, subprocess, sys, time
arguments = dict(zip(sys.argv[1:], sys.argv[2:]))
mode, folder = os.environ["FAKE"], pathlib.Path(__file__).parent
print("started with", *sys.argv[1:], flush=True)
if mode == "crash":
    for number in range(100):
        print("line", number, flush=True)
    sys.exit(3)
if mode == "once" and (folder / "second").exists():
    sys.exit("second start")
(folder / "second").touch()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(folder / "pids").write_text(f"{{os.getpid()}} {{child.pid}}")
if mode == "silent":
    time.sleep(600)
key_file = os.environ.get("AIS_MEGATRON_KEY_FILE")
key = pathlib.Path(key_file).read_text().strip() if key_file and mode != "open" else None
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        allowed = key is None or self.path == "/health" or self.headers.get("Authorization") == "Bearer " + key
        self.send_response(200 if allowed else 401)
        self.end_headers()
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer((arguments["--host"], int(arguments["--port"])), Handler).serve_forever()
'''


@dataclass(frozen=True)
class FakeSGLang:
    """config: its `rollout.sglang.python` is a script that behaves as `mode` says: healthy, silent, crash, open (ignores the key),
    or once (its second start fails)."""

    config: Config
    folder: Path

    def pids(self) -> list[int]:
        """Of the server's first process and its child, as last started."""
        return [int(pid) for pid in (self.folder / "pids").read_text().split()]


@pytest.fixture
def fake_sglang(tmp_path: Path) -> Callable[..., FakeSGLang]:
    def make(mode: str, **sglang: Any) -> FakeSGLang:
        script = tmp_path / "fake_python"
        script.write_text(FAKE.format(python=sys.executable))
        script.chmod(0o755)
        port = free_port(sglang.get("num_servers", 1))
        settings = dict(python=str(script), env={"FAKE": mode}, port=port, startup_timeout_s=20.0) | sglang
        return FakeSGLang(sglang_config(**settings), tmp_path)

    return make


@pytest.fixture
def servers() -> Iterator[Callable[[int], list[FakeServer]]]:
    made: list[FakeServer] = []

    def make(count: int) -> list[FakeServer]:
        made.extend(FakeServer(f"{RUN}-0") for _ in range(count))
        return made

    yield make
    for server in made:
        server.is_hung = False
        server.stop()
