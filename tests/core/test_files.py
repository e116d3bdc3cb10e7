"""Tests for atomic writes, which leave the old or the new file and nothing else, and for locks."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from trainlib.core import files
from trainlib.core.errors import UserError
from trainlib.core.files import (
    is_temporary,
    lock_folder,
    refuse_if_locked,
    release_folders,
    replacing,
    write_atomically,
)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "old\n")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old\n" and temporary.parent == tmp_path
        raise RuntimeError
    assert path.read_text() == "old\n" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, "new 小\r\n")
    assert path.read_bytes() == "new 小\r\n".encode() and list(tmp_path.iterdir()) == [path]


def test_the_temporary_path_has_the_same_suffix_as_the_file(tmp_path):
    path = tmp_path / "a.npy"
    with replacing(path) as temporary:
        np.save(temporary, np.arange(3))
        assert not path.exists()
    assert np.load(path).tolist() == [0, 1, 2] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number, held", [
    (errno.EWOULDBLOCK, True), (errno.EACCES, True), (errno.ENOLCK, False), (errno.ENOTSUP, False),
])  # fmt: skip
def test_a_file_system_without_locks_is_used_with_one_warning(
    tmp_path, monkeypatch, caplog, number, held
):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    lock_folder(tmp_path)
    release_folders()
    monkeypatch.setattr(files.fcntl, "flock", flock)
    if held:
        with pytest.raises(UserError, match="another process is training in this folder"):
            lock_folder(tmp_path)
    else:
        refuse_if_locked(tmp_path)
        lock_folder(tmp_path)
        assert caplog.text.count("has no locks") == 1
    release_folders()


def test_what_a_killed_process_leaves_is_known_by_its_name(tmp_path):
    with replacing(tmp_path / "identity.json") as temporary:
        temporary.write_text("{}")
        assert is_temporary(temporary)
    assert is_temporary(tmp_path / ".writing-step_000100")
    assert not any(
        map(is_temporary, map(Path, (".git", ".env", "identity.json", ".lock", "1.txt")))
    )
