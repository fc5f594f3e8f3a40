"""Datasets joined: every byte as it was, every pixel once, and nothing half-done."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pyarrow as pa
import pytest

from shards.audit.merge import merge_datasets
from shards.audit.merge_shards import parse_hashes
from shards.audit.rehf import rehf_dataset
from shards.audit.verify import verify_dataset
from shards.dataset import load_snapshot, read_index, read_table
from shards.hf.tokens import HFParams
from shards.stores.store import LocalStore, lock_folder
from shards.support.errors import ConfigError, DataError, EnvironmentFault
from tests.shards.images import read_tree
from tests.shards.whole import change_snapshot, change_tar, make_key, write_whole

OTHER = HFParams(fov="none", cutoff_cycles=20)


@pytest.fixture
def places(tmp_path):
    """Two datasets; the second one repeats pictures 9 to 14 of fundus under other keys, and has new ones."""
    one, two = tmp_path / "one", tmp_path / "two"
    write_whole(one)
    write_whole(two, modalities=("fundus", "mri"), source="other", first=9, num_samples=4, salt="pepper")
    return one, two


def merge(sources, dest, **options):
    return merge_datasets(sources, dest, jobs=1, **options)


def files_of(root, prefix=""):
    return {path: data for path, data in read_tree(root).items() if path.endswith((".tar", ".index.parquet"))}


def test_union_is_whole_and_its_shards_are_copies(places, tmp_path):
    dest = tmp_path / "dest"
    report = merge(places, dest)
    assert files_of(dest) == files_of(places[0]) | files_of(places[1])
    for snapshot in (load_snapshot(dest), load_snapshot(dest, report.snapshot)):
        assert snapshot.modalities == ["ct", "fundus", "mri"]
        assert [build.modality + build.source for build in snapshot.builds] == [
            "cttiny",
            "fundustiny",
            "fundusother",
            "mriother",
        ]
    assert verify_dataset(dest, deep=True, jobs=1).ok
    assert report.num_copied == 8
    assert report.added[f"{places[1]}:mri/other"] == 8
    assert any("salts" in note for note in report.notes)
    assert "8 shards copied" in "\n".join(report.lines())


def test_of_equal_pixels_the_earlier_source_stays(places, tmp_path):
    report = merge(places, tmp_path / "dest")
    snapshot = load_snapshot(tmp_path / "dest")
    # of one: pictures 9 to 13 of fundus (the sixth repeats the first); of two: 9 to 15, then 9 again
    assert report.num_duplicates == 5
    counts = {f"{build.modality}/{build.source}": build.counts for build in snapshot.builds}
    assert (counts["fundus/tiny"].samples, counts["fundus/tiny"].duplicates) == (5, 2)
    assert (counts["fundus/other"].samples, counts["fundus/other"].duplicates) == (2, 7)
    assert all(count.is_closed for count in counts.values())
    rows = read_table(tmp_path / "dest", snapshot, "duplicates").to_pylist()
    own = {row["object"]: row for row in rows if (row["modality"], row["source"]) == ("fundus", "other")}
    assert list(own) == sorted(own)
    first = make_key("salt", 9)
    assert own[0]["duplicate_of"] == first
    assert (own[0]["kind"], own[0]["shard"], own[0]["row"]) == ("pixels", "fundus/other-000000.tar", 0)
    # what repeated this one, in its own dataset, now names the one that stays
    assert own[7]["duplicate_of"] == first
    assert (own[8]["kind"], own[8]["duplicate_of"]) == ("bytes", make_key("pepper", 0))


def test_order_of_the_sources_decides(places, tmp_path):
    merge(places[::-1], tmp_path / "dest")
    snapshot = load_snapshot(tmp_path / "dest")
    counts = {f"{build.modality}/{build.source}": build.counts for build in snapshot.builds}
    assert counts["fundus/other"].samples == 7
    assert counts["fundus/tiny"].samples == 0
    assert verify_dataset(tmp_path / "dest", deep=True, jobs=1).ok


def test_into_an_existing_dataset(places, tmp_path):
    one, two = places
    together = tmp_path / "together"
    merge(places, together)
    before = load_snapshot(one)
    report = merge([two], one)
    assert report.num_copied == 4
    assert files_of(one) == files_of(together)
    assert load_snapshot(one) == load_snapshot(together)
    assert verify_dataset(one, deep=True, jobs=1, snapshot=before.hash).ok
    assert verify_dataset(one, jobs=1).remark_counts == {}


def test_again_and_in_parallel_is_the_same(places, tmp_path):
    first = merge(places, tmp_path / "dest")
    files = read_tree(tmp_path / "dest")
    again = merge(places, tmp_path / "dest")
    assert again.snapshot == first.snapshot
    assert again.num_copied == 0
    assert len(again.present) == 4
    assert read_tree(tmp_path / "dest") == files
    merge_datasets(places, tmp_path / "parallel", jobs=2)
    assert read_tree(tmp_path / "parallel") == files


@pytest.mark.parametrize("num_writes", [1, 4, 9])
def test_interrupted_it_goes_on(places, tmp_path, monkeypatch, num_writes):
    merge(places, tmp_path / "whole")
    write, count = LocalStore.write, 0

    def fail_late(self, path, data):
        nonlocal count
        count += 1
        if count == num_writes:
            raise EnvironmentFault("disk full", where=path)
        write(self, path, data)

    monkeypatch.setattr(LocalStore, "write", fail_late)
    with pytest.raises(EnvironmentFault):
        merge(places, tmp_path / "dest")
    assert not (tmp_path / "dest" / "dataset.json").exists()
    monkeypatch.undo()
    report = merge(places, tmp_path / "dest")
    assert report.num_reused == min(num_writes - 1, 8)
    assert read_tree(tmp_path / "dest") == read_tree(tmp_path / "whole")


def test_killed_it_goes_on(places, tmp_path):
    merge(places, tmp_path / "whole")
    dest = tmp_path / "dest"
    program = (
        "import sys, time; from shards.audit import merge_shards, merge\n"
        "check = merge_shards._check\n"
        "merge_shards._check = lambda *a: (time.sleep(.2), check(*a))\n"
        "merge.merge_datasets(sys.argv[2:], sys.argv[1], jobs=1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, dest, *places], env={**os.environ})
    while not list(dest.glob("*/*.index.parquet")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (dest / "dataset.json").exists()
    assert merge(places, dest).num_reused >= 1
    assert read_tree(dest) == read_tree(tmp_path / "whole")


def test_leftovers_of_something_else_are_replaced(places, tmp_path):
    merge(places, tmp_path / "whole")
    dest = tmp_path / "dest"
    path = load_snapshot(places[0]).shards[0].path
    (dest / path).parent.mkdir(parents=True)
    (dest / path).write_bytes(bytes((places[0] / path).stat().st_size))
    merge(places, dest)
    assert read_tree(dest) == read_tree(tmp_path / "whole")


def test_a_damaged_shard_is_not_copied(places, tmp_path):
    path = load_snapshot(places[1]).shards[0].path

    def flip(data):
        data[700] ^= 1
        return data

    change_tar(places[1], path, flip)
    with pytest.raises(DataError, match=f"{path}.*not the one in the snapshot"):
        merge(places, tmp_path / "dest")
    assert not (tmp_path / "dest" / path).exists()
    assert not (tmp_path / "dest" / "dataset.json").exists()
    change_tar(places[1], path, lambda data: data[:-100])
    with pytest.raises(DataError, match=path):
        merge(places, tmp_path / "dest")


def test_names_that_clash_need_another_one(tmp_path):
    one, two, dest = tmp_path / "one", tmp_path / "two", tmp_path / "dest"
    write_whole(one)
    write_whole(two, first=100, salt="pepper")
    with pytest.raises(ConfigError, match=r"ct/tiny is in .*one too.*--rename .*two:ct/tiny=NEW"):
        merge([one, two], dest)
    assert not dest.exists()
    report = merge([one, two], dest, rename={f"{two}:ct/tiny": "second", f"{two}:fundus/tiny": "second"})
    snapshot = load_snapshot(dest)
    assert {shard.path for shard in snapshot.shards} == {
        f"{modality}/{source}-00000{number}.tar"
        for modality in ("ct", "fundus")
        for source in ("tiny", "second")
        for number in (0, 1)
    }
    assert {shard.source for shard in snapshot.shards} == {"tiny", "second"}
    rows = read_table(dest, snapshot, "duplicates").to_pylist()
    assert {row["shard"] for row in rows if row["source"] == "second" and row["kind"] == "pixels"} == {
        "ct/second-000001.tar",
        "fundus/second-000001.tar",
    }
    assert verify_dataset(dest, deep=True, jobs=1).ok
    assert merge(
        [one, two], dest, rename={f"{two}:ct/tiny": "second", f"{two}:fundus/tiny": "second"}
    ).present
    assert report.snapshot == load_snapshot(dest).hash


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [("ct/tiny", "x", "no source"), ("{}:ct/none", "x", "no source"), ("{}:ct/tiny", "A b", "no name")],
)
def test_renames_that_mean_nothing(places, tmp_path, old, new, what):
    with pytest.raises(ConfigError, match=what):
        merge(places, tmp_path / "dest", rename={old.format(places[0]): new})


def test_keys_that_clash_are_refused(tmp_path):
    one, two, dest = tmp_path / "one", tmp_path / "two", tmp_path / "dest"
    write_whole(one)
    write_whole(two, source="other", first=100)
    with pytest.raises(DataError, match=r"the same key [0-9a-f]{24} and 11 more"):
        merge([one, two], dest)
    assert not (dest / "dataset.json").exists()
    assert not list(dest.glob("*/*.tar"))


def test_what_differs_is_named(places, tmp_path):
    other, grown = tmp_path / "other", tmp_path / "grown"
    write_whole(other, modalities=("ct",), source="other", salt="x", hf=OTHER)
    with pytest.raises(ConfigError, match=r"HF tokens of ct differ .*cutoff_cycles 20.0 and 13.4"):
        merge([places[0], other], tmp_path / "dest")
    write_whole(grown, modalities=("mri",), source="other", salt="x")
    change_snapshot(grown, size=512)
    with pytest.raises(ConfigError, match=r"size is 512, that of .*one is 48"):
        merge([places[0], grown], tmp_path / "dest")
    change_snapshot(grown, builds=[])
    with pytest.raises(DataError, match="no source accounts for"):
        merge([places[0], grown], tmp_path / "dest")
    with pytest.raises(ConfigError, match="one of the sources"):
        merge(places, places[0])
    with pytest.raises(DataError, match="frepa shards build"):
        merge([tmp_path / "nothing"], tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_two_writers_do_not_meet(places, tmp_path):
    with lock_folder(tmp_path / "dest"), pytest.raises(EnvironmentFault, match="another process"):
        merge(places, tmp_path / "dest")


def test_hf_versions_come_along(places, tmp_path):
    rehf_dataset(places[0], "fundus", OTHER, jobs=1)
    dest = tmp_path / "dest"
    merge(places, dest)
    assert verify_dataset(dest, deep=True, jobs=1).ok
    assert verify_dataset(dest, jobs=1).remark_counts == {"hf_incomplete": 1}
    report = rehf_dataset(dest, "fundus", OTHER, jobs=1)
    assert report.num_written == 2
    assert verify_dataset(dest, deep=True, jobs=1).remark_counts == {}


def test_patients_of_one_dataset_need_no_note(tmp_path):
    write_whole(tmp_path / "one")
    assert merge([tmp_path / "one"], tmp_path / "dest").notes == ()


def test_hashes_are_read_as_numbers(tmp_path):
    texts = ["0123456789abcdef" * 2, "f" * 32, "0" * 32]
    numbers = parse_hashes(pa.chunked_array([texts]))
    assert [f"{high:016x}{low:016x}" for high, low in numbers.tolist()] == texts
    write_whole(tmp_path / "one", modalities=("ct",))
    shard = load_snapshot(tmp_path / "one").shards[0]
    column = read_index(tmp_path / "one", shard)["pixel_hash"]
    assert parse_hashes(column).shape == (3, 2)
