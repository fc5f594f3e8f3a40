"""Reading a remote dataset, by ranges and through the cache: the same samples, no needless requests."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from shards.dataset import load_snapshot
from shards.hf.tokens import HFParams
from shards.read.access import RemoteConfig, default_cache_dir
from shards.read.reader import Sample, ShardReader
from shards.schema import hf_tar_path
from shards.stores.cache import cache_size
from shards.support.errors import DataError, EnvironmentFault
from tests.shards.remote import CountingStore

PLACES = [(2, 3), (0, 1), (1, 0), (2, 7), (3, 4), (0, 0)]


@pytest.fixture
def root(tmp_path, write_dataset) -> Path:
    root = tmp_path / "dataset"
    write_dataset(root, {"ct": [8], "fundus": [8, 9], "xray": [5]})
    return root


@pytest.fixture(params=["range", "cache"])
def remote(request, tmp_path) -> RemoteConfig:
    return RemoteConfig(request.param, tmp_path / "cache", 1 << 30)


def reader_of(root: Path, remote: RemoteConfig, **settings) -> ShardReader:
    store = CountingStore(root, **settings)
    return ShardReader(store, load_snapshot(root), remote=remote)


def assert_same(one: Sample | DataError, other: Sample | DataError) -> None:
    assert isinstance(one, Sample)
    assert isinstance(other, Sample)
    assert (one.key, one.num_bytes) == (other.key, other.num_bytes)
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_array_equal(one.hf_map, other.hf_map)


def test_the_samples_are_those_of_the_folder(root, remote):
    local, far = ShardReader(root, load_snapshot(root)), reader_of(root, remote)
    for place, sample in zip(PLACES, far.read_many(PLACES), strict=True):
        assert_same(sample, local.read(*place))
    assert far.read_bytes(1, 2) == local.read_bytes(1, 2)
    copy = pickle.loads(pickle.dumps(far))
    assert_same(copy.read(1, 5), local.read(1, 5))


def test_a_range_request_per_sample_and_an_index_per_shard(root):
    reader = reader_of(root, RemoteConfig("range"))
    for _ in range(2):
        reader.store.ranges.clear()
        assert len(list(reader.read_many(PLACES))) == 6
        assert len(reader.store.ranges) == 6
    assert sorted(reader.store.whole.values()) == [1] * 4
    samples = reader.read(0, 2)
    (_, _, size) = reader.store.ranges[-1]
    assert samples.num_bytes < size < samples.num_bytes + 4096  # the ranks and two tar headers lie between


def test_ranges_of_a_micro_batch_are_asked_for_side_by_side(root):
    reader = reader_of(root, RemoteConfig("range"), delay_seconds=0.05)
    list(reader.read_many([(0, 0), (1, 0), (2, 0), (3, 0)]))
    start = time.monotonic()
    list(reader.read_many(PLACES * 2))
    assert time.monotonic() - start < 6 * 0.05
    assert 8 <= reader.store.most_at_once <= 16


def test_an_unreachable_store_is_no_bad_sample(root, remote):
    reader = reader_of(root, remote)
    list(reader.read_many([(0, 0)]))
    reader.store.fails = len(reader.store.ranges)
    with pytest.raises(EnvironmentFault, match="the server is gone"):
        list(reader.read_many([(1, 0), (2, 0)]))


def test_damage_costs_the_samples_that_it_lies_in(root, remote):
    """The same ones as in a folder, whichever way they are read."""
    snapshot = load_snapshot(root)
    shard = root / snapshot.shards[1].path
    size = shard.stat().st_size
    os.truncate(shard, size // 2)
    (root / snapshot.shards[3].path).unlink()
    places = [(1, row) for row in range(8)] + [(3, 0), (2, 1)]
    far = list(reader_of(root, remote).read_many(places))
    near = list(ShardReader(root, snapshot).read_many(places))
    kinds = [type(sample) for sample in near]
    assert kinds.count(DataError) >= 4
    assert kinds.count(Sample) >= 3
    for one, other in zip(far, near, strict=True):
        if isinstance(other, Sample):
            assert_same(one, other)
        else:
            assert isinstance(one, DataError)
            assert one.what == other.what


def test_a_version_of_hf_tokens_comes_from_its_own_tar(root, remote, write_hf_version):
    params = HFParams(fov="none", cutoff_cycles=3.0)
    snapshot = write_hf_version(root, "fundus", params)
    digests = {"fundus": params.digest()}
    far = ShardReader(CountingStore(root), snapshot, digests, remote)
    near = ShardReader(root, snapshot, digests)
    for place, sample in zip(PLACES, far.read_many(PLACES), strict=True):
        assert_same(sample, near.read(*place))
    path = hf_tar_path(snapshot.shards[1].path, params.digest())
    if remote.mode == "range":
        assert [p for p, _, _ in far.store.ranges].count(path) == 1
        assert len(far.store.ranges) == 6 + 3


class TestCache:
    @pytest.fixture
    def config(self, tmp_path) -> RemoteConfig:
        return RemoteConfig("cache", tmp_path / "cache", 1 << 30)

    def test_a_shard_is_fetched_once(self, root, config):
        reader = reader_of(root, config)
        list(reader.read_many(PLACES))
        num = len(reader.store.ranges) + sum(reader.store.whole.values())
        for _ in range(3):
            list(reader.read_many(PLACES))
        again = reader_of(root, config)  # another process of this machine
        list(again.read_many(PLACES))
        assert len(reader.store.ranges) + sum(reader.store.whole.values()) == num
        assert again.store.ranges == []
        assert not any(path.endswith(".tar") for path in again.store.whole)
        num_shards = len({shard for shard, _ in PLACES})
        assert reader.take_requests() == (3 * num_shards, num_shards), "hits and misses"
        assert again.take_requests() == (num_shards, 0)
        assert again.take_requests() == (0, 0)
        entries = [path.stat().st_size for path in config.cache_dir.glob("*.tar")]
        assert cache_size(config.cache_dir) == sum(entries) > 0
        assert cache_size(config.cache_dir / "none") == 0

    def test_prefetched_shards_wait_on_the_disk(self, root, config):
        reader = reader_of(root, config)
        reader.prefetch([1, 2])
        paths = [reader.snapshot.shards[shard].path for shard in (1, 2)]
        deadline = time.monotonic() + 10
        while not all(self.is_cached(reader, shard) for shard in (1, 2)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        reader.store.ranges.clear()
        reader.store.whole.clear()
        list(reader.read_many([(1, 0), (2, 4)]))
        assert reader.take_requests() == (2, 0), "to get them ahead was no request"
        assert not any(path in reader.store.whole for path in paths)
        assert reader.store.ranges == []

    @staticmethod
    def is_cached(reader: ShardReader, shard: int) -> bool:
        file = reader.snapshot.shards[shard]
        entries = reader._remote.cache_dir.glob(f"*-{file.num_bytes}-{Path(file.path).name}")
        return any(entries)  # one that is still being downloaded ends in another name

    def test_a_prefetch_that_fails_is_no_error_yet(self, root, config):
        reader = reader_of(root, config)
        (root / reader.snapshot.shards[1].path).unlink()
        reader.prefetch([1, 2])
        deadline = time.monotonic() + 10
        while not self.is_cached(reader, 2):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(DataError, match="no such file"):
            reader.read(1, 0)

    def test_no_file_stays_open(self, root, config):
        def num_open() -> int:
            held = []
            for fd in os.listdir("/proc/self/fd"):
                with contextlib.suppress(FileNotFoundError):  # a thread closed it meanwhile
                    held.append(os.readlink(f"/proc/self/fd/{fd}"))
            return sum(str(config.cache_dir) in path and ".lock" not in path for path in held)

        reader = reader_of(root, config)
        samples = reader.read_many(PLACES)
        next(samples)
        assert num_open() > 0
        samples.close()
        assert num_open() == 0
        list(reader.read_many(PLACES))
        assert num_open() == 0
        (root / reader.snapshot.shards[1].path).unlink()
        with pytest.raises(DataError):
            reader_of(root, config._replace(cache_dir=config.cache_dir / "other")).read(1, 0)
        assert num_open() == 0

    def test_a_copy_that_went_bad_is_read_past(self, root, config):
        reader = reader_of(root, config)
        expected = reader.read(1, 0)
        size = reader.snapshot.shards[1].num_bytes
        for path in config.cache_dir.rglob("*"):
            if path.is_file() and path.stat().st_size == size:
                path.chmod(0o600)
                path.write_bytes(bytes(size))
        assert_same(reader_of(root, config).read(1, 0), expected)

    def test_a_bad_sector_under_a_copy_is_read_past(self, root, config, monkeypatch):
        reader = reader_of(root, config)
        expected = reader.read(1, 0)
        reader.store.ranges.clear()
        read = os.pread

        def fail_in_the_cache(descriptor, *span):
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(config.cache_dir)):
                raise OSError(errno.EIO, "Input/output error")
            return read(descriptor, *span)

        monkeypatch.setattr(os, "pread", fail_in_the_cache)
        assert_same(reader.read(1, 0), expected)
        assert len(reader.store.ranges) == 1


def test_where_the_cache_is_when_nobody_says_it(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert default_cache_dir() == tmp_path / f"frepa-shards-{os.getuid()}"
