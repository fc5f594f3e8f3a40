"""Another version of the HF tokens: beside the shards, complete, the same bytes however it came about."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from shards.audit.rehf import rehf_dataset
from shards.audit.verify import verify_dataset
from shards.builder.members import decode_npy, decode_stored, read_member
from shards.dataset import load_snapshot, read_hf_index, read_index
from shards.hf.tokens import HFParams, hf_token_indices
from shards.read.order import OrderConfig
from shards.read.reader import ShardReader
from shards.read.stream import SampleStream, StreamConfig
from shards.schema import hf_tar_path, index_path
from shards.stores.store import BUILD_LOCK, LocalStore
from shards.support.errors import ConfigError, DataError, EnvironmentFault
from tests.shards.images import read_tree
from tests.shards.whole import HF, change_snapshot, change_tar, write_whole

OTHER = HFParams(fov="none", cutoff_cycles=20)


@pytest.fixture
def root(tmp_path):
    write_whole(tmp_path / "root")
    return tmp_path / "root"


def test_version_is_what_the_parameters_give(root):
    before, files = load_snapshot(root), read_tree(root)
    report = rehf_dataset(root, "fundus", OTHER, jobs=1)
    after = load_snapshot(root)
    assert report.snapshot == after.hash != before.hash
    assert (report.num_shards, report.num_written, report.num_reused) == (2, 2, 0)
    assert after.hf_versions == {"fundus": {OTHER.digest(): OTHER.model_dump(mode="json")}}
    changed = {path for path, data in read_tree(root).items() if files.get(path) != data} - {BUILD_LOCK}
    tars = {hf_tar_path(f"fundus/tiny-00000{number}.tar", OTHER.digest()) for number in (0, 1)}
    assert changed == {"dataset.json", f"snapshots/{after.hash}.json", *tars, *map(index_path, tars)}
    store = LocalStore(root)
    for shard in after.shards:
        assert set(shard.hf) == ({OTHER.digest()} if shard.modality == "fundus" else set())
        if shard.modality != "fundus":
            continue
        rows = read_index(root, shard).to_pylist()
        versions = read_hf_index(root, shard, OTHER.digest()).to_pylist()
        for row, version in zip(rows, versions, strict=True):
            image = read_member(store, shard.path, row, "image")
            pixels = decode_stored(image, row["image_ext"], row["dtype"])
            tokens = decode_npy(read_member(store, hf_tar_path(shard.path, OTHER.digest()), version, "hf"))
            assert np.array_equal(tokens, hf_token_indices(pixels, 16, 1.0, OTHER))
            assert not np.array_equal(tokens, decode_npy(read_member(store, shard.path, row, "hf")))
    assert verify_dataset(root, deep=True, jobs=1).ok
    assert verify_dataset(root, deep=True, jobs=1, snapshot=before.hash).ok


def test_a_reader_picks_the_version(root):
    rehf_dataset(root, "ct", OTHER, jobs=1)
    snapshot = load_snapshot(root)
    one = ShardReader(root, snapshot).read(0, 0)
    two = ShardReader(root, snapshot, {"ct": OTHER.digest()}).read(0, 0)
    assert np.array_equal(one.image, two.image)
    assert not np.array_equal(one.hf_map, two.hf_map)


def test_a_stream_picks_the_version(root):
    rehf_dataset(root, "fundus", OTHER, jobs=1)

    def read(**options):
        config = StreamConfig(root=root, image_size=48, hf_keep=0.5, augment=False, **options)
        stream = SampleStream(config, OrderConfig(global_batch_size=2), 0, 1, 2)
        batches = [micro for batch in stream.batches(0) for micro in batch]
        tokens = [batch["hf_indices"].tolist() for batch in batches]
        return [key for batch in batches for key in batch["key"]], [row for rows in tokens for row in rows]

    keys, plain = read()
    assert read(hf_digests={"fundus": HF.digest()}) == (keys, plain)
    same, other = read(hf_digests={"fundus": OTHER.digest()})
    assert same == keys
    is_fundus = [key in _keys(root, "fundus") for key in keys]
    changed = [a != b for a, b in zip(plain, other, strict=True)]
    assert any(changed)
    assert not any(changed[i] for i in range(len(keys)) if not is_fundus[i])


def _keys(root, modality):
    shards = [shard for shard in load_snapshot(root).shards if shard.modality == modality]
    return {key for shard in shards for key in read_index(root, shard, ["key"])["key"].to_pylist()}


def test_again_and_in_parallel_is_the_same(root, tmp_path):
    other = shutil.copytree(root, tmp_path / "other")
    first = rehf_dataset(root, "fundus", OTHER, jobs=1)
    files = read_tree(root)
    again = rehf_dataset(root, "fundus", OTHER, jobs=1)
    assert (again.snapshot, again.num_written, again.num_bytes) == (first.snapshot, 0, first.num_bytes)
    assert "nothing to do" in "\n".join(again.lines())
    assert read_tree(root) == files
    rehf_dataset(other, "fundus", OTHER, jobs=2)
    assert read_tree(other) == files


def test_interrupted_it_goes_on(root, tmp_path, monkeypatch):
    other = shutil.copytree(root, tmp_path / "other")
    rehf_dataset(other, "fundus", OTHER, jobs=1)
    write, num_written = LocalStore.write, 0

    def fail_late(self, path, data):
        nonlocal num_written
        num_written += 1
        if num_written == 2:
            raise EnvironmentFault("disk full", where=path)
        write(self, path, data)

    monkeypatch.setattr(LocalStore, "write", fail_late)
    before = load_snapshot(root)
    with pytest.raises(EnvironmentFault):
        rehf_dataset(root, "fundus", OTHER, jobs=1)
    assert load_snapshot(root) == before
    assert verify_dataset(root, jobs=1).ok
    monkeypatch.undo()
    report = rehf_dataset(root, "fundus", OTHER, jobs=1)
    assert (report.num_written, report.num_reused) == (1, 1)
    assert read_tree(root) == read_tree(other)


def test_what_was_left_of_other_shards_is_written_anew(root):
    snapshot = load_snapshot(root)
    rehf_dataset(root, "ct", OTHER, jobs=1)
    files = read_tree(root)
    first, second = (hf_tar_path(f"ct/tiny-00000{number}.tar", OTHER.digest()) for number in (0, 1))
    for path in (index_path(first), first):
        shutil.copy(root / path.replace("000000", "000001"), root / path)
    change_tar(root, second, lambda data: data[:-1])
    change_snapshot(root, **{name: getattr(snapshot, name) for name in ("shards", "hf_versions")})
    report = rehf_dataset(root, "ct", OTHER, jobs=1)
    assert report.num_reused == 0
    assert read_tree(root) == files


def test_shards_that_came_later_are_completed(root):
    rehf_dataset(root, "ct", OTHER, jobs=1)
    full = load_snapshot(root)
    first = full.shards[0]
    (root / hf_tar_path(first.path, OTHER.digest())).unlink()
    change_snapshot(root, shards=[first.model_copy(update={"hf": {}}), *full.shards[1:]])
    assert verify_dataset(root, jobs=1).remark_counts["hf_incomplete"] == 1
    report = rehf_dataset(root, "ct", OTHER, jobs=1)
    assert report.num_written == 1
    assert load_snapshot(root) == full


def test_several_versions_stand_side_by_side(root):
    third = HFParams(fov="none", order=3)
    for params in (OTHER, third):
        for modality in ("ct", "fundus"):
            rehf_dataset(root, modality, params, jobs=1)
    for shard in load_snapshot(root).shards:
        assert set(shard.hf) == {OTHER.digest(), third.digest()}
    assert verify_dataset(root, deep=True, jobs=1).ok


def test_what_makes_no_sense_is_refused(root, tmp_path):
    with pytest.raises(ConfigError, match=HF.digest()):
        rehf_dataset(root, "ct", HF, jobs=1)
    with pytest.raises(ConfigError, match=r"no mri.*ct, fundus"):
        rehf_dataset(root, "mri", OTHER, jobs=1)
    with pytest.raises(DataError, match="frepa shards build"):
        rehf_dataset(tmp_path / "nothing", "ct", OTHER, jobs=1)
    assert not (tmp_path / "nothing").exists()


def test_a_damaged_image_is_named_and_nothing_is_published(root):
    before = load_snapshot(root)
    row = read_index(root, before.shards[0]).to_pylist()[1]

    def flip(data):
        data[row["image_offset"] + 9] ^= 1
        return data

    change_tar(root, before.shards[0].path, flip)
    with pytest.raises(DataError, match=row["key"]) as error:
        rehf_dataset(root, "ct", OTHER, jobs=1)
    assert "verify --deep" in str(error.value)
    assert load_snapshot(root) == before
    assert not list((root / "ct").glob("*.hf-*"))
