"""Writes the weights of a policy on all ranks as a Hugging Face folder, bucket by bucket (`export.hf_folder`).

`export.run` exports a checkpoint, which needs neither a policy nor ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch.distributed as dist

from ais_megatron.batch import Bucket
from ais_megatron.config import Architecture
from ais_megatron.distributed import LOCAL_ERRORS, rank_consistent
from ais_megatron.export.hf_folder import SHARD_BYTES, HFFolder


def save_hf(
    buckets: Iterable[Bucket],
    architecture: Architecture,
    dtype: str,
    folder: Path,
    *,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write all tensors of `buckets`. All ranks iterate over `buckets`, and the first rank writes.

    Args:
        dtype: "bf16" or "fp32", the precision of the files.
    Raises:
        RuntimeError: the folder cannot be written. All ranks raise it together.
    """
    is_main = dist.get_rank() == 0
    written: HFFolder | None = None
    error: Exception | None = None
    for bucket in buckets:  # continues after a failure, because the other ranks wait in the same gathers
        if is_main and error is None:
            try:
                written = written or HFFolder(folder, architecture, dtype, shard_bytes)
                for name, tensor in bucket:
                    written.write(name, tensor)
            except LOCAL_ERRORS as caught:
                error = caught
    with rank_consistent():
        if error is not None:
            raise RuntimeError(f"cannot write {folder}: {error}") from error
        if written is not None:
            written.finish(eos_ids=eos_ids, pad_id=pad_id)
