"""Writes exported weights as a Hugging Face folder that transformers can load: safetensors shards and their index, config.json and
generation_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from ais_megatron.batch import Bucket
from ais_megatron.config import Architecture
from ais_megatron.config.hf_config import generation_config, hf_config
from ais_megatron.distributed import LOCAL_ERRORS, rank_consistent


def save_hf(
    buckets: Iterable[Bucket],
    architecture: Architecture,
    dtype: str,
    folder: Path,
    *,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
) -> None:
    """Write each bucket as a safetensors file. All ranks iterate over `buckets`, and the first rank writes.

    Args:
        dtype: "bf16" or "fp32", recorded in config.json.
    Raises:
        RuntimeError: the folder cannot be written. All ranks raise it together.
    """
    is_main = dist.get_rank() == 0
    files: dict[str, str] = {}
    total = 0
    error: Exception | None = None
    for number, bucket in enumerate(buckets):  # continues after a failure, because the other ranks wait in the same gathers
        name = f"model-{number + 1:05d}.safetensors"
        total += sum(tensor.nbytes for _, tensor in bucket)
        files |= {key: name for key, _ in bucket}
        if is_main and error is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                save_file({key: tensor.contiguous().cpu() for key, tensor in bucket}, folder / name, metadata={"format": "pt"})
            except (*LOCAL_ERRORS, SafetensorError) as caught:
                error = caught
    with rank_consistent():
        if error is not None:
            raise RuntimeError(f"cannot write {folder}: {error}") from error
        if is_main:
            index = {"metadata": {"total_size": total}, "weight_map": files}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
            (folder / "config.json").write_text(json.dumps(hf_config(architecture, dtype, eos_ids, pad_id), indent=2))
            (folder / "generation_config.json").write_text(json.dumps(generation_config(eos_ids, pad_id), indent=2))
