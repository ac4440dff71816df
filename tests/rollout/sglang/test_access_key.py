"""The key file: made once, private, and refused when it is not."""

import os

import pytest

from ais_megatron.rollout.sglang.access_key import authorization, read_or_create_key


def test_made_once_and_private(tmp_path):
    path = tmp_path / "new" / "key"
    key = read_or_create_key(path)
    assert len(key) == 43 and path.stat().st_mode & 0o777 == 0o600
    assert read_or_create_key(path) == key
    assert os.listdir(path.parent) == ["key"]
    assert read_or_create_key(tmp_path / "other") != key


def test_who_loses_the_race_reads_the_winners_key(tmp_path, monkeypatch):
    path = tmp_path / "key"
    key = read_or_create_key(path)
    monkeypatch.setattr(type(path), "exists", lambda self: False)
    assert read_or_create_key(path) == key


@pytest.mark.parametrize(("content", "mode", "match"), [("k", 0o640, "chmod 600"), ("k", 0o604, "chmod 600"), (" \n", 0o600, "is empty")])
def test_refused(tmp_path, content, mode, match):
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(ValueError, match=f"rollout.sglang.key_file=.*{match}"):
        read_or_create_key(path)


def test_a_folder_is_no_key(tmp_path):
    tmp_path.chmod(0o700)
    with pytest.raises(ValueError, match="cannot be read or created"):
        read_or_create_key(tmp_path)


def test_header():
    assert authorization("k") == {"Authorization": "Bearer k"} and authorization(None) == {}
