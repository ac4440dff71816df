"""The run folder: what it records, what it refuses, and that files are replaced whole."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ais_megatron.config import Config, ConfigError, build_config, dump_config, load_config
from ais_megatron.runs import folder as run_folder
from ais_megatron.runs.folder import (
    check_export_folder,
    check_output_file,
    check_run_folder,
    encode_json,
    git_revision,
    open_run_folder,
    package_versions,
    write_json_atomic,
    write_text_atomic,
)
from tests.helpers.batches import ARCHITECTURE


def make_config(folder, resume: bool = False, lr: float = 1e-6) -> Config:
    return build_config(
        {
            "run": {"dir": str(folder), "resume": resume},
            "model": {"architecture": ARCHITECTURE},
            "train": {"optimizer": {"lr": lr}},
        }
    )


def test_config_yaml_loads_back_equal(tmp_path):
    config = make_config(tmp_path / "runs" / "a: #1", lr=3.3e-7)  # a folder name that YAML must quote
    folder = open_run_folder(config, is_main=True)
    assert folder == tmp_path / "runs" / "a: #1"
    assert [entry.name for entry in folder.iterdir()] == ["config.yaml"]
    assert load_config(folder / "config.yaml") == config


def test_config_yaml_opens_with_date_revision_and_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "git_revision", lambda: "abc123+dirty")
    monkeypatch.setattr(run_folder, "package_versions", lambda: {"python": "3.11.7", "torch": "2.0"})
    open_run_folder(make_config(tmp_path), is_main=True)
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    assert lines[0].startswith("# date: 20") and lines[0].endswith("+00:00")
    assert lines[1:5] == ["# git revision: abc123+dirty", "# python: 3.11.7", "# torch: 2.0", "run:"]


def test_an_earlier_run_is_refused_and_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="choose another run.dir, delete this folder, or set run.resume=true"):
        open_run_folder(make_config(tmp_path), is_main=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_keeps_an_earlier_record_that_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "git_revision", lambda: "abc")
    first = make_config(tmp_path, resume=True, lr=1e-6)
    open_run_folder(first, is_main=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    original = (tmp_path / "config.yaml").read_text()
    open_run_folder(first, is_main=True)  # the same again: nothing changes, not even the date
    assert (tmp_path / "config.yaml").read_text() == original
    second = make_config(tmp_path, resume=True, lr=2e-6)
    open_run_folder(second, is_main=True)
    open_run_folder(first, is_main=True)
    assert (tmp_path / "config.1.yaml").read_text() == original
    assert load_config(tmp_path / "config.2.yaml") == second
    assert load_config(tmp_path / "config.yaml") == first


def test_other_ranks_neither_look_nor_write(tmp_path):
    assert open_run_folder(make_config(tmp_path / "new"), is_main=False) == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    (tmp_path / "metrics.jsonl").write_text("")
    assert open_run_folder(make_config(tmp_path), is_main=False) == tmp_path


def test_a_file_in_the_way_is_a_config_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="cannot be used as a run folder"):
        open_run_folder(make_config(tmp_path / "taken"), is_main=True)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("taken", "cannot be used as a run folder .*taken is not a folder.; choose another run.dir"),
        ("taken/below/it", "cannot be used as a run folder .*taken is not a folder.; choose another run.dir"),
        ("dangling", "cannot be used as a run folder .*dangling is not a folder.; choose another run.dir"),
        ("/proc/run", "cannot be used as a run folder .no file can be created in /proc: .*; choose another run.dir"),  # not even by root
        ("n" * 300, "cannot be used as a run folder .*too long"),
        ("earlier", "already holds a run .metrics.jsonl.; choose another run.dir, delete this folder, or set run.resume=true"),
    ],
)
def test_what_cannot_be_a_run_folder_is_refused_and_left_alone(tmp_path, place, message):
    (tmp_path / "taken").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "metrics.jsonl").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for refuse in (check_run_folder, lambda config: open_run_folder(config, is_main=True)):
        with pytest.raises(ConfigError, match=f"^run.dir=.*: {message}"):
            refuse(make_config(tmp_path / place))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write in any folder")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="no file can be created in .*: Permission denied"):
        check_run_folder(make_config(tmp_path / "run"))


def test_what_can_be_a_run_folder_is_not_made_by_looking(tmp_path):
    check_run_folder(make_config(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "metrics.jsonl").write_text("")
    check_run_folder(make_config(tmp_path, resume=True))


@pytest.mark.parametrize("place", ["taken", "earlier"])
def test_train_refuses_a_run_folder_before_it_imports_torch_or_starts_ranks(tmp_path, place):
    """Starting ranks imports torch too, so its absence shows that none was started."""
    (tmp_path / "taken").write_text("")
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "metrics.jsonl").write_text("")
    (tmp_path / "c.yaml").write_text(dump_config(make_config(tmp_path / place)))
    code = (
        "import pathlib, sys; from ais_megatron.cli import train\n"
        "try: train(pathlib.Path(sys.argv[1]), ['parallel.dp=2'])\n"
        "except ValueError as error: print(error)\n"
        "sys.exit('torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "SLURM_"))}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "c.yaml"], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0 and done.stdout.startswith(f"run.dir={tmp_path / place}: "), done.stdout + done.stderr


def test_a_place_for_an_export(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "empty").mkdir()
    check_export_folder(tmp_path / "empty")
    check_export_folder(tmp_path / "new" / "below")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    with pytest.raises(ConfigError, match="OUT=.*full: exists and is not empty; choose another folder"):
        check_export_folder(tmp_path / "full")
    with pytest.raises(ConfigError, match="OUT=.*file: cannot be written .*file is not a folder.; choose another folder"):
        check_export_folder(tmp_path / "full" / "file")
    with pytest.raises(ConfigError, match="OUT=/proc/hf: cannot be written .no file can be created in /proc.*; choose another folder"):
        check_export_folder(Path("/proc/hf"))


def test_a_figure_that_could_not_be_written_is_refused_beforehand(tmp_path: Path) -> None:
    check_output_file("--out", tmp_path / "new" / "figure.json")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="--out=.*: is a folder; name a file"):
        check_output_file("--out", tmp_path)
    with pytest.raises(ConfigError, match="--out=/proc/figure.json: cannot be written"):
        check_output_file("--out", Path("/proc/figure.json"))


def test_export_to_a_place_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(make_config(tmp_path)))
    command = [sys.executable, "-m", "ais_megatron", "export", str(tmp_path), "/proc/hf"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: OUT=/proc/hf: cannot be written ") and done.stderr.count("\n") == 1


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_git_revision_clean_dirty_and_unknown(tmp_path):
    repository = tmp_path / "repository"
    package, installed = repository / "package", repository / "venv"
    package.mkdir(parents=True)
    installed.mkdir()
    git(repository, "init", "-q")
    (package / "a.py").write_text("x = 1\n")
    assert git_revision(package) == "unknown"  # no commit yet
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "first")
    commit = git(repository, "rev-parse", "HEAD")
    assert git_revision(package) == commit
    (repository / "notes.txt").write_text("outside the package\n")
    assert git_revision(package) == commit
    (package / "b.py").write_text("new\n")
    assert git_revision(package) == commit + "+dirty"
    (installed / "c.py").write_text("not tracked here\n")
    assert git_revision(installed) == "unknown"


def test_git_revision_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() == "unknown"


def test_package_versions_start_with_python_and_leave_out_the_absent(monkeypatch):
    monkeypatch.setattr(run_folder, "RECORDED_PACKAGES", ("pydantic", "no-such-distribution"))
    assert list(package_versions()) == ["python", "pydantic"]


def test_json_is_strict_and_exact(tmp_path):
    assert encode_json({"b": [float("nan"), 0.1 + 0.2], "a": (float("inf"), 1)}) == '{"b": [null, 0.30000000000000004], "a": [null, 1]}'
    write_json_atomic(tmp_path / "summary.json", {"x": None, "y": 1.5})
    assert (tmp_path / "summary.json").read_text() == '{\n  "x": null,\n  "y": 1.5\n}\n'


def test_writing_replaces_whole_with_ordinary_permissions(tmp_path):
    path = tmp_path / "a.txt"
    earlier_umask = os.umask(0o027)
    try:
        write_text_atomic(path, "one\r\n")
        write_text_atomic(path, "zwei ü\n")
    finally:
        os.umask(earlier_umask)
    assert path.read_bytes() == "zwei ü\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(run_folder.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
