"""Writes, completes, verifies and deletes checkpoints. Every function here is collective over the job.

When all ranks have written their files, the first rank adds the state, the tokenizer and the manifest, renames the folder, and deletes
old checkpoints. With `checkpoint.async_save` a thread of each rank writes while the next steps train. `Saver.busy` tells whether this
rank still writes, and the loop completes the save as soon as no rank is busy. There is at most one save in flight.
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
        newest_step: the step of the checkpoint that was loaded, or None.
        add_files: called on the first rank with the folder, to add further files to a checkpoint (the tokenizer).
        add_own: called on every rank with the folder when a save begins, to add files of that rank (responses generated ahead).
        prepare: called on every rank before a save begins, so that the optimizer's state is where it is saved from.
    """

    def __init__(
        self,
        policy: Policy,
        checkpoints: Path,
        config: CheckpointConfig,
        newest_step: int | None,
        add_files: Callable[[Path], None],
        add_own: Callable[[Path], None] = lambda folder: None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._policy, self._checkpoints, self._config = policy, checkpoints, config
        self._add_files, self._add_own, self._prepare = add_files, add_own, prepare
        self._in_flight: _InFlight | None = None
        self.newest_step = newest_step  # step of the checkpoint that was loaded or begun last

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._in_flight is not None and self._in_flight.is_writing

    def save(self, state: TrainingState) -> None:
        """Save the policy and `state`. With `async_save`, only begin the save.

        Raises:
            RuntimeError: the checkpoint cannot be written. Earlier ones are not affected. All ranks raise it together.
        """
        self.finish()
        self._prepare()
        folder = files.folder_of(self._checkpoints, state.step)
        partial = folder.with_name(folder.name + files.PARTIAL)
        with rank_consistent():
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with _removed_on_failure(partial):
            with rank_consistent():
                self._add_own(partial)
            pending = PendingSave(self._policy, partial, copies=self._config.async_save)
        self._in_flight = _InFlight(pending, state.of(self._policy), partial, folder, in_background=self._config.async_save)
        self.newest_step = state.step
        if not self._config.async_save:
            self.finish()

    def save_now(self, state: TrainingState) -> None:
        """Save `state` and wait until it is on the disk. To be called before the run ends."""
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
    """Delete an unfinished checkpoint after a failure, because it takes room on a full disk."""
    try:
        yield
    except (RuntimeError, ValueError):
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


class _InFlight:
    """A save between begin and finish."""

    def __init__(self, pending: PendingSave, state: TrainingState, partial: Path, folder: Path, in_background: bool) -> None:
        self.pending, self.state, self.partial, self.folder = pending, state, partial, folder
        self._error: Exception | None = None
        # A daemon thread, because a run that fails must not wait for a checkpoint that will not be completed.
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
        except (OSError, RuntimeError, ValueError) as error:  # raised later, on all ranks, by the call that waits
            self._error = error


def tidy(checkpoints: Path) -> None:
    """Delete unfinished checkpoints of an earlier start that was killed."""
    with rank_consistent():
        swept = files.sweep(checkpoints) if rank() == 0 else []
    if swept:
        print(f"checkpoints: deleted the unfinished {', '.join(swept)}", flush=True)


def checkpoint_to_resume(checkpoints: Path, config: CheckpointConfig) -> Path | None:
    """The newest checkpoint whose files are intact, or None if there is no checkpoint.

    Raises:
        ValueError: the newest one is damaged and `checkpoint.on_damage` is stop, or none is intact. All ranks raise it together.
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
            with rank_consistent():  # all ranks have read the files, because `verify` is collective
                if rank() == 0:
                    print(f"warning: {error}; set aside as {files.set_aside(folder).name}", flush=True)
    if damaged:
        raise ValueError(
            f"{checkpoints}: no checkpoint is intact (damaged ones were renamed to *{files.DAMAGED}); start a new run in another run.dir"
        )
    return None


def newest_on_all_ranks(checkpoints: Path) -> Path | None:
    """`newest` on the first rank, because a shared file system may show the others an older listing."""
    steps = [files.step_of(folder) if rank() == 0 and (folder := files.newest(checkpoints)) else None]
    dist.broadcast_object_list(steps, src=0)
    return None if steps[0] is None else files.folder_of(checkpoints, steps[0])


def verify(folder: Path, config: CheckpointConfig) -> None:
    """Compare `folder` with its manifest. The ranks share the work. All ranks raise a ValueError together."""
    with rank_consistent():
        files.verify(folder, checksums=config.verify == "checksum", part=rank(), parts=dist.get_world_size())
