"""Records the responses of an engine, for training on them again without an engine (`replay`). Each call of a rank writes one file.

A file is in safetensors format. It holds the tokens and log-probabilities of all its responses, one after the other. One JSON object
in the header says which response is which. The file's name is only for people. A token takes about 8 bytes, and with routed experts
1 byte more per layer and expert (2 above 128 experts, and in recordings of earlier versions).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ais_megatron.batch import Bucket, Prompt, Rollout
from ais_megatron.rollout.engine import ReleasesMemory, RolloutEngine, SamplingParams
from ais_megatron.rollout.occupancy import HasOccupancy

FORMAT, FORMAT_VERSION = "ais_megatron.rollouts", 1
SUFFIX = ".safetensors"


class RecordingEngine:
    """A `RolloutEngine` that passes every call to `engine` and writes the responses to `folder`.

    Args:
        continues: the run is resumed, so `folder` may hold its earlier steps. Responses that are generated again replace them.
    Raises:
        ValueError: `folder` holds the responses of another run (first rank only).
    """

    def __init__(self, engine: RolloutEngine, folder: Path, rank: int, continues: bool) -> None:
        self._engine, self._folder, self._rank = engine, folder, rank
        if isinstance(engine, HasOccupancy):
            self.occupancy = engine.occupancy
        if isinstance(engine, ReleasesMemory):
            self.release_memory = engine.release_memory
        if rank == 0:
            if not continues and any(folder.glob(f"*{SUFFIX}")):
                raise ValueError(
                    f"rollout.save_dir={folder}: already holds the responses of a run; choose another folder, or delete this one"
                )
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def version(self) -> int:
        return self._engine.version

    @property
    def takes_updates_while_generating(self) -> bool:
        return self._engine.takes_updates_while_generating

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        version = self._engine.version
        rollouts = self._engine.generate(prompts, sampling)
        if prompts:
            kind, first = ("held_out", -1 - prompts[0].index) if prompts[0].index < 0 else ("prompts", prompts[0].index)
            name = f"version_{version:06d}_{kind}_{first:08d}_rank_{self._rank:04d}{SUFFIX}"
            write_rollouts(self._folder / name, prompts, rollouts, sampling, version)
        return rollouts

    def update_weights(self, buckets: Iterable[Bucket], version: int) -> None:
        self._engine.update_weights(buckets, version)

    def probe(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Rollout]]:
        return self._engine.probe(prompts, sampling)

    def close(self) -> None:
        self._engine.close()


def write_rollouts(path: Path, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], sampling: SamplingParams, version: int) -> None:
    """Write a recording to `path`, completely or not at all.

    Args:
        rollouts: `sampling.num_samples` for each prompt, grouped by prompt.
        version: the version of the engine's weights when it was asked.
    Raises:
        RuntimeError: the file cannot be written.
    """
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "written": time.time_ns(),
        "version": version,
        "sampling": asdict(sampling),
        "prompts": [{"index": p.index, "num_tokens": len(p.token_ids)} for p in prompts],
        "rollouts": [
            {
                "num_tokens": len(r.token_ids),
                "finish_reason": r.finish_reason,
                "weight_version": r.weight_version,
                "version_spans": r.version_spans,
                "num_routed": None if r.routed_experts is None else len(r.routed_experts),
            }
            for r in rollouts
        ],
    }
    tensors = {
        "prompt_tokens": _joined([p.token_ids for p in prompts], torch.int32),
        "tokens": _joined([r.token_ids for r in rollouts], torch.int32),
        "logprobs": _joined([r.rollout_logprobs for r in rollouts], torch.float32),
    }
    routed = [r.routed_experts for r in rollouts if r.routed_experts is not None]
    if routed:
        tensors["routed_experts"] = torch.cat(routed)
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, metadata={FORMAT: json.dumps(header)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise RuntimeError(f"{path}: the responses could not be recorded ({error}); is the disk full?") from error


def _joined(values: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    return torch.tensor([value for part in values for value in part], dtype=dtype)
