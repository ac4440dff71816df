"""When checkpoints are written, completed, verified and deleted. Every function here is collective over the job.

A save is complete when all ranks have written their files: then the first rank adds the state, the tokenizer and the manifest,
renames the folder, and deletes the checkpoints that have had their day. With `checkpoint.async_save` the writing runs in a
thread of each rank while the next steps train; `Saver.busy` tells whether it still does, and the loop completes it as soon as no
rank is busy. At most one save is in flight.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from ais_megatron.config import CheckpointConfig
from ais_megatron.distributed import rank, rank_consistent
from ais_megatron.policy.checkpoint import PendingSave
from ais_megatron.policy.policy import Policy
from ais_megatron.policy.training_state import STATE_FILE, TrainingState
from ais_megatron.runs import checkpoint_files as files
from ais_megatron.runs.folder import write_text_atomic


class Saver:
    """Saves `policy` into `checkpoints`, a run's folder of them.

    Args:
        newest_step: the step of the checkpoint that was loaded, if any.
        add_files: called on the first rank with the folder, for what else belongs into a checkpoint (the tokenizer).
    """

    def __init__(
        self, policy: Policy, checkpoints: Path, config: CheckpointConfig, newest_step: int | None, add_files: Callable[[Path], None]
    ) -> None:
        self._policy, self._checkpoints, self._config, self._add_files = policy, checkpoints, config, add_files
        self._in_flight: _InFlight | None = None
        self.newest_step = newest_step  # of the checkpoint that was begun last, or loaded

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._in_flight is not None and self._in_flight.is_writing

    def save(self, state: TrainingState) -> None:
        """Save the policy and `state`: wholly, or with `async_save` begin to.

        Raises:
            RuntimeError: it cannot be written; earlier checkpoints are untouched. On all ranks together.
        """
        self.finish()
        folder = files.folder_of(self._checkpoints, state.step)
        partial = folder.with_name(folder.name + files.PARTIAL)
        with rank_consistent():
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with _removed_on_failure(partial):
            pending = PendingSave(self._policy, partial, copies=self._config.async_save)
        self._in_flight = _InFlight(pending, state.of(self._policy), partial, folder, in_background=self._config.async_save)
        self.newest_step = state.step
        if not self._config.async_save:
            self.finish()

    def save_now(self, state: TrainingState) -> None:
        """Before leaving: nothing in flight any more, and `state` on the disk."""
        self.finish()
        if self.newest_step != state.step:
            self.save(state)
            self.finish()

    def finish(self) -> None:
        """Wait for a save in flight and complete it."""
        if self._in_flight is None:
            return
        flight, self._in_flight = self._in_flight, None
        with _removed_on_failure(flight.partial):
            with rank_consistent():
                flight.wait()
            listed = flight.pending.finish()
            with rank_consistent():
                if rank() == 0:
                    write_text_atomic(flight.partial / STATE_FILE, flight.state.to_json())
                    self._add_files(flight.partial)
                    files.write_manifest(flight.partial, listed)
                    files.put_in_place(flight.partial, flight.folder)
                    files.prune(self._checkpoints, self._config.keep, self._config.keep_every)


@contextmanager
def _removed_on_failure(partial: Path) -> Iterator[None]:
    """Where the disk is full, an unfinished checkpoint is in the way."""
    try:
        yield
    except (RuntimeError, ValueError):
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


class _InFlight:
    """A save between its begin and its finish."""

    def __init__(self, pending: PendingSave, state: TrainingState, partial: Path, folder: Path, in_background: bool) -> None:
        self.pending, self.state, self.partial, self.folder = pending, state, partial, folder
        self._error: Exception | None = None
        # A daemon: a run that fails must not wait for a checkpoint that nobody will complete.
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start() if in_background else self._write()

    @property
    def is_writing(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        if self._thread.is_alive():
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        try:
            self.pending.write()
        except (OSError, RuntimeError, ValueError) as error:  # shown, on all ranks, by whoever waits
            self._error = error


def tidy(checkpoints: Path) -> None:
    """Delete what an earlier, killed start left unfinished."""
    with rank_consistent():
        swept = files.sweep(checkpoints) if rank() == 0 else []
    if swept:
        print(f"checkpoints: deleted the unfinished {', '.join(swept)}", flush=True)


def checkpoint_to_resume(checkpoints: Path, config: CheckpointConfig) -> Path | None:
    """The newest checkpoint whose files are intact; None where there is no checkpoint at all.

    Raises:
        ValueError: the newest one is damaged and `checkpoint.on_damage` is stop, or none is intact. On all ranks together.
    """
    damaged = False
    while (folder := newest_on_all_ranks(checkpoints)) is not None:
        try:
            verify(folder, config)
            return folder
        except ValueError as error:
            before = files.complete_checkpoints(checkpoints)[:-1]
            if config.on_damage == "stop":
                advice = f"checkpoint.on_damage=previous continues from {before[-1].name}" if before else "there is no earlier one"
                raise ValueError(f"{error}; {advice}") from error
            damaged = True
            with rank_consistent():  # all ranks have looked: `verify` has just joined them
                if rank() == 0:
                    print(f"warning: {error}; set aside as {files.set_aside(folder).name}", flush=True)
    if damaged:
        raise ValueError(f"{checkpoints}: no checkpoint is intact (those set aside end in {files.DAMAGED}); start anew in another run.dir")
    return None


def newest_on_all_ranks(checkpoints: Path) -> Path | None:
    """`newest` as the first rank sees it: a shared file system may show the others an older listing."""
    steps = [files.step_of(folder) if rank() == 0 and (folder := files.newest(checkpoints)) else None]
    dist.broadcast_object_list(steps, src=0)
    return None if steps[0] is None else files.folder_of(checkpoints, steps[0])


def verify(folder: Path, config: CheckpointConfig) -> None:
    """Compare `folder` with its manifest, the ranks sharing the reading. Raises ValueError on all ranks together."""
    with rank_consistent():
        files.verify(folder, checksums=config.verify == "checksum", part=rank(), parts=dist.get_world_size())
