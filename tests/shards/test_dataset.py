"""Reading and writing of a dataset's parts: missing, changed, damaged or of another version."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from shards.dataset import (
    check_current,
    file_crc32c,
    has_dataset,
    load_snapshot,
    read_index,
    read_table,
    write_snapshot,
    write_table,
)
from shards.schema import DUPLICATES_SCHEMA, FORMAT_VERSION, QUARANTINE_SCHEMA, Counts, Snapshot, index_path
from shards.stores.store import LocalStore, MissingFile, Store
from shards.support.errors import DataError, EnvironmentFault


@pytest.fixture
def store(tmp_path) -> Store:
    return LocalStore(tmp_path)


def snapshot(store: Store, size: int = 64) -> Snapshot:
    return Snapshot(
        created_by="frepa 0",
        modalities=[],
        shards=[],
        hf={},
        hf_digests={},
        size=size,
        patch_size=16,
        map_cell=4,
        counts=Counts(),
        builds=[],
        tables={
            "quarantine": write_table(store, "quarantine", QUARANTINE_SCHEMA.empty_table()),
            "duplicates": write_table(store, "duplicates", DUPLICATES_SCHEMA.empty_table()),
        },
    )


def assert_refused(store, *words: str, digest: str | None = None) -> None:
    with pytest.raises(DataError) as caught:
        load_snapshot(store, digest)
    for word in words:
        assert word in str(caught.value)


def test_the_last_snapshot_is_current_and_earlier_ones_stay(store, tmp_path):
    one, two = snapshot(store, 64), snapshot(store, 96)
    first = write_snapshot(store, one, None)
    second = write_snapshot(store, two, one)
    assert load_snapshot(tmp_path) == load_snapshot(str(tmp_path)) == two
    assert load_snapshot(store, first) == one
    assert first != second
    assert one.hash == first
    assert len(first) == 16
    assert write_snapshot(store, two, two) == second


def test_a_faster_writer_wins(store):
    one, two, three = (snapshot(store, size) for size in (64, 96, 128))
    write_snapshot(store, one, None)
    write_snapshot(store, two, one)
    for before in (one, None):
        with pytest.raises(EnvironmentFault, match="another program has written"):
            write_snapshot(store, three, before)
    assert load_snapshot(store) == two


def test_a_snapshot_that_is_current_no_more(store):
    one, two = snapshot(store, 64), snapshot(store, 96)
    check_current(store, None)
    write_snapshot(store, one, None)
    check_current(store, one)
    write_snapshot(store, two, one)
    for before in (one, None):
        with pytest.raises(EnvironmentFault, match="another program has written"):
            check_current(store, before)


def test_no_dataset(store):
    assert not has_dataset(store)
    assert_refused(store, "frepa shards build")
    write_snapshot(store, snapshot(store), None)
    assert has_dataset(store)
    assert_refused(store, "frepa shards build", digest="0" * 16)


def test_another_format_version(store, tmp_path):
    write_snapshot(store, snapshot(store), None)
    (tmp_path / "dataset.json").write_text(
        json.dumps({"format_version": FORMAT_VERSION + 1, "snapshot": "x"})
    )
    assert_refused(store, f"version {FORMAT_VERSION + 1}", f"allowed: {FORMAT_VERSION}")


def test_a_changed_snapshot(store, tmp_path):
    path = tmp_path / "snapshots" / f"{write_snapshot(store, snapshot(store), None)}.json"
    text = path.read_text()
    path.write_text(text.replace('"size": 64', '"size": 65'))
    assert_refused(store, "changed after it was written")
    path.write_text(text.replace('"size": 64', '"size": "large"'))
    assert_refused(store, "damaged")
    path.write_text(text[:-9])
    assert_refused(store, "not valid JSON")


def test_an_index_is_checked_against_the_snapshot(tmp_path, write_dataset):
    write_dataset(tmp_path, {"fundus": [4]})
    shard = load_snapshot(tmp_path).shards[0]
    table = read_index(tmp_path, shard, ["key", "object"])
    assert table.column_names == ["key", "object"]
    assert table.num_rows == 4
    path = tmp_path / index_path(shard.path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="not the one in the snapshot"):
        read_index(tmp_path, shard)
    path.unlink()
    with pytest.raises(MissingFile, match="no such file"):
        read_index(tmp_path, shard)


def test_a_table_is_checked_against_the_snapshot(store, tmp_path):
    rows = {"key": ["k"], "modality": ["ct"], "source": ["a"], "object": [0], "unit": [0]}
    rows |= {"status": ["quarantined"], "reason": ["flat"]}
    table = pa.table(rows, schema=QUARANTINE_SCHEMA)
    info = write_table(store, "quarantine", table)
    assert write_table(store, "quarantine", table) == info
    one = snapshot(store)
    one = one.model_copy(update={"tables": {**one.tables, "quarantine": info}})
    assert read_table(store, one, "quarantine").equals(table)
    data = bytearray((tmp_path / info.path).read_bytes())
    data[-20] ^= 1
    (tmp_path / info.path).write_bytes(data)
    with pytest.raises(DataError, match="not the one in the snapshot"):
        read_table(store, one, "quarantine")
    swapped = one.model_copy(update={"tables": {"quarantine": one.tables["duplicates"]}})
    with pytest.raises(DataError, match="not the columns"):
        read_table(store, swapped, "quarantine")


def test_the_checksum_of_a_file(store, tmp_path):
    with store.writing("x") as file:
        file.write(b"123456789")
        assert file_crc32c(file) == 0xE3069283  # the check value of CRC-32C
