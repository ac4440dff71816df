"""One SGLang server on this host: its model folder, its command line and its process.

A server needs no checkpoint. It starts from a folder that holds only config.json, with dummy weights (--load-format dummy) and the
weight version "default". It cannot be used until a weight sync. So a restarted server is the same as a new one, and no checkpoint is
read that the first sync would replace.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from ais_megatron.cluster.cuda_environment import ALLOCATOR_VARIABLES, MAX_CONNECTIONS
from ais_megatron.cluster.ports import try_bind
from ais_megatron.config import Architecture, Config, RolloutConfig
from ais_megatron.config.hf_config import fp8_config, hf_config, rope_parameters
from ais_megatron.config.policy import adapter_targets
from ais_megatron.config.sglang import LOOPBACK, SGLangConfig
from ais_megatron.rollout.sglang import guardian
from ais_megatron.rollout.sglang.access_key import authorization, read_or_create_key
from ais_megatron.rollout.sglang.patience import Patience
from ais_megatron.rollout.sglang.plugin import KEY_FILE_VARIABLE

CPU_RUNNING = 64
STATES_PER_REQUEST = 3  # recurrent states: SGLang runs at most a third as many requests as it has room for, because prefixes are cached too
POLL_S, HTTP_TIMEOUT_S, STOP_S = 0.5, 30.0, 10.0
LOG_TAIL = 30

# Variables of the process that starts a server, which the server must not get: torchrun's rendezvous and another environment's paths.
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "PYTHONHOME")
FOREIGN_VARIABLES = (*_LAUNCHERS, MAX_CONNECTIONS, *ALLOCATOR_VARIABLES)  # the last are the trainer's; SGLang sets its own
FOREIGN_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # servers are in the cluster, so no proxy is used


def write_model_folder(architecture: Architecture, rollout: RolloutConfig, folder: Path) -> Path:
    """Create `folder` with a config.json from which SGLang can build the model, and return it.

    With FP8 weights SGLang builds every linear layer and every expert as E4M3 with one scale per block. Router, norms,
    embedding and lm_head stay BF16. Activation scales are computed at run time ("dynamic").
    """
    content = {**hf_config(architecture, "bf16"), "torch_dtype": "bfloat16"}
    if architecture.family.partial_rotary_factor != 1.0:
        # With sections for time, height and width SGLang would build an embedding for images too. `checks.randomize` destroys its indices.
        rope = {key: value for key, value in rope_parameters(architecture).items() if not key.startswith("mrope")}
        content |= {"rope_parameters": rope, "partial_rotary_factor": architecture.partial_rotary_factor}
    if rollout.quantization == "fp8_e4m3":
        content["quantization_config"] = fp8_config(rollout.weight_block, architecture)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder


def server_command(config: Config, model_folder: Path, port: int, index: int = 0) -> list[str]:
    """The command line of a server. `extra_args` come last, so they override earlier arguments.

    No tokenizer is loaded, because requests contain token ids and name the ids that end a response.

    Args:
        index: number of the server on its host. On GPUs, server i uses GPUs i * tp to (i + 1) * tp - 1 of those in
            CUDA_VISIBLE_DEVICES (not yet run on a GPU).
    """
    rollout, sglang, context = config.rollout, config.rollout.sglang, config.architecture.max_position_embeddings
    command = [sglang.python, "-m", "sglang.launch_server", "--model-path", str(model_folder), "--load-format", "dummy"]
    command += [
        "--skip-tokenizer-init",
        "--skip-server-warmup",
    ]  # /health runs a prefill; the warm-up would send its request without the key
    command += ["--host", sglang.host, "--port", str(port), "--tp-size", str(sglang.tp), "--ep-size", str(sglang.ep)]
    command += ["--context-length", str(context), "--random-seed", str(config.run.seed)]
    command += ["--kv-cache-dtype", "fp8_e4m3" if rollout.kv_cache_is_fp8 else "auto"]
    for flag, value in (
        ("--mem-fraction-static", sglang.mem_fraction),
        ("--attention-backend", sglang.attention_backend or ("torch_native" if sglang.device == "cpu" else None)),
        ("--max-running-requests", sglang.max_running or (CPU_RUNNING if sglang.device == "cpu" else None)),
    ):
        command += [flag, str(value)] if value is not None else []
    if sglang.pause == "in_place":
        command += ["--disable-radix-cache"]  # the cache cannot be flushed while requests run, so prefixes would keep the KV of old weights
    if rollout.return_routed_experts:
        command += ["--enable-return-routed-experts"]
    if rollout.lora_sync == "adapter":
        command += _adapter_flags(config)
    if rollout.colocated and sglang.device == "cuda":
        command += ["--enable-memory-saver"]  # (on a CPU the endpoints work without it, and free nothing)
    if sglang.device == "cpu":
        running = sglang.max_running or CPU_RUNNING
        command += ["--device", "cpu", "--disable-overlap-schedule", "--sleep-on-idle"]
        command += ["--max-total-tokens", str(running * context)]  # by default SGLang would take most of the host's memory
        if config.architecture.family.is_recurrent:
            command += ["--max-mamba-cache-size", str(STATES_PER_REQUEST * running)]
    else:
        command += ["--base-gpu-id", str(index * sglang.tp)]
    return command + sglang.extra_args


def _adapter_flags(config: Config) -> list[str]:
    """A server's memory for adapters has three places: for the version in use, for the next one, and for requests without an adapter."""
    lora = config.policy.lora
    flags = ["--enable-lora", "--max-lora-rank", str(lora.rank), "--max-loras-per-batch", "3", "--lora-strict-loading"]
    flags += ["--lora-target-modules", *adapter_targets(lora, config.architecture)]
    return flags + (["--lora-backend", "torch_native"] if config.rollout.sglang.device == "cpu" else [])


def compile_command(config: Config, model_folder: Path) -> list[str]:
    """The command that compiles the DeepGEMM kernels of a server into SGLang's cache, and then ends (not yet run on a GPU).

    The command is itself a server, and its arguments decide which kernels are compiled. They must be those of `server_command`. It
    binds to loopback, because it runs without a key.

    Source: SGLang 0.5.23, compile_deep_gemm.py.
    """
    command = server_command(config, model_folder, config.rollout.sglang.port)
    command[command.index("sglang.launch_server")] = "sglang.compile_deep_gemm"
    return [*command, "--host", LOOPBACK[0]]


def server_environment(sglang: SGLangConfig, inherited: dict[str, str]) -> dict[str, str]:
    """Environment variables of a server: the inherited ones without `FOREIGN_VARIABLES`, then ours, then `rollout.sglang.env`."""
    kept = {k: v for k, v in inherited.items() if k not in FOREIGN_VARIABLES and not k.startswith(FOREIGN_PREFIXES)}
    kept.pop(KEY_FILE_VARIABLE, None)
    ours = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if sglang.key_file:
        ours[KEY_FILE_VARIABLE] = str(Path(sglang.key_file).resolve())
    if sglang.device == "cpu":
        ours |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    if sglang.device == "cpu" and sglang.tp > 1:
        cores = cores_of_ranks(sorted(os.sched_getaffinity(0)), sglang.tp)
        ours["SGLANG_CPU_OMP_THREADS_BIND"] = kept.get("SGLANG_CPU_OMP_THREADS_BIND", cores)
    return kept | ours | sglang.env


def cores_of_ranks(cores: list[int], tp: int) -> str:
    """The cores of each rank of a server on a CPU, as SGLang reads them. By itself it wants a NUMA node for each rank.

    With fewer cores than ranks, ranks share them."""
    size = len(cores) // tp
    shares = [cores[rank * size : (rank + 1) * size] if size else [cores[rank % len(cores)]] for rank in range(tp)]
    return "|".join(",".join(map(str, share)) for share in shares)


def server_url(host: str, port: int) -> str:
    """The address for clients. A server that binds every interface is reached by its host's name."""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_port(host: str, port: int) -> None:
    """Raise `ValueError` if a server cannot bind to (host, port)."""
    try:
        try_bind(host, port)
    except OSError as error:
        raise ValueError(
            f"rollout.sglang.port: {host}:{port} cannot be bound ({error}); stop the process that uses it, or choose another port"
        ) from error


def http_status(url: str, key: str | None = None, timeout: float = HTTP_TIMEOUT_S) -> int | None:
    """HTTP status of GET `url`, or None if nothing answers."""
    try:
        with _DIRECT.open(urllib.request.Request(url, headers=authorization(key)), timeout=timeout) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:  # refused, reset or timed out; urllib's own errors are subclasses
        return None


class SGLangServer:
    """A server as a child process. It ends when this process ends, even by kill -9 (see `guardian`).

    config: its `rollout.sglang` and its model are used.
    folder: this server's folder. It gets ``model/config.json`` and ``server.log``, to which restarts append.
    port, index: see `server_command`.

    Raises:
        ValueError: the key file cannot be used.
    """

    def __init__(self, config: Config, folder: Path, port: int, index: int = 0) -> None:
        self.config, self.folder, self.port = config, folder, port
        self.url = server_url(config.rollout.sglang.host, port)
        self.log_path = folder / "server.log"
        self.key = read_or_create_key(config.rollout.sglang.key_file) if config.rollout.sglang.key_file else None
        self.command = server_command(config, folder / "model", port, index)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    def start(self) -> None:
        """Start the process and return immediately.

        Raises:
            ValueError: the port is taken.
            RuntimeError: the server is already running.
        """
        if self.alive:
            raise RuntimeError(f"{self.url}: is already running; stop it before starting it again")
        sglang = self.config.rollout.sglang
        check_port(sglang.host, self.port)
        write_model_folder(self.config.architecture, self.config.rollout, self.folder / "model")
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", guardian.__file__, str(os.getpid()), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(sglang, dict(os.environ)),
                start_new_session=True,
            )

    def wait_until_healthy(self, timeout: float) -> None:
        """Wait until /health answers, which includes a prefill of one token.

        Args:
            timeout: in seconds.
        Raises:
            RuntimeError: the process ended, `timeout` passed (the server is then stopped), or the server answers requests
                without the key. The message has the command and the end of the log.
        """
        sglang = self.config.rollout.sglang
        patience = Patience(timeout, "rollout.sglang.startup_timeout_s", on_gpus=sglang.device == "cuda")
        while http_status(self.url + "/health", self.key) != 200:
            if not self.alive:
                raise RuntimeError(self._obituary(f"ended with status {self.exit_status} before it was healthy"))
            if patience.is_over:
                self.stop()
                raise RuntimeError(self._obituary(f"was not healthy after {timeout:g} s (rollout.sglang.startup_timeout_s)"))
            patience.tell(f"SGLang server {self.url}", f"{self.log_path} ends with: {self.log_tail(1) or '(nothing yet)'}")
            time.sleep(POLL_S)
        if self.key is not None and http_status(self.url + "/model_info") != 401:
            self.stop()
            raise RuntimeError(
                self._obituary(
                    "answered a request without the key, so it was stopped: our plugin is not active in it. Install ais_megatron beside "
                    f"SGLang ({sglang.python} -m pip install --no-deps ais_megatron), and name the plugin in SGLANG_PLUGINS if that is set"
                )
            )
        # At its start SGLang sends itself this request, without the key and before it listens. Its log then has a message that it failed.
        http_status(self.url + "/freeze_gc", self.key)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """The status of the last process; 128 + n if signal n ended it; None while it runs or before the first start."""
        return None if self._process is None else self._process.poll()

    def log_tail(self, lines: int = LOG_TAIL) -> str:
        """The last lines of the log since the server's last start."""
        if not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return "\n".join(log.read().decode("utf-8", "replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End the server and all its processes, and return when they are gone. Idempotent."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(guardian.GRACE_S + STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the kernel then kills the server
            self._process.wait()

    def __enter__(self) -> SGLangServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _obituary(self, what: str) -> str:
        command = " ".join(self.command)
        return f"SGLang server {self.url} {what}\ncommand: {command}\nlog: {self.log_path}, which ends with\n{self.log_tail()}"
