"""Files of quantised models are read by other libraries: compressed-tensors unpacks what we pack, and transformers loads the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from ais_megatron.config import build_config
from ais_megatron.export.hf_folder import HFFolder, total_bytes
from ais_megatron.export.quantized import BlockFP8, PackedInt4, pack, projections_of
from ais_megatron.models.family import tensors_of
from ais_megatron.quantization.formats import INT4
from ais_megatron.quantization.fp8 import dequantize_block, quantize_block

SIZES = dict(vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
ALIGNED = {"fp8_e4m3": "fp8_aligned", "fp4_e2m1": "fp8_aligned", "int4": "int4_aligned"}


def config_of(quantization: str, **architecture: object):
    data = {
        "model": {"architecture": SIZES | dict(head_dim=32, max_position_embeddings=64) | architecture, "dtype": "fp32"},
        "policy": {"forward_precision": ALIGNED[quantization]},
        "rollout": {"quantization": quantization},
    }
    return build_config(data)


def test_packed_integers_are_those_that_compressed_tensors_unpacks() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    assert torch.equal(unpack_from_int32(pack(values), 4, values.shape), values)


def test_transformers_loads_packed_int4_with_the_trained_values(tmp_path: Path) -> None:
    """Its logits are those of the same model with the quantised values written out."""
    from transformers import AutoModelForCausalLM

    config = config_of("int4")
    projections, folders = projections_of(config), {"packed": tmp_path / "packed", "plain": tmp_path / "plain"}
    assert isinstance(projections, PackedInt4)
    packed = HFFolder(folders["packed"], config.architecture, "fp32", projections=projections)
    plain = HFFolder(folders["plain"], config.architecture, "fp32")
    generator = torch.Generator().manual_seed(0)
    for tensor in tensors_of(config.architecture):
        if tensor.name == "lm_head.weight" and config.architecture.tie_word_embeddings:
            continue
        weight = torch.randn(tensor.shape, generator=generator) * 0.1
        if not tensor.quantized:
            packed.write(tensor.name, weight)
            plain.write(tensor.name, weight)
            continue
        for name, part in projections.tensors(tensor.name, weight):
            packed.write(name, part)
        plain.write(tensor.name, dequantize_block(*quantize_block(weight, INT4), fmt=INT4))
    packed.finish()
    plain.finish()
    tokens = torch.randint(0, 64, (2, 9), generator=generator)
    models = {name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for name, folder in folders.items()}
    with torch.no_grad():
        logits = {name: model(tokens).logits for name, model in models.items()}
    torch.testing.assert_close(logits["packed"], logits["plain"], atol=1e-6, rtol=1e-6)
    written = sum(file.stat().st_size for file in folders["packed"].glob("*.safetensors"))
    assert 0 < written - total_bytes(config.architecture, "fp32", projections) < 20_000, "the rest is the file's header"


@pytest.mark.parametrize(
    ("quantization", "changes", "expected"),
    [("fp8_e4m3", {}, BlockFP8), ("fp4_e2m1", {}, None), ("int4", {"intermediate_size": 192}, None)],
)
def test_which_formats_have_files(quantization: str, changes: dict[str, object], expected: type | None) -> None:
    """A layout of INT4 has no smaller blocks at the edge, so its columns are multiples of 128."""
    found = projections_of(config_of(quantization, **changes))
    assert found is None if expected is None else isinstance(found, expected)


def test_unquantised_layers_are_named() -> None:
    """compressed-tensors takes every linear layer that is not named for a packed one."""
    moe = config_of("int4", model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128).architecture
    assert PackedInt4().config(moe)["ignore"] == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


@pytest.mark.parametrize("quantization", ["fp8_e4m3", "int4"])
def test_a_weight_that_cannot_be_quantised_is_named(quantization: str) -> None:
    projections, name = projections_of(config_of(quantization)), "model.layers.1.mlp.up_proj.weight"
    assert projections is not None
    with pytest.raises(ValueError, match=f"{name}: the weight holds NaN or infinity"):
        projections.tensors(name, torch.full((256, 128), float("nan")))
