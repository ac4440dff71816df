"""A real SGLang server on this CPU for benchmarks, started with dummy weights and stopped again."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import torch

from ais_megatron.cluster.ports import free_port
from ais_megatron.config import Config, build_config
from ais_megatron.rollout.sglang.client import SGLangEngine
from ais_megatron.rollout.sglang.server import SGLangServer
from ais_megatron.rollout.sglang.transports import make_transport

STARTUP_S = 300.0


class RealServer:
    """Running and healthy once constructed. `connect` gives clients; `stop` ends them and it."""

    def __init__(self, folder: Path, python: str, architecture: dict[str, Any], quantization: str, **rollout: Any) -> None:
        self._folder, self._rollout, self._architecture = folder, {"quantization": quantization, **rollout}, architecture
        port = free_port()
        self._settings = dict(python=python, device="cpu", startup_timeout_s=STARTUP_S, port=port)
        self._server = SGLangServer(self._config(), folder, port)
        self._clients: list[SGLangEngine] = []
        self._run_id = secrets.token_hex(4)  # one for all clients: each knows the others' weights as its own run's
        self._server.start()
        try:
            self._server.wait_until_healthy(STARTUP_S)
        except BaseException:
            self._server.stop()
            raise

    def _config(self, **sglang: Any) -> Config:
        section = {"engine": "sglang", **self._rollout, "sglang": self._settings | sglang}
        return build_config({"model": {"architecture": self._architecture}, "rollout": section})

    def connect(self, transport: str, eos_id: int) -> SGLangEngine:
        """A client that pushes by `transport`."""
        config, urls = self._config(transport=transport, sync_dir=str(self._folder / "sync")), [self._server.url]
        way = make_transport(config, torch.device("cpu"), self._run_id)
        client = SGLangEngine(
            config.architecture, config.rollout, urls, eos_ids=(eos_id,), dtype=torch.bfloat16, run_id=self._run_id, transport=way
        )
        self._clients.append(client)
        return client

    def stop(self) -> None:
        for client in self._clients:
            client.close()
        self._server.stop()
