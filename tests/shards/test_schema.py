"""The format's own checks: snapshots, indices and tables that are missing, changed or of another version."""

from __future__ import annotations

import json

import pytest

from shards.schema import (
    DUPLICATES_SCHEMA,
    FORMAT_VERSION,
    Counts,
    ShardInfo,
    Snapshot,
    index_path,
    load_snapshot,
    read_exclusions,
    read_index,
    read_table,
    write_snapshot,
)
from shards.support.errors import DataError, FrepaError


def snapshot(size: int = 64) -> Snapshot:
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
    )


def assert_refused(root, *words: str, digest: str | None = None) -> None:
    with pytest.raises(DataError) as caught:
        load_snapshot(root, digest)
    for word in words:
        assert word in str(caught.value)


def test_the_last_snapshot_is_current_and_earlier_ones_stay(tmp_path):
    first, second = write_snapshot(tmp_path, snapshot(64)), write_snapshot(tmp_path, snapshot(96))
    assert load_snapshot(tmp_path) == snapshot(96)
    assert load_snapshot(tmp_path, first) == snapshot(64)
    assert first != second
    assert snapshot(64).hash == first
    assert len(first) == 16


def test_no_dataset(tmp_path):
    assert_refused(tmp_path, "frepa shards build")
    write_snapshot(tmp_path, snapshot())
    assert_refused(tmp_path, "frepa shards build", digest="0" * 16)


def test_another_format_version(tmp_path):
    write_snapshot(tmp_path, snapshot())
    (tmp_path / "dataset.json").write_text(
        json.dumps({"format_version": FORMAT_VERSION + 1, "snapshot": "x"})
    )
    assert_refused(tmp_path, f"version {FORMAT_VERSION + 1}", f"allowed: {FORMAT_VERSION}")


def test_a_changed_snapshot(tmp_path):
    path = tmp_path / "snapshots" / f"{write_snapshot(tmp_path, snapshot())}.json"
    text = path.read_text()
    path.write_text(text.replace('"size": 64', '"size": 65'))
    assert_refused(tmp_path, "changed after it was written")
    path.write_text(text.replace('"size": 64', '"size": "large"'))
    assert_refused(tmp_path, "damaged")
    path.write_text(text[:-9])
    assert_refused(tmp_path, "not valid JSON")


def test_shard_paths_cannot_leave_the_dataset():
    facts = {"modality": "ct", "source": "a", "num_samples": 1, "num_bytes": 1, "index_crc32c": 0}
    ShardInfo(path="ct/a-000000.tar", **facts)
    for path in (
        "../ct/a-000000.tar",
        "/ct/a-000000.tar",
        "ct/../a-000000.tar",
        "ct/a-0.tar",
        "ct/a-000000.tar\n",
    ):
        with pytest.raises(ValueError, match="path"):
            ShardInfo(path=path, **facts)


def test_counts_close():
    assert Counts(objects=1, units=4, samples=1, quarantined=1, excluded=1, duplicates=1).is_closed
    assert not Counts(units=2, samples=1).is_closed
    assert Counts(units=2) + Counts(units=3, samples=1) == Counts(units=5, samples=1)


def test_index_is_checked_against_the_snapshot(tmp_path, write_dataset):
    write_dataset(tmp_path, {"fundus": [4]}, duplicates=(2,))
    shard = load_snapshot(tmp_path).shards[0]
    table = read_index(tmp_path, shard, ["key", "object"])
    assert table.column_names == ["key", "object"]
    assert table.num_rows == 4
    assert read_exclusions(tmp_path) == {table["key"][2].as_py()}

    path = index_path(tmp_path, shard.path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="not the one in the snapshot"):
        read_index(tmp_path, shard)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_index(tmp_path, shard)


def test_tables_are_checked(tmp_path):
    assert read_exclusions(tmp_path) == set()
    (tmp_path / "duplicates.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(FrepaError, match="cannot be read as parquet"):
        read_table(tmp_path / "duplicates.parquet", DUPLICATES_SCHEMA)
