"""Starts the servers of one host, restarts servers that die, and stops all of them together.

A restarted server has dummy weights and the weight version "default". Clients refuse it until a weight sync has reached it, so
nothing is generated with wrong weights.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from ais_megatron.config import Config
from ais_megatron.rollout.sglang.plugin import KEY_FILE_VARIABLE
from ais_megatron.rollout.sglang.server import (
    POLL_S,
    SGLangServer,
    check_port,
    compile_command,
    server_environment,
    write_model_folder,
)


class ServerPool:
    """`rollout.sglang.num_servers` servers on ports `port`, `port` + 1, and so on. A context manager that starts and stops them.

    folder: gets one folder ``HOST-PORT`` with a log for each server.

    After `start`, one thread per server restarts it when it dies, up to `max_restarts` times. A restart that does not become healthy
    counts as a death. After that the server is given up, see `given_up`.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        sglang = config.rollout.sglang
        ports = range(sglang.port, sglang.port + sglang.num_servers)
        # Servers of several hosts may share a run folder. Servers that bind every interface would have the same name there.
        host = socket.gethostname() if sglang.host in ("0.0.0.0", "::") else sglang.host
        self.servers = [SGLangServer(config, folder / f"{host}-{port}", port, index) for index, port in enumerate(ports)]
        self.restarts = [0] * sglang.num_servers
        self.given_up: dict[str, str] = {}  # url -> why
        self._sglang = sglang
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # no server is started after stopping has begun
        self._threads: list[threading.Thread] = []

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    @property
    def key(self) -> str | None:
        return self.servers[0].key

    def start(self) -> None:
        """Start all servers and return when all are healthy.

        Raises:
            ValueError: a port is taken; then nothing has been started.
            RuntimeError: a server failed to start; the others have been stopped.
        """
        for server in self.servers:
            check_port(self._sglang.host, server.port)
        try:
            for server in self.servers:
                server.start()
            deadline = time.monotonic() + self._sglang.startup_timeout_s
            for server in self.servers:
                server.wait_until_healthy(max(deadline - time.monotonic(), 0.0))
        except BaseException:
            self.stop()
            raise
        for number, server in enumerate(self.servers):
            thread = threading.Thread(target=self._watch, args=(number,), name=f"watch {server.url}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Stop all servers and return when they are gone. Idempotent."""
        self._stopping.set()
        with self._lock:
            stoppers = [threading.Thread(target=server.stop) for server in self.servers]
            for stopper in stoppers:
                stopper.start()
            for stopper in stoppers:
                stopper.join()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> ServerPool:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _watch(self, number: int) -> None:
        """Watch and restart one server after its first start, until `stop` or until it is given up."""
        server, most = self.servers[number], self._sglang.max_restarts
        died = "ended"
        while True:
            while server.alive:
                if self._stopping.wait(POLL_S):
                    return
                died = "ended"
            if self._stopping.is_set():
                return
            what = f"SGLang server {server.url} {died} with status {server.exit_status}; log: {server.log_path}"
            if self.restarts[number] == most:
                self.given_up[server.url] = (
                    f"{what}\nit was restarted rollout.sglang.max_restarts={most} times before; its log ends with\n{server.log_tail()}"
                )
                print(f"{what}; given up after {most} restarts", file=sys.stderr, flush=True)
                return
            self.restarts[number] += 1
            print(f"{what}; restart {self.restarts[number]} of {most}", file=sys.stderr, flush=True)
            try:
                with self._lock:
                    if self._stopping.is_set():
                        return
                    server.start()
                server.wait_until_healthy(self._sglang.startup_timeout_s)
            except (RuntimeError, ValueError) as error:  # ValueError: another process took the port
                died = f"did not start again ({str(error).splitlines()[0]}) and ended"


def serve(config: Config, folder: Path) -> None:
    """Run the servers of this host until SIGTERM or SIGINT, or until one is given up. Prints their addresses when they are healthy.

    Args:
        folder: for logs, see `ServerPool`.
    Raises:
        ValueError, RuntimeError: see `ServerPool.start`. RuntimeError also if a server has been given up.
        KeyboardInterrupt: after SIGINT, when all servers are stopped.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, end)
    pool = ServerPool(config, folder)
    try:
        with pool:
            print(*pool.urls, sep="\n", flush=True)
            while not pool.given_up:
                time.sleep(POLL_S)
            raise RuntimeError("\n".join(pool.given_up.values()))
    except _Terminated:
        print("stopped", file=sys.stderr, flush=True)
    finally:
        signal.signal(signal.SIGTERM, previous)


def compile_kernels(config: Config, folder: Path) -> None:
    """Compile a server's DeepGEMM kernels into the cache that all servers of this user share, see `compile_command`.

    folder: for the model's config.json.

    Raises:
        ValueError: the servers run on a CPU, which has no such kernels.
        RuntimeError: SGLang failed. Its output is part of this process's output.
    """
    sglang = config.rollout.sglang
    if sglang.device != "cuda":
        raise ValueError(f"rollout.sglang.device={sglang.device}: there are no DeepGEMM kernels to compile; set it to cuda")
    command = compile_command(config, write_model_folder(config.architecture, config.rollout, folder / "model"))
    environment = server_environment(sglang, dict(os.environ))
    environment.pop(KEY_FILE_VARIABLE, None)  # the compiler sends requests to its own server without a key
    print(" ".join(command), file=sys.stderr, flush=True)
    try:
        status = subprocess.run(command, env=environment, check=False).returncode
    except OSError as error:
        raise RuntimeError(f"rollout.sglang.python={sglang.python}: cannot be started ({error})") from error
    if status:
        raise RuntimeError(
            f"compiling DeepGEMM kernels ended with status {status}; run the command again, and it continues where it stopped"
        )


class _Terminated(BaseException):
    """SIGTERM as an exception that no `except Exception` catches."""
