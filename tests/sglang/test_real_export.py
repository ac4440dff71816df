"""The real SGLang and what is served for a long time: it loads an export, and says while it generates that it does."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from ais_megatron.cluster.ports import free_port
from ais_megatron.export.run import export_run
from ais_megatron.rollout.sglang.access_key import authorization
from ais_megatron.rollout.sglang.api import ACTIVITY
from ais_megatron.rollout.sglang.server import SGLangServer
from tests.export.test_export import made_up
from tests.helpers.sglang import DENSE, STARTUP_S, RunningServer, sglang_config
from tests.sglang.test_real_server import post

pytestmark = pytest.mark.sglang


def test_sglang_loads_an_export(tmp_path: Path) -> None:
    """From shards with an index. Its log-probabilities are those of transformers."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made_up(tmp_path / "run", scale=0.35, **DENSE)
    export_run(tmp_path / "run", tmp_path / "hf", shard_bytes=200_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    load = ["--model-path", str(tmp_path / "hf"), "--load-format", "safetensors"]  # in place of dummy weights
    config = sglang_config("dense", "bf16", port=free_port(), extra_args=load)
    server = SGLangServer(config, tmp_path, config.rollout.sglang.port)
    server.start()
    try:
        server.wait_until_healthy(STARTUP_S)
        body = {"input_ids": [5, 6, 7, 8], "sampling_params": {"max_new_tokens": 4, "temperature": 0.0}, "return_logprob": True}
        status, answer = post(server.url + "/generate", body)
    finally:
        server.stop()
    assert status == 200
    tokens, ours = answer["output_ids"], [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, 8, *tokens]])).logits[0]
    theirs = logits.log_softmax(-1)[3:-1].gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(ours), theirs, rtol=0.0, atol=0.1)
    assert float(theirs.max()) > -4.0, "far from the uniform distribution, which any weights would give"


def test_activity_moves_during_one_response(sglang_server) -> None:
    server: RunningServer = sglang_server("dense", "bf16")
    body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
    seen: list[list[int]] = []
    request = threading.Thread(target=post, args=(server.url + "/generate", body, server.key))
    request.start()
    while request.is_alive():
        asked = urllib.request.Request(server.url + "/v1/loads?include=core", headers=authorization(server.key))
        with urllib.request.urlopen(asked, timeout=60) as response:
            load = json.load(response)["loads"][0]
        assert set(ACTIVITY) <= load.keys()
        seen.append([load[number] for number in ACTIVITY])
        time.sleep(0.2)
    assert len({tuple(numbers) for numbers in seen}) > 3, seen
