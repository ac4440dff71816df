"""Checkpoints: what is whole, what is damaged, and that a policy comes back to the last bit, under any layout."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ais_megatron.config import CheckpointConfig, build_config
from ais_megatron.runs import checkpoint_files as files
from tests.helpers.policies import LAYOUTS, make_batch, make_config, make_policy, my_rows, weights_of
from tests.helpers.ranks import RankPool
from tests.helpers.runs import SMALL, assert_same_rows, rows_of, small, trained


def checkpoint_at(folder: Path, step: int, content: bytes = b"weights") -> Path:
    """A checkpoint of two files."""
    path = files.folder_of(folder, step)
    partial = path.with_name(path.name + files.PARTIAL)
    (partial / "deep").mkdir(parents=True)
    (partial / "a.bin").write_bytes(content)
    (partial / "deep" / "b.bin").write_bytes(b"")
    files.write_manifest(partial, files.entries(partial, ["a.bin"]))
    files.put_in_place(partial, path)
    return path


def test_the_manifest_names_every_file_with_size_and_checksum(tmp_path: Path) -> None:
    folder = checkpoint_at(tmp_path, 7, b"abc")
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert listed["a.bin"] == {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    assert listed.keys() == {"a.bin", "deep/b.bin"} and listed["deep/b.bin"] == {"bytes": 0, "sha256": empty}
    files.verify(folder, checksums=True)
    checkpoint_at(tmp_path, 7, b"again")  # a step that is saved a second time replaces the first
    assert (folder / "a.bin").read_bytes() == b"again" and [p.name for p in tmp_path.iterdir()] == ["step_000007"]


def test_damage_is_named(tmp_path: Path) -> None:
    folder = checkpoint_at(tmp_path, 1)
    (folder / "a.bin").write_bytes(b"Weights")
    files.verify(folder, checksums=False)
    files.verify(folder, checksums=True, part=1, parts=2)  # the other rank's file
    with pytest.raises(ValueError, match="a.bin: damaged, its contents differ"):
        files.verify(folder, checksums=True, part=0, parts=2)
    (folder / "a.bin").write_bytes(b"weigh")
    with pytest.raises(ValueError, match="a.bin: damaged, has 5 bytes, but 7 were written"):
        files.verify(folder, checksums=False)
    (folder / "a.bin").unlink()
    with pytest.raises(ValueError, match="a.bin: missing"):
        files.verify(folder, checksums=False)
    (folder / "manifest.json").write_text('{"files"')
    with pytest.raises(ValueError, match="not a manifest"):
        files.verify(folder, checksums=False)


def test_which_checkpoints_stay(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10, 1_000_000):
        checkpoint_at(tmp_path, step)
    (files.folder_of(tmp_path, 12)).mkdir()  # no manifest: not a checkpoint
    files.prune(tmp_path, keep=2, keep_every=4)
    assert [files.step_of(folder) for folder in files.complete_checkpoints(tmp_path)] == [4, 8, 10, 1_000_000]
    files.prune(tmp_path, keep=1, keep_every=0)
    assert files.complete_checkpoints(tmp_path) == [files.newest(tmp_path)] == [files.folder_of(tmp_path, 1_000_000)]


def test_what_a_kill_leaves_is_swept_and_never_loaded(tmp_path: Path) -> None:
    whole = checkpoint_at(tmp_path, 2)
    checkpoint_at(tmp_path, 4).rename(tmp_path / "step_000004.partial")  # all written, but not yet in place
    checkpoint_at(tmp_path, 6).rename(tmp_path / "step_000006.deleted.partial")
    aside = files.set_aside(checkpoint_at(tmp_path, 8))
    assert files.newest(tmp_path) == whole
    assert files.sweep(tmp_path) == ["step_000004.partial", "step_000006.deleted.partial"]
    assert sorted(tmp_path.iterdir()) == [whole, aside] and files.sweep(tmp_path / "none") == []


def make_saver(policy, folder: Path, **options):  # noqa: ANN001, ANN201
    from ais_megatron.policy.saver import Saver

    return Saver(policy, folder, CheckpointConfig(**options), None, add_files=lambda partial: (partial / "vocabulary").write_text("a b"))


def one_step(policy) -> dict[str, float]:  # noqa: ANN001
    from ais_megatron.algorithm.scaler import LossScaler

    rows, _ = my_rows(make_batch())
    old_logprobs = policy.logprobs(rows)
    return policy.train_step(rows, old_logprobs, LossScaler(alpha=0.0))


def saved(rank: int, path: Path, folder: Path, is_async: bool, **layout):  # noqa: ANN201
    """Two steps, a save, and at once a third step; returns the weights and metrics of both sides of the save."""
    from ais_megatron.policy.training_state import TrainingState

    policy = make_policy(make_config(path, **layout), path)
    for _ in range(2):
        one_step(policy)
    policy.calibrate(my_rows(make_batch())[0])
    random_state = torch.get_rng_state()
    before = weights_of(policy)
    saver = make_saver(policy, folder, async_save=is_async)
    saver.save(TrainingState(step=2, next_prompt=16))
    metrics = one_step(policy)
    saver.finish()
    assert not saver.busy and torch.equal(torch.get_rng_state(), random_state), "a step and a save draw no random number"
    return before, weights_of(policy), metrics


def loaded(rank: int, path: Path, folder: Path, **layout):  # noqa: ANN201
    """The weights as loaded, the state, and weights and metrics of the step after it."""
    from ais_megatron.policy import checkpoint
    from ais_megatron.policy.saver import checkpoint_to_resume

    policy = make_policy(make_config(path, **layout), path)
    state = checkpoint.load(policy, checkpoint_to_resume(folder, CheckpointConfig()), with_optimizer=True)
    weights = weights_of(policy)
    metrics = one_step(policy)
    return weights, state, weights_of(policy), metrics


@pytest.fixture(scope="module", params=["at once", "async"])
def a_save(request, ranks: RankPool, untied_checkpoint: Path, tmp_path_factory):  # noqa: ANN001, ANN201
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, ranks.run(2, saved, path=untied_checkpoint, folder=folder, is_async=request.param == "async")[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["DP2", "TP1", "TP2+SP", "PP2", "TP2xPP2", "CP2"])
def test_a_checkpoint_of_two_ranks_loads_under_any_layout(ranks: RankPool, untied_checkpoint: Path, a_save, layout: str) -> None:  # noqa: ANN001
    """Weights to the last bit; the next step to the last bit under the same layout, else as closely as layouts agree."""
    folder, (before, after, metrics) = a_save
    assert sorted(path.name for path in folder.iterdir()) == ["step_000002"]
    assert {"manifest.json", "state.json", "vocabulary", "common.pt"} <= {path.name for path in (folder / "step_000002").iterdir()}
    world, tp, pp, sp = (2, 1, 1, False) if layout == "CP2" else LAYOUTS[layout]
    parallel = dict(tp=tp, pp=pp, sp=sp, cp=2 if layout == "CP2" else 1)
    for weights, state, next_weights, next_metrics in ranks.run(world, loaded, path=untied_checkpoint, folder=folder, **parallel):
        assert state.step == 2 and state.next_prompt == 16 and state.calibration.scales.k_amax.shape == (4,)
        assert all(torch.equal(weights[name], before[name]) for name in before), "not what was saved, or what a later step made of it"
        if layout == "DP2":
            assert next_metrics == metrics and all(torch.equal(next_weights[name], after[name]) for name in after)
        else:
            assert next_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
            for name, tensor in next_weights.items():
                difference = (tensor - after[name]).abs()
                assert difference.max() < 2e-4 and difference.mean() < 1e-6, name


def chosen(rank: int, folder: Path, **options: str) -> str:
    from ais_megatron.policy.saver import checkpoint_to_resume

    try:
        return checkpoint_to_resume(folder, CheckpointConfig(**options)).name
    except ValueError as error:
        return str(error)


def test_a_damaged_checkpoint_stops_the_resume_or_is_set_aside(ranks: RankPool, tmp_path: Path) -> None:
    for step in (2, 4):
        checkpoint_at(tmp_path, step)
    (tmp_path / "step_000004" / "a.bin").write_bytes(b"Weights")
    first, second = ranks.run(2, chosen, folder=tmp_path)
    assert first == second and "step_000004/a.bin: damaged" in first
    assert "checkpoint.on_damage=previous continues from step_000002" in first
    assert ranks.run(2, chosen, folder=tmp_path, verify="size") == ["step_000004"] * 2
    assert ranks.run(2, chosen, folder=tmp_path, on_damage="previous") == ["step_000002"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000004.damaged"]
    (tmp_path / "step_000002" / "a.bin").unlink()
    assert "no checkpoint is intact" in ranks.run(1, chosen, folder=tmp_path, on_damage="previous")[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB, less than a checkpoint and more than what the first rank writes before the shards."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def save_on(rank: int, path: Path, folder: Path, unforeseen: bool, is_async: bool) -> str:
    from ais_megatron.policy import checkpoint
    from ais_megatron.policy.training_state import TrainingState

    policy = make_policy(make_config(path), path)
    policy.calibrate(my_rows(make_batch())[0])
    original = checkpoint._check_room
    if unforeseen:
        checkpoint._check_room = lambda *_: None
    saver = make_saver(policy, folder, async_save=is_async)
    try:
        saver.save(TrainingState(step=4))
        saver.finish()
    except RuntimeError as error:
        return str(error)
    finally:
        checkpoint._check_room = original
    return "saved"


@pytest.mark.parametrize(("unforeseen", "is_async"), [(False, False), (True, False), (True, True)])
def test_a_full_disk_is_one_error_and_costs_no_checkpoint(
    ranks: RankPool, untied_checkpoint: Path, small_disk: Path, unforeseen: bool, is_async: bool
) -> None:
    old = checkpoint_at(small_disk, 2)
    for message in ranks.run(2, save_on, path=untied_checkpoint, folder=small_disk, unforeseen=unforeseen, is_async=is_async):
        expected = "could not be written" if unforeseen else "the checkpoint needs about"
        assert expected in message and ("is the disk full?" in message or "MiB left" in message), message
    files.verify(old, checksums=True)
    assert list(small_disk.iterdir()) == [old]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["async", "moe-lagged"])
def test_a_resumed_run_is_the_run_that_never_stopped(ranks: RankPool, tmp_path: Path, case: str) -> None:
    """Every row after the resume, to the last bit, and none twice though the last line was torn."""
    data = small(tmp_path, **SMALL, checkpoint={"every": 1, "keep": 9, "async_save": True})
    data["train"] |= {"steps": 4}
    if case == "moe-lagged":  # the load-balancing loss reads where the previous batch's tokens went
        data["model"]["architecture"] |= dict(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
        data |= {"parallel": {"dp": 2, "ep": 2}, "ais": {"lag": 1, "alpha_min": 0.1}, "moe": {"aux_coefficient": 1.0}}
    ranks.run(2, trained, config=build_config(data))
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [files.step_of(folder) for folder in files.complete_checkpoints(checkpoints)] == [1, 2, 3, 4]
    again = tmp_path / "again"
    again.mkdir()
    (tmp_path / "run").rename(again / "run")
    whole = tmp_path / "whole"
    (whole / "run").mkdir(parents=True)
    (whole / "run" / "metrics.jsonl").write_bytes((again / "run" / "metrics.jsonl").read_bytes())
    for step in (3, 4):
        folder = files.folder_of(again / "run" / "checkpoints", step)
        folder.rename(folder.with_name(folder.name + files.PARTIAL))
    lines = (again / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (again / "run" / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    data["run"] = {"dir": str(again / "run"), "resume": True}
    ranks.run(2, trained, config=build_config(data))
    assert [row["step"] for row in rows_of(again)] == [1, 2, 3, 4]
    assert_same_rows(again, whole)
