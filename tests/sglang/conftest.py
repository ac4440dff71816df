"""`sglang_server` gives real servers, shared by all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ais_megatron.cluster.ports import free_port
from ais_megatron.rollout.sglang.server import SGLangServer
from tests.helpers.sglang import AFRESH, SGLANG_PYTHON, STARTUP_S, RunningServer, sglang_config


@pytest.fixture(scope="session")
def sglang_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], RunningServer]]:
    """``sglang_server(kind, "fp8" | "bf16")``, kind of `ARCHITECTURES`: started on first use, stopped at the end of the session."""
    running: dict[tuple[str, str], RunningServer] = {}

    def get(kind: str, quantization: str) -> RunningServer:
        assert SGLANG_PYTHON.exists(), f"{SGLANG_PYTHON}: missing; run `make sglang-cpu`, or deselect these tests with -m 'not sglang'"
        found = running.get((kind, quantization))
        if found is None:
            folder = tmp_path_factory.mktemp(f"sglang_{kind}_{quantization}")
            env = AFRESH if (kind, quantization) == ("dense", "fp8") else {}  # one of them; the others start in half the time
            config = sglang_config(kind, quantization, port=free_port(), key_file=str(folder / "key"), env=env)
            server = SGLangServer(config, folder, config.rollout.sglang.port)
            server.start()
            found = running[kind, quantization] = RunningServer(server.url, server.key, config, config.architecture, server)
            server.wait_until_healthy(STARTUP_S)
        return found

    yield get
    with ThreadPoolExecutor() as stoppers:  # SGLang looks for SIGTERM every 5 s
        list(stoppers.map(lambda one: one.server.stop(), running.values()))
