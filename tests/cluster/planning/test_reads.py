"""What is computed from the order beside what the loader really reads, through a store that counts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cluster.planning.datasets import open_dataset
from cluster.planning.reads import (
    assumed_dataset,
    count_reads,
    fetches_of_run,
    missing_share,
    streams_by_node,
    touch_epoch,
)
from shards.read import reader
from shards.read.order import OrderConfig, plan_epoch
from shards.read.reader import ShardReader
from shards.read.stream import StreamConfig, _Requests
from shards.read.views import Views, open_snapshot
from shards.stores.store import LocalStore
from tests.cluster.planning.runs import assume, small_config

WORLD, MICRO, WORKERS = 4, 1, 2
ORDER = OrderConfig(global_batch_size=8, num_streams=4, block_shards=2, seed=5)


class CountingStore(LocalStore):
    """A folder that is read like a bucket; it notes what is asked for."""

    def __init__(self, folder) -> None:
        super().__init__(folder)
        self.asked: Counter[str] = Counter()
        self.num_bytes_read: Counter[str] = Counter()

    def local_path(self, path):
        return None

    def read(self, path):
        data = super().read(path)
        self._note(path, data)
        return data

    def read_range(self, path, offset, size):
        data = super().read_range(path, offset, size)
        self._note(path, data)
        return data

    def _note(self, path, data) -> None:
        self.asked[path] += 1
        self.num_bytes_read[path] += len(data)


def really_read(root, cache, world, workers, gpus_per_node, mode, monkeypatch):
    """Read an epoch as the loader's processes do: each its own reader, requests dealt out in turn."""
    stores = []
    monkeypatch.setattr(reader, "open_store", lambda place: stores[-1])
    config = StreamConfig(root=str(root), image_size=32, patch_size=8, remote=mode)
    snapshot = open_snapshot(config)
    dataset = open_dataset(small_config(root), assume())
    plan = plan_epoch(dataset.counts, dataset.exclusions, ORDER, 0)
    touched = np.zeros((world, len(dataset.counts)), bool)
    for rank in range(world):
        own = config.model_copy(update={"cache_dir": cache / f"node{rank // gpus_per_node}"})
        requests = _Requests(rank, world, MICRO, 0)
        requests.restart(plan, 0)
        processes = []
        for _ in range(workers):
            stores.append(CountingStore(root))
            processes.append(Views(own, snapshot, dataset.exclusions))
            assert isinstance(processes[-1].reader, ShardReader)
        for number, request in enumerate(requests):
            batch = processes[number % workers][request]
            assert batch["key"]
            touched[rank, request.slots.shard] = True
    return dataset, plan, stores, touched


def total(stores, suffix, field="asked"):
    return sum(n for store in stores for path, n in getattr(store, field).items() if path.endswith(suffix))


@pytest.mark.parametrize(("gpus_per_node", "workers"), [(1, 1), (2, 2), (4, 1)])
def test_shards_requests_and_bytes_are_those_of_the_loader(
    planned_dataset, tmp_path, monkeypatch, gpus_per_node, workers
):
    dataset, plan, stores, seen = really_read(
        planned_dataset, tmp_path, WORLD, workers, gpus_per_node, "cache", monkeypatch
    )
    touched = touch_epoch(plan, len(dataset.counts), WORLD, MICRO, workers)
    assert (touched.by_rank == seen).all()
    reads = count_reads(dataset, touched, gpus_per_node, by_range=False)
    assert reads.index_requests == total(stores, ".parquet")
    # shards of a few KB come in one part each
    assert reads.requests == total(stores, ".parquet") + total(stores, ".tar")
    assert reads.num_bytes == total(stores, ".tar", "num_bytes_read")
    per_node = workers * gpus_per_node
    for node, num_bytes in enumerate(reads.bytes_by_node):
        own = stores[node * per_node : (node + 1) * per_node]
        assert num_bytes == total(own, ".tar", "num_bytes_read")
        assert reads.shards_by_node[node] == len({path for s in own for path in s.asked if "tar" in path})
    assert reads.most_shards_of_rank == seen.sum(axis=1).max()


def test_ranges_are_a_request_for_each_sample(planned_dataset, tmp_path, monkeypatch):
    dataset, plan, stores, _ = really_read(planned_dataset, tmp_path, WORLD, WORKERS, 2, "range", monkeypatch)
    touched = touch_epoch(plan, len(dataset.counts), WORLD, MICRO, WORKERS)
    reads = count_reads(dataset, touched, 2, by_range=True)
    assert touched.num_samples == plan.num_batches * 8
    assert reads.requests == total(stores, ".tar") + total(stores, ".parquet")
    # tar headers, HF ranks and JSON are counted too; in shards of tiny images they are most of it
    measured = total(stores, ".tar", "num_bytes_read")
    assert measured < reads.num_bytes < 4 * measured


def test_a_dataset_is_what_its_snapshot_says(planned_dataset):
    dataset = open_dataset(small_config(planned_dataset), assume())
    assert dataset.is_known
    assert len(dataset.counts) > 6
    assert sum(dataset.counts) == 64
    assert dataset.num_images == 64 - 2  # an image of each modality repeats another
    assert dataset.num_bytes == sum(path.stat().st_size for path in planned_dataset.rglob("*.tar"))
    assert dataset.num_prefixes == 2


def test_an_assumed_dataset_holds_what_is_assumed():
    dataset = assumed_dataset(10_007, 1000.0, 64_000.0)
    assert (dataset.num_images, dataset.num_bytes, dataset.num_prefixes) == (10_007, 10_007_000, 1)
    assert len(dataset.counts) == 10_007 // 64 + 1
    assert not dataset.is_known


@pytest.mark.parametrize(("nodes", "streams"), [(1, 16), (2, 16), (16, 16), (64, 16), (3, 6), (4, 6)])
def test_streams_of_nodes_are_those_of_their_slots(nodes, streams):
    size = 192
    slots = np.arange(size).reshape(nodes, -1) * streams // size
    assert streams_by_node(size, streams, nodes) == [len(set(row)) for row in slots.tolist()]


def test_many_nodes_fetch_the_shards_of_a_shared_stream_each():
    """What the estimate from streams says, and what the order itself says."""
    dataset = assumed_dataset(64_000, 100.0, 10_000.0)
    config = OrderConfig(global_batch_size=64, num_streams=4)
    plan = plan_epoch(dataset.counts, {}, config, 0)
    for nodes in (2, 4, 16):
        touched = touch_epoch(plan, len(dataset.counts), nodes * 2, 1, 0)
        reads = count_reads(dataset, touched, 2, by_range=False)
        copies = sum(streams_by_node(64, 4, nodes)) / 4
        assert reads.num_bytes / dataset.num_bytes == pytest.approx(copies, rel=0.02)


def test_what_caches_save():
    assert fetches_of_run(1.0, 8.5, 100, 99, by_range=False) == 8.5  # too small
    assert fetches_of_run(1.0, 8.5, 100, 100, by_range=False) == 1
    assert fetches_of_run(0.5, 3, 100, 100, by_range=False) == pytest.approx(1 + 0.5 + 0.25)
    assert fetches_of_run(0.5, 2.5, 100, 100, by_range=True) == 2.5
    assert fetches_of_run(0.5, 0.25, 100, 100, by_range=False) == 0.25
    assert missing_share(0.25, 2, 100, 100, by_range=False) == pytest.approx(0.75**2)
