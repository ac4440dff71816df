"""The real SGLang, on the CPU: starts from a folder that holds only config.json, wants the key, takes KV scales, leaves nothing."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ais_megatron.cluster.ports import free_port
from ais_megatron.quantization.kv_scales import kv_scale_name
from ais_megatron.rollout.sglang.access_key import authorization
from tests.helpers.processes import is_running, wait_for
from tests.helpers.sglang import AFRESH, RunningServer, sglang_config

pytestmark = pytest.mark.sglang

GENERATE = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4}, "return_logprob": True}


def post(url: str, body: dict[str, Any], key: str | None = None) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json", **authorization(key)})
    try:
        with urllib.request.urlopen(request, timeout=240) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, {}


def checksums(server: RunningServer) -> dict[str, str]:
    """Of every parameter in the server, by its name there."""
    status, answer = post(server.url + "/weights_checker", {"action": "checksum"}, server.key)
    assert status == 200
    return answer["ranks"][0]["checksums"]


@pytest.mark.parametrize(("kind", "quantization"), [("dense", "fp8"), ("moe", "fp8"), ("dense", "bf16")])
def test_generates_from_dummy_weights(sglang_server, kind, quantization):
    server = sglang_server(kind, quantization)
    status, answer = post(server.url + "/generate", GENERATE | {"return_routed_experts": kind == "moe"}, server.key)
    assert status == 200 and len(answer["output_ids"]) == 4
    assert answer["meta_info"]["weight_version"] == "default"
    logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    assert all(-20 < logprob < 0 for logprob in logprobs)
    if kind == "moe":
        experts = torch.frombuffer(bytearray(base64.b64decode(answer["meta_info"]["routed_experts"])), dtype=torch.int32)
        assert experts.shape == (6 * 2 * 2,) and experts.min() >= 0 and experts.max() < 8  # tokens but the last, layers, topk


def test_nothing_without_the_key(sglang_server):
    server = sglang_server("dense", "fp8")
    for path, body in (("/generate", GENERATE), ("/begin_weight_update", {}), ("/server_info", {}), ("/pause_generation", {})):
        assert post(server.url + path, body)[0] == 401, path
        assert post(server.url + path, body, "x" * len(server.key))[0] == 401, path
    for path in ("/begin_weight_update", "/end_weight_update"):
        assert post(server.url + path, {}, server.key)[0] == 200, path
    with urllib.request.urlopen(server.url + "/health", timeout=240) as response:
        assert response.status == 200


def test_the_key_shows_nowhere(sglang_server):
    server = sglang_server("dense", "fp8")
    request = urllib.request.Request(server.url + "/server_info", headers=authorization(server.key))
    with urllib.request.urlopen(request, timeout=240) as response:
        assert server.key not in response.read().decode()
    assert server.key not in server.server.log_path.read_text()
    for process in Path("/proc").glob("[0-9]*"):
        for file in ("cmdline", "environ"):
            try:
                content = (process / file).read_bytes()
            except OSError:  # gone, or somebody else's
                continue
            assert server.key.encode() not in content


@pytest.mark.parametrize("kind", ["dense", "moe", "llama", "qwen2", "qwen3_5"])
def test_kv_scales_are_parameters_that_an_update_reaches(sglang_server, kind, tmp_path):
    server = sglang_server(kind, "fp8")
    before = checksums(server)
    k_scale, v_scale = kv_scale_name(1, "k"), kv_scale_name(1, "v")
    (tmp_path / "config.json").write_bytes((server.server.folder / "model" / "config.json").read_bytes())
    save_file({k_scale: torch.tensor(0.25), v_scale: torch.tensor(0.5)}, tmp_path / "model.safetensors")
    update = {"model_path": str(tmp_path), "load_format": "auto"}  # otherwise the dummy loader, with which the server started
    assert post(server.url + "/update_weights_from_disk", update, server.key)[0] == 200
    after = checksums(server)
    held = [name.replace(".self_attn", "") if kind == "qwen3_5" else name for name in (k_scale, v_scale)]
    assert {name for name in before if before[name] != after[name]} == set(held)
    assert len([name for name in after if name.endswith("k_scale")]) == len(server.architecture.attention_layers)
    assert post(server.url + "/generate", GENERATE, server.key)[0] == 200


def test_a_bf16_cache_has_no_scales(sglang_server):
    names = checksums(sglang_server("dense", "bf16"))
    assert not [name for name in names if name.endswith(("k_scale", "v_scale", "weight_scale_inv"))]


def test_kill_9_of_the_parent_while_it_starts(tmp_path):
    """The hardest moment: SGLang's children have not yet asked the kernel to follow their parent."""
    (tmp_path / "config.json").write_text(sglang_config(port=free_port(), env=AFRESH).model_dump_json())
    script = (
        "import sys, time, pathlib; from ais_megatron.config import Config; from ais_megatron.rollout.sglang.server import SGLangServer\n"
        "config = Config.model_validate_json(pathlib.Path(sys.argv[1], 'config.json').read_text())\n"
        "server = SGLangServer(config, pathlib.Path(sys.argv[1], 's'), config.rollout.sglang.port)\n"
        "server.start(); print(server._process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        guardian = int(parent.stdout.readline())
        wait_for(lambda: len(descendants(guardian)) >= 4, 120)  # server, resource tracker, scheduler, detokenizer
        family = [guardian, *descendants(guardian)]
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not any(is_running(pid) for pid in family))


def descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return children + [below for child in children for below in descendants(child)]
