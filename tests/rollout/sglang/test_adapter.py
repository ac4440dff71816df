"""LoRA's factors on servers that keep the frozen weights."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ais_megatron.batch import Bucket, Prompt
from ais_megatron.config import Config, ConfigError, build_config
from ais_megatron.rollout.engine import SamplingParams, WeightsLost
from ais_megatron.rollout.manifest import Manifest
from ais_megatron.rollout.sglang.adapter import Adapters
from ais_megatron.rollout.sglang.client import SGLangEngine
from ais_megatron.rollout.sglang.plugin import digest
from ais_megatron.rollout.sglang.server import server_command
from ais_megatron.rollout.sglang.transports import make_transport
from tests.helpers.sglang import sglang_config
from tests.rollout.sglang.fake_server import RUN, FakeServer

PROMPTS = [Prompt(0, "", (10, 3), {})]


def adapter_config(
    lora: dict[str, Any] | None = None, kind: str = "dense", rollout: dict[str, Any] | None = None, **sections: Any
) -> Config:
    data = sglang_config(kind, "bf16").model_dump()
    data["rollout"] |= {"lora_sync": "adapter"} | (rollout or {})
    data["rollout"]["sglang"]["recovery_timeout_s"] = 0.1
    data["sft"]["steps"] = 1
    data["policy"]["lora"] |= {"rank": 2} if lora is None else lora
    for name, values in sections.items():
        data[name] |= values
    return build_config(data)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.stop()


@pytest.fixture
def engine(fake: FakeServer) -> Iterator[SGLangEngine]:
    config = adapter_config()
    made = SGLangEngine(
        config.architecture,
        config.rollout,
        [fake.url],
        eos_ids=(2,),
        dtype=torch.bfloat16,
        run_id=RUN,
        transport=make_transport(config, torch.device("cpu"), RUN),
        adapters=Adapters(config),
    )
    yield made
    made.close()


def frozen() -> Bucket:
    config = adapter_config()
    manifest = Manifest.of(config.architecture, config.rollout, torch.bfloat16)
    return [(name, torch.zeros(shape, dtype=dtype)) for name, (shape, dtype) in manifest._required.items()]


def factors(seed: int, config: Config | None = None) -> Bucket:
    generator = torch.Generator().manual_seed(seed)
    shapes = Adapters(config or adapter_config()).shapes
    return [(name, torch.randn(shape, generator=generator).bfloat16()) for name, shape in shapes.items()]


def test_the_frozen_weights_travel_once(fake: FakeServer, engine: SGLangEngine) -> None:
    engine.update_weights([frozen(), factors(0)], 0)
    assert fake.version == f"{RUN}-0" and "update_weights_from_tensor" in fake.calls
    fake.calls.clear()
    engine.update_weights([factors(1)], 1)
    assert not {"update_weights_from_tensor", "pause_generation"} & set(fake.calls)
    engine.update_weights([factors(2)], 2)
    expected = {f"{RUN}-{version}": digest(tensor for _, tensor in factors(version)) for version in (1, 2)}
    assert fake.adapters == expected, "requests in flight may still use the previous one"
    fake.calls.clear()
    engine.update_weights([factors(2)], 2)
    assert "load_lora_adapter_from_tensors" not in fake.calls, "the server has this version already"
    assert set(fake.adapters) == {f"{RUN}-2"}


def test_a_request_names_its_adapter_which_decides_the_version(fake: FakeServer, engine: SGLangEngine) -> None:
    engine.update_weights([frozen(), factors(0)], 0)
    fake.bodies.clear()

    def synced_meanwhile(body: dict[str, Any]) -> dict[str, Any]:
        fake.version = f"{RUN}-1"
        return FakeServer.answer(fake, body)

    fake.answer = synced_meanwhile  # type: ignore[method-assign]
    (rollout,) = engine.generate(PROMPTS, SamplingParams(1, 4))
    assert [body["lora_path"] for body in fake.bodies] == [f"{RUN}-0"]
    assert (rollout.weight_version, rollout.version_spans) == (0, ((0, 2),))


def test_a_restarted_server_needs_both(fake: FakeServer, engine: SGLangEngine) -> None:
    engine.update_weights([frozen(), factors(0)], 0)
    fake.adapters.clear()
    with pytest.raises(WeightsLost, match="no longer has this run's weights"):
        engine.generate(PROMPTS, SamplingParams(1, 4))
    with pytest.raises(RuntimeError, match="none of the frozen weights"):
        engine.update_weights([factors(1)], 1)
    engine.update_weights([frozen(), factors(1)], 1)
    assert engine.generate(PROMPTS, SamplingParams(1, 4))[0].weight_version == 1


def test_http_200_is_no_proof(fake: FakeServer, engine: SGLangEngine) -> None:
    fake.ignores_adapters = True
    with pytest.raises(RuntimeError, match="an adapter of noise has no effect(.|\n)*lora_sync=merged"):
        engine.update_weights([frozen(), factors(0)], 0)
    fake.ignores_adapters = False
    engine.update_weights([frozen(), factors(0)], 0)
    fake.loses_adapters = True
    with pytest.raises(RuntimeError, match=f"does not hold the LoRA factors of {RUN}-1"):
        engine.update_weights([factors(1)], 1)
    assert fake.version == f"{RUN}-0" and engine.version == -1


def test_an_incomplete_adapter_is_never_sent(fake: FakeServer, engine: SGLangEngine) -> None:
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj.lora_A.weight: missing from the update"):
        engine.update_weights([frozen(), [part for part in factors(0) if "down_proj" not in part[0]]], 0)
    assert not fake.adapters


def test_a_merged_layer_gets_factors_of_zero_for_the_others() -> None:
    config = adapter_config({"rank": 2, "targets": ["k_proj"]})
    payload = pickle.loads(base64.b64decode(Adapters(config)._payload(factors(0, config))))
    parts = {"_".join(name.split(".")[-3:-1]) for name, tensor in payload.items() if tensor.any()}
    assert parts == {"k_proj_lora_A", "k_proj_lora_B"}
    assert {name.split(".")[-3] for name in payload} == {"q_proj", "k_proj", "v_proj"}
    assert digest(payload.values()) == digest(tensor for _, tensor in factors(0, config))


def test_the_digest_sees_values_and_not_how_they_are_grouped() -> None:
    one, two = torch.randn(3, 4).bfloat16(), torch.randn(2, 4).bfloat16()
    assert digest([one, two]) == digest([torch.cat([two, torch.zeros(1, 4).bfloat16(), one])]) != digest([one, two + 1])


def test_the_server_is_started_for_adapters() -> None:
    config = adapter_config({"rank": 2, "targets": ["up_proj"]})
    command = server_command(config, "model", 1)  # type: ignore[arg-type]
    start = command.index("--enable-lora")
    flags = "--enable-lora --max-lora-rank 2 --max-loras-per-batch 3 --lora-strict-loading --lora-target-modules gate_proj up_proj"
    assert command[start : start + 10] == [*flags.split(), "--lora-backend"] and command[start + 10] == "torch_native"
    assert "--enable-lora" not in server_command(adapter_config(rollout={"lora_sync": "merged"}), "model", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 0}}, "policy.lora.rank=0; set a rank"),
        ({"rollout": {"engine": "local"}}, "rollout.engine=local cannot hold adapters; set rollout.engine=sglang"),
        ({"rollout": {"engine": "replay", "replay_dir": "x"}}, "rollout.engine=replay cannot hold adapters"),
        ({"policy": {"forward_precision": "fp8_aligned"}, "rollout": {"quantization": "fp8"}}, "trains quantised merged weights"),
        ({"kind": "moe", "lora": {"rank": 2, "targets": ["up_proj"]}}, "policy.lora.targets: up_proj belong to the experts"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapter_config(**changes)
