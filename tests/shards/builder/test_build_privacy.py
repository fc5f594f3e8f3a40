"""Nothing private is in a dataset: no name, no path, no patient, no salt."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pyarrow.parquet as pq

from tests.shards.building import SALT, build, index_rows, known_keys, table_of
from tests.shards.images import read_tree, write_images


def private_source(tmp_path) -> Path:
    source = write_images(tmp_path / "source", [f"JaneDoe/Eye{number}.png" for number in range(3)])
    (source / "JaneDoe" / "EyeGarbage.png").write_bytes(b"garbage")
    (source / "JaneDoe" / "EyeSame.png").write_bytes((source / "JaneDoe" / "Eye0.png").read_bytes())
    return source


def test_no_name_is_in_the_dataset(tmp_path):
    source = private_source(tmp_path)
    table = tmp_path / "Doe.csv"
    rows = "".join(f"source/JaneDoe/Eye{number}.png,sick,Doe-1970\n" for number in range(3))
    table.write_text("filename,label,patient\n" + rows)
    build(source, tmp_path / "root", labels=str(table), shard_bytes=1)
    files = read_tree(tmp_path / "root")
    for name, data in files.items():
        for secret in (b"Doe", b"Eye", str(tmp_path).encode(), SALT.encode()):
            assert secret not in data, name
            assert secret not in name.encode()
    patients = {row["patient"] for row in index_rows(tmp_path / "root")}
    assert len(patients) == 1
    assert all(row["labels"] == '{"label":"sick"}' for row in index_rows(tmp_path / "root"))
    assert any(b"sick" in data for data in files.values())  # what is asked for is found by such a search


def test_parquet_holds_no_name_under_its_compression(tmp_path):
    source = private_source(tmp_path)
    build(source, tmp_path / "root")
    for path in (tmp_path / "root").rglob("*.parquet"):
        table = pq.read_table(path)
        text = repr(table.to_pylist()) + repr(table.schema.metadata)
        assert "Doe" not in text
        assert "Eye" not in text


def test_keep_names(tmp_path):
    build(private_source(tmp_path), tmp_path / "root", keep_names=True)
    shard = next((tmp_path / "root").rglob("*.tar")).read_bytes()
    (row, *_) = index_rows(tmp_path / "root")
    assert json.loads(shard[row["json_offset"] :][: row["json_size"]])["name"] == "0/JaneDoe/Eye0.png"


def test_the_state_folder_is_private_and_knows_the_names(tmp_path):
    source = private_source(tmp_path)
    build(source, tmp_path / "root")
    state = tmp_path / "root.state"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    for path in state.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    known = known_keys(tmp_path / "root")
    for row in index_rows(tmp_path / "root"):
        assert known[row["key"]]["uri"] == os.fsencode(source / "JaneDoe" / f"Eye{row['object']}.png")
        assert known[row["key"]]["reason"] == ""
    (bad,) = table_of(tmp_path / "root", "quarantine")
    assert known[bad["key"]]["uri"].endswith(b"EyeGarbage.png")
    assert known[bad["key"]]["reason"] == "not_an_image"
