"""The resumable loader: global batches of an epoch, from any batch on, as micro-batches of one rank.

The only state is (epoch, batches applied). The order is that of `shards.read.order`; worker processes take
whole micro-batches of it in turn, and every draw is keyed by the place in the plan (`shards.read.draws`), so
neither the number of workers nor a restart changes a bit of what comes out, and the number of ranks only who
gets it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext

import cv2
import torch
from torch.utils.data import DataLoader

from shards.read.config import StreamConfig
from shards.read.kept import exclusion_rows
from shards.read.order import (
    EpochPlan,
    OrderConfig,
    check_batch_sizes,
    choose_num_streams,
    count_batches,
    plan_epoch,
)
from shards.read.reader import shard_files
from shards.read.views import MicroBatch, Request, Views, open_snapshot
from shards.schema import Snapshot
from shards.stores.store import is_remote
from shards.support.errors import ConfigError, EnvironmentFault, FrepaError

__all__ = ["MicroBatch", "SampleStream", "StreamConfig"]


class SampleStream:
    """What one rank reads.

    Args:
        config: the dataset and the views.
        order: the order of samples; equal on all ranks.
        rank: this rank, in [0, world_size).
        world_size: number of ranks.
        micro_batch_size: samples a rank holds at once; divides global batch size / world size.

    Attributes:
        snapshot: what is read; a run pins its hash.
        gradient_accumulation_steps: micro-batches of this rank in a global batch.

    Raises:
        ConfigError: the batch sizes do not divide, or a setting does not suit the dataset.
        DataError: there is no such dataset, or shards of it lack an HF version that is asked for.
        EnvironmentFault: the dataset cannot be reached.
    """

    def __init__(
        self, config: StreamConfig, order: OrderConfig, rank: int, world_size: int, micro_batch_size: int
    ) -> None:
        assert 0 <= rank < world_size
        self.gradient_accumulation_steps = check_batch_sizes(
            order.global_batch_size, world_size, micro_batch_size
        )
        self.snapshot = open_snapshot(config)
        self._order, self._exclusions = order, exclusion_rows(config.root, self.snapshot)
        self._counts = [shard.num_samples for shard in self.snapshot.shards]
        self._modalities = [shard.modality for shard in self.snapshot.shards]
        has_room = is_remote(config.root) and _check_cache(config, self.snapshot, order, rank, world_size)
        num_fetchers = max(1, config.num_workers) if has_room else 0
        self._requests = _Requests(rank, world_size, micro_batch_size, num_fetchers)
        self._loader = _create_loader(Views(config, self.snapshot, self._exclusions), self._requests)

    def num_batches(self, epoch: int) -> int:
        """Global batches of an epoch.

        Raises:
            ConfigError, DataError: as of `shards.read.order.plan_epoch`.
        """
        return count_batches(self._counts, self._exclusions, self._order, epoch, modalities=self._modalities)

    def total_batches(self, num_epochs: int) -> int:
        """Global batches of the first epochs; they may differ in length where modalities are weighted.

        Raises:
            ConfigError, DataError: as `num_batches`.
        """
        return sum(map(self.num_batches, range(num_epochs)))

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[list[MicroBatch]]:
        """Read this rank's part of the global batches from `start_batch` to the end of the epoch.

        Reading begins at the call, and ends any earlier iterator of this stream.

        Yields:
            For each global batch its micro-batches, in the order of their slots.

        Raises:
            ConfigError: the epoch has no such batch.
            DataError: a sample is damaged (`bad_samples: fail`), or too many are (`skip`).
            EnvironmentFault: the dataset cannot be reached any more, or a worker process died.
        """
        plan = plan_epoch(self._counts, self._exclusions, self._order, epoch, modalities=self._modalities)
        if not 0 <= start_batch <= plan.num_batches:
            raise ConfigError(
                f"epoch {epoch} has no batch {start_batch}",
                allowed=f"0 to {plan.num_batches}",
                fix="resume with the dataset and the batch size that the run was started with",
            )
        self._requests.restart(plan, start_batch)
        return self._collect(iter(self._loader), plan.num_batches - start_batch, self._requests.generation)

    def _collect(
        self, micro_batches: Iterator[MicroBatch | FrepaError], num_batches: int, generation: int
    ) -> Iterator[list[MicroBatch]]:
        for _ in range(num_batches):
            # workers are kept between epochs, so their results would come to the wrong iterator
            assert self._requests.generation == generation, (
                "a later call of batches() has ended this iterator"
            )
            yield [
                _receive(micro_batches, self._loader.num_workers)
                for _ in range(self.gradient_accumulation_steps)
            ]


class _Requests:
    """The order as a sampler: the requests of one rank, from where `restart` says.

    Args:
        rank: whose.
        world_size: number of ranks.
        micro_batch_size: samples of a request.
        num_fetchers: where shards are fetched ahead, among how many processes they are dealt out; else 0.
    """

    def __init__(self, rank: int, world_size: int, micro_batch_size: int, num_fetchers: int) -> None:
        self._rank, self._world_size, self._micro_batch_size = rank, world_size, micro_batch_size
        self._num_fetchers = num_fetchers
        self._plan: EpochPlan | None = None
        self._start_batch = self.generation = 0

    def restart(self, plan: EpochPlan, start_batch: int) -> None:
        self._plan, self._start_batch = plan, start_batch
        self.generation += 1

    def __iter__(self) -> Iterator[Request]:
        assert self._plan is not None
        size = self._micro_batch_size
        num, upcoming = 0, list[int]()
        for k in range(self._start_batch, self._plan.num_batches):
            slots = self._plan.rank_batch(k, self._rank, self._world_size)
            if self._num_fetchers:
                ahead = self._plan.blocks_ahead(k, self._rank, self._world_size)
                upcoming = [shard for block in ahead.values() for shard in block]
            for begin in range(0, len(slots.slot), size):
                # DataLoader gives requests to its workers in turn, so that each hears of shards of its own
                mine = upcoming[num % self._num_fetchers :: self._num_fetchers] if upcoming else []
                num += 1
                yield Request(self._plan.epoch, slots.part(begin, begin + size), mine)


def _check_cache(
    config: StreamConfig, snapshot: Snapshot, order: OrderConfig, rank: int, world_size: int
) -> bool:
    """Say whether the cache has room for the next blocks beside the current ones.

    Raises:
        ConfigError: it has none for the current ones: each shard would be fetched again and again.
    """
    if config.remote != "cache":
        return False
    streams = order.num_streams or choose_num_streams(order.global_batch_size)
    touched = -(-(rank + 1) * streams // world_size) - rank * streams // world_size
    sizes = [
        sum(file.num_bytes for file in set(shard_files(shard, config.hf_digests or {})))
        for shard in snapshot.shards
    ]
    needed = min(touched * order.block_shards * max(sizes), sum(sizes))
    if needed > config.cache_bytes:
        raise ConfigError(
            f"this rank reads {touched} streams with {order.block_shards} shards of up to {max(sizes)} bytes "
            f"side by side; a cache of {config.cache_bytes} bytes would fetch each again and again",
            where="cache_bytes",
            allowed=f"at least {needed} for each rank of a machine",
            fix="take a larger cache, fewer num_streams, or remote: range",
        )
    return 2 * needed <= config.cache_bytes


def _create_loader(views: Views, requests: _Requests) -> DataLoader[MicroBatch | FrepaError]:
    num_workers = views.config.num_workers
    return DataLoader(
        views,
        batch_size=None,  # an item is a micro-batch already
        sampler=requests,
        num_workers=num_workers,
        worker_init_fn=_init_worker,
        multiprocessing_context=_worker_context() if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # DataLoader draws a seed for workers; from the global generator, that would move dropout's draws
        generator=torch.Generator(),
    )


def _worker_context() -> BaseContext:
    """Start workers from a clean process.

    A plain fork copies locks that threads of the trainer (NCCL, OpenMP, pinning) hold at that moment, and its
    CUDA state, and makes the death of a worker a signal that strikes anywhere in the trainer's code. Spawning
    imports torch in each worker; a fork server imports it once.

    Launchers send SIGTERM, and batch systems SIGUSR1, to whole process trees. They are for the trainer to
    answer, which may still need batches: the fork server and its workers are born with both blocked.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))
    try:
        resource_tracker.ensure_running()  # it leaves SIGTERM unblocked here (Python 3.11)
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    return context


def _init_worker(_: int) -> None:
    cv2.setNumThreads(1)  # workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer to answer
    threading.Thread(target=_die_with_trainer, daemon=True).start()


def _die_with_trainer() -> None:
    """End this worker when the trainer is gone, however it went.

    DataLoader's own check looks at the parent, here the fork server, which in turn lives as long as any of
    its workers: after a `kill -9` of the trainer they would keep each other alive.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    multiprocessing.connection.wait([trainer.sentinel])
    os._exit(1)


def _receive(micro_batches: Iterator[MicroBatch | FrepaError], num_workers: int) -> MicroBatch:
    try:
        item = next(micro_batches)
    except (RuntimeError, OSError, EOFError) as error:
        # "Caught ...": an exception of the worker's code; DataLoader and its sockets tell of death otherwise
        if num_workers == 0 or str(error).startswith("Caught "):
            raise
        raise EnvironmentFault(
            f"a loader process died ({str(error).splitlines()[0] if str(error) else type(error).__name__})",
            fix="see that memory and /dev/shm are large enough, or take fewer data.num_workers, then resume",
        ) from error
    if isinstance(item, FrepaError):
        try:
            raise item
        finally:
            # the error holds this frame: held in turn, it would keep the workers until a garbage collection
            # that ends them in the wrong order, and so waits for them in vain
            del item
    return item
