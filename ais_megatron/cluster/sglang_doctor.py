"""Checks SGLang in its own environment, by asking that environment's interpreter."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
from dataclasses import dataclass
from urllib.parse import urlsplit

from ais_megatron.cluster.ports import try_bind
from ais_megatron.config.sglang import SGLangConfig

PLUGIN_GROUP, PLUGIN = "sglang.srt.plugins", "ais_megatron"
PROBE_TIMEOUT_S, CONNECT_TIMEOUT_S = 120.0, 10.0  # the first import from a network disk is slow

_PROBE = f"""
import importlib, importlib.metadata as metadata, json
importlib.import_module("sglang")
plugins = [entry for entry in metadata.entry_points(group="{PLUGIN_GROUP}") if entry.name == "{PLUGIN}"]
adapters = any("LIST_ADAPTERS" in entry.load().__globals__ for entry in plugins)
print(json.dumps(dict(version=metadata.version("sglang"), plugin=bool(plugins), adapters=adapters)))
"""


@dataclass(frozen=True)
class Check:
    """One thing that a run needs."""

    name: str
    ok: bool
    note: str
    """What was found, or what to do."""


def check_sglang(sglang: SGLangConfig, with_adapters: bool = False) -> list[Check]:
    """All checks that are possible before a server is started. Never raises.

    with_adapters: whether servers get LoRA's factors by themselves (`rollout.lora_sync=adapter`).

    Servers that the configuration names are only asked whether they are healthy. The client checks later whether they fit.
    """
    if sglang.servers:
        return [_reachable(url) for url in [*sglang.servers, *([sglang.router] if sglang.router else [])]]
    return [*_environment(sglang.python, with_adapters), *(_free(sglang.host, sglang.port + index) for index in range(sglang.num_servers))]


def _environment(python: str, with_adapters: bool) -> list[Check]:
    name = f"rollout.sglang.python={python}"
    # Only installed packages count, so -P and an empty PYTHONPATH keep the working directory out.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, "-P", "-c", _PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False, env=environment)
    except OSError as error:
        return [
            Check(
                name,
                False,
                f"cannot be run ({error.strerror}); name an interpreter that has SGLang (`make sglang-cpu` installs one for CPUs)",
            )
        ]
    except subprocess.TimeoutExpired:
        return [
            Check(
                name,
                False,
                f"importing sglang took more than {PROBE_TIMEOUT_S:g} s; try it again, or move the environment to a faster disk",
            )
        ]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [Check(name, False, f"cannot import sglang or our plugin: {last}")]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    install = (
        f"not installed beside SGLang, so there is no access key and KV scales stay 1.0; run {python} -m pip install --no-deps ais_megatron"
    )
    checks = [
        Check(name, True, f"SGLang {found['version']}"),
        Check(f"plugin {PLUGIN}", found["plugin"], "KV scales and access key" if found["plugin"] else install),
    ]
    if with_adapters and found["plugin"]:
        update = f"the plugin is too old for rollout.lora_sync=adapter; run {python} -m pip install --no-deps --upgrade ais_megatron"
        checks.append(Check("LoRA adapters", found["adapters"], "the plugin reports them" if found["adapters"] else update))
    return checks


def _free(host: str, port: int) -> Check:
    try:
        try_bind(host, port)
    except OSError as error:
        note = f"cannot be bound ({error.strerror}); stop the process that uses it, or change rollout.sglang.port"
        return Check(f"{host}:{port}", False, note)
    return Check(f"{host}:{port}", True, "free")


def _reachable(url: str) -> Check:
    """Ask the server for GET /health."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return Check(url, False, f"does not answer ({error}); start it with `ais-megatron serve`, or correct rollout.sglang.servers")
    finally:
        connection.close()
    return Check(
        url,
        status == 200,
        "healthy" if status == 200 else f"/health answers with HTTP {status}: the server is still starting, or not healthy",
    )
