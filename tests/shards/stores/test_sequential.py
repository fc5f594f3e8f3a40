"""A file read from front to back."""

from __future__ import annotations

import os

import google_crc32c
import pytest

from shards.stores.sequential import SequentialReader
from shards.stores.store import LocalStore, MissingFile


def test_sequential_reader(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.stores.sequential.PIECE_BYTES", 7)
    data = os.urandom(100)
    (tmp_path / "file").write_bytes(data)
    reader = SequentialReader(LocalStore(tmp_path), "file", 100)
    assert reader.take(20) == data[:20]
    reader.skip(33)
    assert reader.position == 53
    assert reader.take(0) == b""
    assert reader.take(10) == data[53:63]
    assert b"".join(reader.pieces()) == data[63:]
    assert reader.take(1) == b""
    assert reader.finish() == google_crc32c.value(data)
    assert SequentialReader(LocalStore(tmp_path), "file", 120).take(200) == data
    with pytest.raises(MissingFile):
        SequentialReader(LocalStore(tmp_path), "none", 1).take(1)
