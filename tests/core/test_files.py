"""Tests that after an atomic write, a folder has the old or the new file, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from trainlib.core.files import replacing, write_atomically


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
