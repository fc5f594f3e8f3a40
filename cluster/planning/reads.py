"""What a run reads: shards, bytes and requests, from the order of samples, before anything is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.read.order import EpochPlan
from shards.stores.parts import PART_BYTES

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Dataset:
    """What is read, as its snapshot says or as it is assumed.

    Attributes:
        counts: samples of each shard, excluded ones counted.
        shard_bytes: of each shard's tars.
        modalities: of each shard; empty where they are not known.
        exclusions: shard -> rows that are not read.
        is_known: whether a snapshot says so.
        source: where it is from.
    """

    counts: Sequence[int]
    shard_bytes: Sequence[int]
    modalities: Sequence[str]
    exclusions: Mapping[int, NDArray[np.int64]]
    is_known: bool
    source: str

    @property
    def num_prefixes(self) -> int:
        """Folders that its shards are in: one for each modality."""
        return max(1, len(set(self.modalities)))

    @property
    def num_images(self) -> int:
        """Samples that are read in an epoch without weights."""
        return sum(self.counts) - sum(len(rows) for rows in self.exclusions.values())

    @property
    def num_bytes(self) -> int:
        """Of all shards."""
        return sum(self.shard_bytes)

    @property
    def bytes_per_image(self) -> float:
        """Of a sample, its share of the tar's headers and of what is excluded counted."""
        return self.num_bytes / self.num_images


@dataclass(frozen=True)
class Touched:
    """Which shards an epoch touches: (W, S) by rank, (P, S) by loader process; S shards, P = W x workers."""

    by_rank: Bools
    by_process: Bools
    num_samples: int

    def by_node(self, gpus_per_node: int) -> Bools:
        """(nodes, S): a node's ranks are consecutive."""
        shards = self.by_rank.shape[1]
        return np.asarray(self.by_rank.reshape(-1, gpus_per_node, shards).any(axis=1))


@dataclass(frozen=True)
class EpochReads:
    """What the nodes fetch in an epoch that begins with empty caches.

    Attributes:
        shards: of the dataset, that any node touches.
        most_shards_of_rank: touched by the rank that touches most.
        shards_by_node: touched by each node.
        bytes_by_node: fetched by each node.
        requests: GETs of all nodes: parts of shards, or ranges of samples, and indices.
        index_requests: those of indices.
    """

    shards: int
    most_shards_of_rank: int
    shards_by_node: list[int]
    bytes_by_node: list[float]
    requests: int
    index_requests: int

    @property
    def num_bytes(self) -> float:
        """Fetched by all nodes."""
        return sum(self.bytes_by_node)


def assumed_dataset(num_images: int, bytes_per_image: float, shard_bytes: float) -> Dataset:
    """Shards of one size that hold as many images."""
    per_shard = max(1, round(shard_bytes / bytes_per_image))
    counts = [per_shard] * (num_images // per_shard)
    if num_images % per_shard:
        counts.append(num_images % per_shard)
    sizes = [round(count * bytes_per_image) for count in counts]
    return Dataset(counts, sizes, (), {}, False, "assumed: no dataset was opened")


def touch_epoch(
    plan: EpochPlan, num_shards: int, world_size: int, micro_batch_size: int, num_workers: int
) -> Touched:
    """Follow the order of samples through an epoch.

    Args:
        plan: of `shards.read.order.plan_epoch`.
        num_shards: S.
        world_size: W ranks.
        micro_batch_size: samples that a rank reads at once; its worker processes take them in turn.
        num_workers: loader processes of a rank; 0 reads in the rank itself.
    """
    workers = max(1, num_workers)
    by_process = np.zeros((world_size * workers, num_shards), dtype=bool)
    process: NDArray[np.int64] | None = None
    for k in range(plan.num_batches):
        slots = plan.batch(k)
        share = len(slots.slot) // world_size
        if process is None or workers > 1:
            accumulation = share // micro_batch_size
            number = k * accumulation + slots.slot % share // micro_batch_size
            process = slots.slot // share * workers + number % workers
        by_process[process, slots.shard] = True
    by_rank = np.asarray(by_process.reshape(world_size, workers, num_shards).any(axis=1))
    size = len(process) if process is not None else 0
    return Touched(by_rank, by_process, plan.num_batches * size)


def count_reads(dataset: Dataset, touched: Touched, gpus_per_node: int, *, by_range: bool) -> EpochReads:
    """Count what is fetched: whole shards once for each node that touches them, or a range for each sample.

    Shards that are fetched ahead and not reached, requests that are repeated after errors, and the few of the
    snapshot at the start are not counted; nor is an index that a process loads again after 256 others.
    """
    nodes = touched.by_node(gpus_per_node)
    sizes = np.asarray(dataset.shard_bytes, dtype=np.float64)
    index_requests = int(touched.by_process.sum())
    if by_range:
        per_node = touched.num_samples * dataset.bytes_per_image / len(nodes)
        bytes_by_node = [per_node] * len(nodes)
        requests = touched.num_samples
    else:
        bytes_by_node = (nodes @ sizes).tolist()
        parts = np.ceil(sizes / PART_BYTES).astype(np.int64)
        requests = int((nodes @ parts).sum())
    return EpochReads(
        shards=int(touched.by_rank.any(axis=0).sum()),
        most_shards_of_rank=int(touched.by_rank.sum(axis=1).max()),
        shards_by_node=nodes.sum(axis=1).tolist(),
        bytes_by_node=bytes_by_node,
        requests=requests + index_requests,
        index_requests=index_requests,
    )


def missing_share(
    share: float, epoch: float, dataset_bytes: float, cache_bytes: float, *, by_range: bool
) -> float:
    """Share of what a node touches in an epoch that its cache does not hold.

    The order deals shards out anew in each epoch: after e of them a node that touches a share f of the shards
    has not seen (1 - f)^e. A cache that is smaller than the dataset is taken to hold nothing that comes
    again: careful, as it drops what was used least recently.

    Args:
        share: f.
        epoch: e, whole epochs since the cache was empty.
        dataset_bytes: of all shards.
        cache_bytes: of the node's cache.
        by_range: whether nothing is cached.
    """
    return 1.0 if by_range or cache_bytes < dataset_bytes else (1 - share) ** epoch


def fetches_of_run(
    share: float, epochs: float, dataset_bytes: float, cache_bytes: float, *, by_range: bool
) -> float:
    """How often a node fetches what it touches in an epoch, over a run; arguments as of `missing_share`."""
    whole = math.floor(epochs)
    parts = [1.0] * whole + [epochs - whole]
    return sum(
        part * missing_share(share, epoch, dataset_bytes, cache_bytes, by_range=by_range)
        for epoch, part in enumerate(parts)
    )


def streams_by_node(global_batch_size: int, num_streams: int, num_nodes: int) -> list[int]:
    """Streams of the order that each node reads side by side; neighbors may share one."""
    share = global_batch_size // num_nodes
    ends = [
        (
            node * share * num_streams // global_batch_size,
            ((node + 1) * share - 1) * num_streams // global_batch_size,
        )
        for node in range(num_nodes)
    ]
    return [last - first + 1 for first, last in ends]
