"""What the format allows: paths, counts, names of tables and of further files."""

from __future__ import annotations

import pytest

from shards.schema import (
    HF_INDEX_SCHEMA,
    INDEX_SCHEMA,
    Counts,
    ShardInfo,
    TableInfo,
    hf_tar_path,
    index_path,
)

FACTS = {
    "modality": "ct",
    "source": "a",
    "num_samples": 1,
    "num_bytes": 1,
    "crc32c": 0,
    "index_crc32c": 0,
}


def test_shard_paths_cannot_leave_the_dataset():
    ShardInfo(path="ct/a-000000.tar", **FACTS)
    for path in (
        "../ct/a-000000.tar",
        "/ct/a-000000.tar",
        "ct/../a-000000.tar",
        "ct/a-0.tar",
        "ct/a-000000.tar\n",
    ):
        with pytest.raises(ValueError, match="path"):
            ShardInfo(path=path, **FACTS)
    TableInfo(path="tables/quarantine-0123abcd.parquet", num_rows=0, crc32c=1)
    for path in ("tables/../x-0123abcd.parquet", "quarantine-0123abcd.parquet", "tables/x-0123ABCD.parquet"):
        with pytest.raises(ValueError, match="path"):
            TableInfo(path=path, num_rows=0, crc32c=1)


def test_counts_close():
    assert Counts(objects=1, units=4, samples=1, quarantined=1, excluded=1, duplicates=1).is_closed
    assert not Counts(units=2, samples=1).is_closed
    assert Counts(units=2) + Counts(units=3, samples=1) == Counts(units=5, samples=1)


def test_paths_beside_a_shard():
    assert index_path("ct/a-000000.tar") == "ct/a-000000.index.parquet"
    hf = hf_tar_path("ct/a-000000.tar", "0123456789ab")
    assert hf == "ct/a-000000.hf-0123456789ab.tar"
    assert index_path(hf) == "ct/a-000000.hf-0123456789ab.index.parquet"
    with pytest.raises(ValueError, match="path"):
        ShardInfo(path=hf, **FACTS)


def test_every_member_has_a_place_and_a_checksum():
    for schema, members in ((INDEX_SCHEMA, "image hf hfmap json"), (HF_INDEX_SCHEMA, "hf hfmap")):
        for member in members.split():
            assert {f"{member}_offset", f"{member}_size", f"{member}_crc32c"} <= set(schema.names)
