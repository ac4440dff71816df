"""LoRA factors as a PEFT folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

Names are those of PEFT 0.19 for a causal language model of transformers:
``base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight`` and ``….lora_B.weight``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ais_megatron.config import Config
from ais_megatron.config.policy import LoraConfig, lora_targets
from ais_megatron.models.family import shape_of

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model.model."


def factor_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """The shape of every factor, named from ``layers.`` on (or what stands in its place after ``model.``)."""
    a, lora = config.architecture, config.policy.lora
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(a.num_hidden_layers):
        for row in lora_targets(lora, a, layer).values():
            out, width = shape_of(row, a)
            name_a, name_b = factor_names(f"{a.family.factor_layers}{layer}.{row.name}")
            shapes |= {name_a: (lora.rank, width), name_b: (out, lora.rank)}
    return shapes


def factor_names(weight: str) -> tuple[str, str]:
    """The names of A and B of a weight, such as ``layers.0.self_attn.q_proj.weight``."""
    projection = weight.removesuffix("weight")
    return f"{projection}lora_A.weight", f"{projection}lora_B.weight"


def write_adapter(folder: Path, config: Config, base: str, factors: Iterable[tuple[str, Tensor]]) -> None:
    """Write all factors, named from ``layers.`` on, to the existing `folder`. base: the folder or name of the weights they belong to.

    Raises:
        OSError: the folder cannot be written.
    """
    save_file({peft_name(name): factor.contiguous() for name, factor in factors}, folder / WEIGHTS_FILE, {"format": "pt"})
    settings = adapter_settings(config.policy.lora, sorted(lora_targets(config.policy.lora, config.architecture)), base)
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def peft_name(name: str) -> str:
    """PEFT's name of a factor that is named from ``layers.`` on."""
    return _PREFIX + name


def adapter_settings(lora: LoraConfig, targets: list[str], base: str) -> dict[str, object]:
    """The content of ``adapter_config.json``."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


class AdapterReader:
    """The factors in a PEFT folder.

    Raises:
        ValueError: the folder has no adapter, or one of another rank, scale or kind than `config` says, or a factor is missing or has
            another shape. The message names what to change.
    """

    def __init__(self, folder: str | Path, config: Config) -> None:
        self._folder = Path(folder)
        where = f"model.adapter={folder}"
        try:
            settings = json.loads((self._folder / CONFIG_FILE).read_text(encoding="utf-8"))
            with safe_open(self._folder / WEIGHTS_FILE, framework="pt") as file:
                stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        except (OSError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"{where}: not a PEFT folder with {CONFIG_FILE} and {WEIGHTS_FILE} ({error})") from error
        if problems := _setting_problems(settings, config.policy.lora, config):
            raise ValueError("\n".join(f"{where}: {problem}" for problem in problems))
        wanted = {_PREFIX + name: shape for name, shape in factor_shapes(config).items()}
        if unknown := sorted(stored.keys() - wanted.keys()):
            raise ValueError(f"{where}: has tensors that this model has no place for, such as {unknown[0]}")
        for name, shape in wanted.items():
            if stored.get(name) != shape:
                found = f"shape {stored[name]}" if name in stored else "nothing"
                raise ValueError(f"{where}: {name} should have shape {shape}, but the file has {found}; does it belong to model.path?")

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """A part of the factor `name`, which is named from ``layers.`` on."""
        with safe_open(self._folder / WEIGHTS_FILE, framework="pt") as file:
            part: Tensor = file.get_slice(_PREFIX + name)[rows, columns]
        return part


def _setting_problems(settings: dict[str, object], lora: LoraConfig, config: Config) -> list[str]:
    """Why an adapter with these settings does not fit. PEFT's variants of LoRA compute something else."""
    problems = []
    variants = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out") if settings.get(key)]
    if settings.get("peft_type") != "LORA" or variants or settings.get("bias", "none") != "none":
        kind = ", ".join(variants) or f"{settings.get('peft_type')} with bias {settings.get('bias')}"
        problems.append(f"only plain LoRA without biases is supported, but {CONFIG_FILE} says {kind}")
    if settings.get("r") != lora.rank:
        problems.append(f"has rank {settings.get('r')}, but policy.lora.rank={lora.rank}; make them equal")
    if settings.get("lora_alpha") != lora.alpha:
        problems.append(f"has lora_alpha {settings.get('lora_alpha')}, but policy.lora.alpha={lora.alpha:g}; make them equal")
    targets, stored = sorted(lora_targets(lora, config.architecture)), settings.get("target_modules")
    if not isinstance(stored, list) or sorted(stored) != targets:
        problems.append(f"has factors for {stored}, but policy.lora.targets means {targets}; make them equal")
    return problems


def add_product(weight: Tensor, a: Tensor, b: Tensor, lora: LoraConfig) -> Tensor:
    """W + (alpha / rank) B A, in the dtype of W."""
    with torch.no_grad():
        return (weight.float() + lora.scale * (b.float() @ a.float())).to(weight.dtype)
