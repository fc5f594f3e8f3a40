"""Files appear whole or not at all."""

from __future__ import annotations

import stat

import pytest

from shards.stores.atomic import replace_file
from shards.support.errors import EnvironmentFault


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "file"
    with replace_file(path, mode=0o600) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half() -> None:
        with replace_file(path) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written(tmp_path):
    with (
        pytest.raises(EnvironmentFault, match=r"missing/file: cannot be written"),
        replace_file(tmp_path / "missing" / "file"),
    ):
        pytest.fail("there is no such folder")
