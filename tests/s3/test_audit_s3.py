"""Datasets in S3 are audited, described, joined and extended like those in a folder."""

from __future__ import annotations

import pytest

from shards.audit.merge import merge_datasets
from shards.audit.rehf import rehf_dataset
from shards.audit.stats import dataset_stats
from shards.audit.verify import verify_dataset
from shards.dataset import load_snapshot, read_index
from shards.hf.tokens import HFParams
from shards.schema import hf_tar_path, index_path
from shards.stores.store import BUILD_LOCK, open_store
from shards.support.errors import DataError, EnvironmentFault
from tests.s3.proxy import ALWAYS
from tests.shards.images import read_tree
from tests.shards.whole import write_whole

OTHER = HFParams(fov="none", cutoff_cycles=20)


@pytest.fixture
def place(s3):
    write_whole(f"{s3.uri}/data")
    return f"{s3.uri}/data"


def test_verify_tells_damage_from_an_unreachable_store(s3, place, tmp_path, faults):
    folder = tmp_path / "folder"
    write_whole(folder)
    assert verify_dataset(place, deep=True, jobs=1).snapshot == verify_dataset(folder, jobs=1).snapshot
    assert verify_dataset(place, deep=True, jobs=2).ok
    shard = load_snapshot(place).shards[0]
    offset = read_index(place, shard)["image_offset"][1].as_py()
    tar = bytearray(s3.get(f"data/{shard.path}"))
    tar[offset + 5] ^= 1
    s3.put(f"data/{shard.path}", bytes(tar))
    s3.delete(f"data/{index_path(load_snapshot(place).shards[1].path)}")
    s3.put("data/ct/left.tar", b"behind")
    assert verify_dataset(place, jobs=1).counts == {"missing_file": 1}
    report = verify_dataset(place, deep=True, jobs=1)
    assert report.counts == {"missing_file": 1, "member_bytes": 1, "tar_bytes": 1}
    assert report.remark_counts == {"unnamed_file": 1}
    assert report.place == place
    faults.add("slow_down", key=r"\.parquet$", attempts=(1,))
    assert verify_dataset(place, deep=True, jobs=1) == report
    faults.clear()
    faults.add("denied", key=r"\.tar$", attempts=ALWAYS)
    with pytest.raises(EnvironmentFault):
        verify_dataset(place, deep=True, jobs=1)


def test_rehf(s3, place, tmp_path):
    write_whole(tmp_path / "folder")
    there, here = (rehf_dataset(where, "ct", OTHER, jobs=1) for where in (place, tmp_path / "folder"))
    assert there.snapshot == here.snapshot
    path = hf_tar_path("ct/tiny-000000.tar", OTHER.digest())
    assert s3.get(f"data/{path}") == (tmp_path / "folder" / path).read_bytes()
    assert rehf_dataset(place, "ct", OTHER, jobs=1).num_written == 0
    assert verify_dataset(place, deep=True, jobs=1).ok
    assert open_store(place).num_bytes(BUILD_LOCK) is None


def test_merge_both_ways(s3, place, tmp_path):
    write_whole(tmp_path / "other", source="other", first=50, salt="pepper")
    merge_datasets([tmp_path / "other", place], f"{s3.uri}/joined", jobs=1)
    merge_datasets([tmp_path / "other", place], tmp_path / "joined", jobs=1)
    here = {path: data for path, data in read_tree(tmp_path / "joined").items() if path != BUILD_LOCK}
    assert {path: s3.get(f"joined/{path}") for path in here} == here
    assert verify_dataset(f"{s3.uri}/joined", deep=True, jobs=1).ok
    report = merge_datasets([place], tmp_path / "other", jobs=1)
    assert report.num_copied == 4
    assert verify_dataset(tmp_path / "other", deep=True, jobs=1).ok


def test_merge_refuses_what_comes_damaged(s3, place):
    path = load_snapshot(place).shards[2].path
    s3.put(f"data/{path}", s3.get(f"data/{path}")[:-1] + b"\x01")
    with pytest.raises(DataError, match=path):
        merge_datasets([place], f"{s3.uri}/joined", jobs=1)
    assert s3.keys("joined/dataset.json") == []
    assert s3.keys(f"joined/{path}") == []


def test_stats(place, tmp_path):
    write_whole(tmp_path / "folder")
    there, here = dataset_stats(place, jobs=1), dataset_stats(tmp_path / "folder", jobs=1)
    assert there.lines()[1:] == here.lines()[1:]
    assert there.place == place
