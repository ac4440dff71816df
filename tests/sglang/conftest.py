"""Servers for tests: `sglang_server` gives real ones, shared by all tests; `fake_sglang` gives stand-ins that start at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ais_megatron.cluster.ports import free_port
from ais_megatron.config import Architecture, Config, build_config
from ais_megatron.rollout.sglang.server import SGLangServer

REPOSITORY = Path(__file__).parents[2]
SGLANG_PYTHON = REPOSITORY / ".venv-sglang" / "bin" / "python"
STARTUP_S = 300.0

# The smallest sizes whose merged weights (Q, K, V; gate, up) hold whole 128-blocks.
DENSE = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=512,
)
MOE = DENSE | dict(model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128)
LLAMA = DENSE | dict(model_type="llama", rope_scaling=dict(original_max_position_embeddings=64), tie_word_embeddings=True)
ARCHITECTURES = {"dense": DENSE, "moe": MOE, "llama": LLAMA, "qwen2": DENSE | dict(model_type="qwen2")}


def sglang_config(kind: str = "dense", quantization: str = "fp8", rollout: dict[str, Any] | None = None, **sglang: Any) -> Config:
    """A config for one server on the CPU. kind: of `ARCHITECTURES`; quantization: "fp8" or "bf16", of weights and KV cache."""
    settings = dict(python=str(SGLANG_PYTHON), device="cpu", startup_timeout_s=STARTUP_S) | sglang
    section = dict(engine="sglang", quantization=quantization, return_routed_experts=kind == "moe", sglang=settings) | (rollout or {})
    return build_config(dict(model=dict(architecture=ARCHITECTURES[kind]), rollout=section))


@dataclass(frozen=True)
class RunningServer:
    """A real server with dummy weights, or with what an earlier test pushed. It wants `key` with every request."""

    url: str
    key: str
    config: Config
    architecture: Architecture
    server: SGLangServer


@pytest.fixture(scope="session")
def sglang_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], RunningServer]]:
    """``sglang_server(kind, "fp8" | "bf16")``, kind of `ARCHITECTURES`: started on first use, stopped at the end of the session."""
    running: dict[tuple[str, str], RunningServer] = {}

    def get(kind: str, quantization: str) -> RunningServer:
        assert SGLANG_PYTHON.exists(), f"{SGLANG_PYTHON}: missing; run `make sglang-cpu`, or deselect these tests with -m 'not sglang'"
        found = running.get((kind, quantization))
        if found is None:
            folder = tmp_path_factory.mktemp(f"sglang_{kind}_{quantization}")
            config = sglang_config(kind, quantization, port=free_port(), key_file=str(folder / "key"))
            server = SGLangServer(config, folder, config.rollout.sglang.port)
            server.start()
            found = running[kind, quantization] = RunningServer(server.url, server.key, config, config.architecture, server)
            server.wait_until_healthy(STARTUP_S)
        return found

    yield get
    with ThreadPoolExecutor() as stoppers:  # SGLang looks for SIGTERM every 5 s
        list(stoppers.map(lambda one: one.server.stop(), running.values()))


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
