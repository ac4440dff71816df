"""Exports a checkpoint of a run as a Hugging Face folder, tensor by tensor. It needs no GPU, and starts no ranks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ais_megatron.config import Config, ConfigError, load_config
from ais_megatron.export.adapter import add_product, factor_names, factor_shapes, write_adapter
from ais_megatron.export.checkpoint_reader import CheckpointReader
from ais_megatron.export.hf_folder import SHARD_BYTES, HFFolder, Projections, total_bytes
from ais_megatron.export.hf_reader import HFReader
from ais_megatron.export.quantized import projections_of
from ais_megatron.models.family import HEAD, tensors_of
from ais_megatron.models.registry import is_quantized_weight
from ais_megatron.quantization.formats import format_of
from ais_megatron.quantization.fp8 import dequantize_block, quantize_block
from ais_megatron.runs import checkpoint_files
from ais_megatron.runs.folder import check_export_folder, config_of
from ais_megatron.runs.warm_start import starting_folder
from ais_megatron.tokenizer import MODEL_FILE, HFTokenizer, SentencePieceTokenizer, Tokenizer


def export_run(run: Path, out: Path, step: int | None = None, shard_bytes: int = SHARD_BYTES, adapter: bool = False) -> Path:
    """Write a checkpoint of the run in `run` to `out`, which appears only when it is complete. Returns the checkpoint's folder.

    A checkpoint of LoRA has only the factors. The weights they belong to are read from where the run started, and exported merged. A model
    that was trained with an aligned forward pass is exported with its quantised weights (``quantization_config`` in its config.json).

    Args:
        step: which of the kept checkpoints; None: the newest.
        shard_bytes: the most bytes of tensors in one file.
        adapter: write only the factors of LoRA, as a PEFT folder.
    Raises:
        ConfigError: there is no such run or checkpoint, or `out` cannot be written. Nothing is left under its name.
        ValueError: the checkpoint is damaged.
    """
    check_export_folder(out)
    config = load_config(config_of(run))
    if adapter and not config.policy.lora.rank:
        raise ConfigError(f"--adapter: {run} trained all weights (policy.lora.rank=0), so it has no adapter; leave the option out")
    folder = _checkpoint(run, step)
    checkpoint_files.verify(folder, checksums=config.checkpoint.verify == "checksum")
    reader = CheckpointReader(folder, config.architecture)
    tokenizer = _tokenizer(folder, config)
    out = out.absolute()
    partial = out.with_name(out.name + checkpoint_files.PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        if adapter:
            factors = ((name, reader.factor(name, shape)) for name, shape in factor_shapes(config).items())
            write_adapter(partial, config, str(starting_folder(config)), factors)
            tokenizer.save(partial)
        else:
            projections = projections_of(config)
            _check_room(out, config, projections)
            written = HFFolder(partial, config.architecture, config.model.dtype, shard_bytes, projections)
            for name, tensor in _merged(reader, config) if config.policy.lora.rank else reader.tensors():
                for part, values in _as_trained(name, tensor, config, projections):
                    written.write(part, values)
                del tensor, values  # before the next one is read
            tokenizer.save(partial)
            written.finish(eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
        partial.replace(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConfigError(
            f"OUT={out}: the export of {folder} could not be written ({error}); make room, or choose another folder"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _as_trained(name: str, tensor: Tensor, config: Config, projections: Projections | None) -> list[tuple[str, Tensor]]:
    """The tensor as the trained model used it. With an aligned forward pass this is the quantised one. If no layout of files holds its
    format, the quantised values are exported in the model's precision."""
    fmt = format_of(config.rollout) if config.policy.is_aligned else None
    if fmt is None or not is_quantized_weight(name):
        return [(name, tensor)]
    if projections is not None:
        return projections.tensors(name, tensor)
    return [(name, dequantize_block(*quantize_block(tensor, fmt), fmt=fmt))]


def _merged(reader: CheckpointReader, config: Config) -> Iterator[tuple[str, Tensor]]:
    """The weights that the run started from, with the products of the checkpoint's factors added."""
    folder = starting_folder(config)
    assert folder is not None  # a configuration with LoRA always has one
    try:
        base = HFReader(folder)
    except ValueError as error:
        raise ConfigError(f"{folder}: the weights that this LoRA run started from cannot be read ({error}); put them back") from error
    dtype = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
    shapes = factor_shapes(config)
    for tensor in tensors_of(config.architecture):
        if config.architecture.tie_word_embeddings and tensor.name == HEAD.name:
            continue
        weight = base.read(tensor.name).to(dtype)
        names = factor_names(tensor.name.removeprefix("model."))
        if names[0] in shapes:
            a, b = (reader.factor(name, shapes[name]) for name in names)
            weight = add_product(weight, a, b, config.policy.lora)
        yield tensor.name, weight


def _checkpoint(run: Path, step: int | None) -> Path:
    """The checkpoint of `step`, or the newest one."""
    found = {checkpoint_files.step_of(folder): folder for folder in checkpoint_files.complete_checkpoints(run / "checkpoints")}
    if not found:
        raise ConfigError(f"{run}: has no complete checkpoint yet; wait for the next one (checkpoint.every), or for the end of the run")
    if step is not None and step not in found:
        raise ConfigError(
            f"--step {step}: {run} has no checkpoint of this step; it has those of {', '.join(map(str, found))} (checkpoint.keep and "
            "keep_every say which are kept)"
        )
    return found[max(found) if step is None else step]


def _tokenizer(folder: Path, config: Config) -> Tokenizer:
    """The tokenizer that lies in every checkpoint. (The one that the configuration names may have changed since, or be gone.)"""
    return HFTokenizer(folder, config.model.path) if config.tokenizer.kind == "hf" else SentencePieceTokenizer.load(folder / MODEL_FILE)


def _check_room(out: Path, config: Config, projections: Projections | None) -> None:
    need, free = total_bytes(config.architecture, config.model.dtype, projections), shutil.disk_usage(out.parent).free
    if need > free:
        raise ConfigError(
            f"OUT={out}: the export needs {need / 1e9:,.2f} GB, but the disk has only {free / 1e9:,.2f} GB left; make room, or "
            "choose another folder"
        )
