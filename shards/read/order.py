"""The order of samples: a pure function of shard counts, exclusions, seed, epoch, batch, streams and weights.

    shards of the epoch, permuted -> cut by sample count into C streams -> shuffled inside blocks of a stream
    slot j of a global batch of G comes from stream floor(j C / G); rank r of W reads slots [r G/W, (r+1) G/W)

Ranks and workers do not enter, so a run may go on with another number of them. Nothing is replayed either:
the permuted shards form a line of samples, batch k is arithmetic on it, and only the blocks that it touches
are shuffled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from shards.read.balance import ModalityWeights, passes_by_modality
from shards.read.draws import sample_rng
from shards.support.errors import ConfigError, DataError
from shards.support.settings import Settings


class OrderConfig(Settings):
    """What the order depends on, beside the dataset and the epoch."""

    global_batch_size: int = Field(gt=0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    num_streams: int | None = Field(default=None, gt=0)
    """Streams read side by side; must divide the global batch size. None: its largest divisor up to 16."""
    block_shards: int = Field(default=4, gt=0)
    """Shards of a stream that are shuffled together: more mixes better and keeps more shards in use."""
    modality_weights: ModalityWeights = Field(default_factory=dict)
    """How modalities are balanced (`shards.read.balance`). 2 passes over one read each of its shards twice in
    an epoch, half a pass every other shard and the rest in the next epoch. A sample that comes twice has two
    places in the plan, and so two crops; both may be in one batch."""


class Slots(NamedTuple):
    """Consecutive slots of a global batch, all arrays of one length."""

    position: NDArray[np.int64]
    """Place in the epoch's plan: batch * global batch size + slot."""
    slot: NDArray[np.int64]
    """Place in the global batch."""
    shard: NDArray[np.int32]
    """Index of the shard in the list that the plan was made from."""
    row: NDArray[np.int32]
    """Row of the shard's index."""

    def part(self, begin: int, end: int) -> Slots:
        """Return some consecutive ones of these slots."""
        return Slots(
            self.position[begin:end], self.slot[begin:end], self.shard[begin:end], self.row[begin:end]
        )


def choose_num_streams(global_batch_size: int, preferred: int = 16) -> int:
    """Return the largest divisor of the global batch size that is at most `preferred`."""
    return next(c for c in range(min(preferred, global_batch_size), 0, -1) if global_batch_size % c == 0)


def check_batch_sizes(global_batch_size: int, world_size: int, micro_batch_size: int) -> int:
    """Return the accumulation steps, global batch / (world size * micro-batch).

    Raises:
        ConfigError: the division leaves a rest.
    """
    step = world_size * micro_batch_size
    if global_batch_size % step == 0:
        return global_batch_size // step
    below = global_batch_size // step * step
    fix = f"take a global batch of {f'{below} or ' if below else ''}{below + step}"
    if global_batch_size % world_size == 0:
        fix += f", or a micro-batch of {_near_divisors(global_batch_size // world_size, micro_batch_size)}"
    raise ConfigError(
        f"a global batch of {global_batch_size} is no multiple of {world_size} ranks x micro-batch "
        f"{micro_batch_size}",
        fix=fix,
    )


def _near_divisors(number: int, wanted: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return " or ".join(map(str, sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:3])))


def skip_excluded(places: NDArray[np.int64], excluded: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows at `places` among the rows that are not excluded (`excluded`: sorted, unique)."""
    # the i-th excluded row has excluded[i] - i kept rows before it, and moves every later place by one
    return places + np.searchsorted(excluded - np.arange(len(excluded)), places, side="right")


class EpochPlan:
    """The order of one epoch; made by `plan_epoch`.

    Attributes:
        epoch: which epoch.
        num_samples: samples of the epoch, repeats counted.
        num_batches: whole global batches; the `num_samples % global_batch_size` samples that remain, the last
            of each stream, are left out of this epoch.
    """

    def __init__(
        self,
        visits: NDArray[np.int64],
        counts: NDArray[np.int64],
        exclusions: Mapping[int, NDArray[np.int64]],
        config: OrderConfig,
        epoch: int,
        num_streams: int,
    ) -> None:
        self.epoch, self._config, self._exclusions = epoch, config, exclusions
        self._visits, self._visit_ends = visits, np.cumsum(counts[visits])
        self._visit_starts = self._visit_ends - counts[visits]
        self.num_samples = int(self._visit_ends[-1])
        self.num_batches = self.num_samples // config.global_batch_size
        self._share = config.global_batch_size // num_streams

        # every stream holds floor(samples / C) >= batches * G / C of the line, since G / C is whole
        self._cuts = np.arange(num_streams, dtype=np.int64) * self.num_samples // num_streams
        # a piece is the part of one visit that lies in one stream
        self._piece_starts = np.union1d(self._visit_starts, self._cuts)
        first_piece = np.searchsorted(self._piece_starts, self._cuts)
        num_pieces = len(self._piece_starts)
        stream = np.repeat(np.arange(num_streams), np.diff(first_piece, append=num_pieces))
        is_first = (np.arange(num_pieces) - first_piece[stream]) % config.block_shards == 0
        self._block_pieces = np.append(np.flatnonzero(is_first), num_pieces)
        self._block_starts = self._piece_starts[is_first]
        self._block_streams = stream[is_first]
        # the current block of each stream and the one after it
        self._cached_block = lru_cache(maxsize=2 * num_streams)(self._shuffle_block)

    def batch(self, k: int, start: int = 0, stop: int | None = None) -> Slots:
        """Return the slots [start, stop) of global batch `k`, by default all of them.

        Raises:
            IndexError: there is no such batch or slot in the epoch.
        """
        size = self._config.global_batch_size
        stop = size if stop is None else stop
        if not (0 <= k < self.num_batches and 0 <= start <= stop <= size):
            raise IndexError(f"slots [{start}, {stop}) of batch {k}; {self.num_batches} batches of {size}")
        slot = np.arange(start, stop, dtype=np.int64)
        place, block = self._find(k, slot)
        shard, row = np.empty(len(slot), dtype=np.int32), np.empty(len(slot), dtype=np.int32)
        for b in np.unique(block).tolist():
            here = block == b
            inside = place[here] - self._block_starts[b]
            shards, rows = self._cached_block(b)
            shard[here], row[here] = shards[inside], rows[inside]
        return Slots(k * size + slot, slot, shard, row)

    def rank_batch(self, k: int, rank: int, world_size: int) -> Slots:
        """Return the slots of global batch `k` that rank `rank` of `world_size` reads."""
        share = self._config.global_batch_size // world_size
        return self.batch(k, rank * share, (rank + 1) * share)

    def blocks_ahead(self, k: int, rank: int, world_size: int) -> dict[int, list[int]]:
        """Return the blocks that a rank will reach after those of batch `k`, and the shards of each."""
        share = self._config.global_batch_size // world_size
        _, block = self._find(k, np.arange(rank * share, (rank + 1) * share))
        current = np.unique(block)
        following = np.setdiff1d(current + 1, [*current, len(self._block_streams)])
        in_stream = self._block_streams[following] == self._block_streams[following - 1]
        return {b: self._block_shards(b) for b in following[in_stream].tolist()}

    def _find(self, k: int, slot: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return place on the line and block of slots of batch `k`."""
        place = self._cuts[slot // self._share] + k * self._share + slot % self._share
        return place, np.searchsorted(self._block_starts, place, side="right") - 1

    def _block_shards(self, block: int) -> list[int]:
        pieces = self._piece_starts[self._block_pieces[block] : self._block_pieces[block + 1]]
        visits = np.searchsorted(self._visit_ends, pieces, side="right")
        return self._visits[visits].tolist()  # type: ignore[no-any-return]

    def _shuffle_block(self, block: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return shard and row of every sample of a block, in the order in which the stream gives them."""
        shards, rows = [], []
        starts = self._piece_starts
        for piece in range(self._block_pieces[block], self._block_pieces[block + 1]):
            begin = starts[piece]
            end = starts[piece + 1] if piece + 1 < len(starts) else self.num_samples
            visit = int(np.searchsorted(self._visit_ends, begin, side="right"))
            shard = int(self._visits[visit])
            row = np.arange(begin, end) - self._visit_starts[visit]
            excluded = self._exclusions.get(shard)
            if excluded is not None:
                row = skip_excluded(row, excluded)
            shards.append(np.full(len(row), shard, dtype=np.int32))
            rows.append(row.astype(np.int32))
        rng = sample_rng(self._config.seed, self.epoch, block, "order.block")
        order = rng.permutation(sum(len(r) for r in rows))
        return np.concatenate(shards)[order], np.concatenate(rows)[order]


def plan_epoch(
    shard_counts: Sequence[int],
    exclusions: Mapping[int, NDArray[np.int64]] | None,
    config: OrderConfig,
    epoch: int,
    *,
    modalities: Sequence[str] | None = None,
) -> EpochPlan:
    """Plan one epoch.

    Args:
        shard_counts: samples of each shard, excluded ones counted.
        exclusions: shard -> its rows that must not be read, sorted and unique.
        config: seed, batch, streams, weights.
        epoch: which epoch, from 0.
        modalities: modality of each shard; needed with `modality_weights`.

    Raises:
        ConfigError: the streams do not divide the batch, or a weight is wrong.
        DataError: the epoch holds less than one global batch.
    """
    size = config.global_batch_size
    num_streams = config.num_streams or choose_num_streams(size)
    if size % num_streams:
        raise ConfigError(
            f"{num_streams} streams do not divide a global batch of {size}",
            where="num_streams",
            fix=f"take {_near_divisors(size, num_streams)}",
        )
    visits, counts = _visits(shard_counts, exclusions, config, epoch, modalities)
    visits = sample_rng(config.seed, epoch, 0, "order.shards").permutation(visits)
    return EpochPlan(visits, counts, exclusions or {}, config, epoch, num_streams)


def count_batches(
    shard_counts: Sequence[int],
    exclusions: Mapping[int, NDArray[np.int64]] | None,
    config: OrderConfig,
    epoch: int,
    *,
    modalities: Sequence[str] | None = None,
) -> int:
    """Return `plan_epoch(...).num_batches` without the plan; arguments and errors as there."""
    visits, counts = _visits(shard_counts, exclusions, config, epoch, modalities)
    return int(counts[visits].sum()) // config.global_batch_size


def _visits(
    shard_counts: Sequence[int],
    exclusions: Mapping[int, NDArray[np.int64]] | None,
    config: OrderConfig,
    epoch: int,
    modalities: Sequence[str] | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the shards of an epoch, each as often as it is read, and every shard's kept samples."""
    counts = np.array(shard_counts, dtype=np.int64)
    for shard, rows in (exclusions or {}).items():
        counts[shard] -= len(rows)
    visits = _choose_shards(counts, config, epoch, modalities)
    visits = visits[counts[visits] > 0]
    num_samples, size = int(counts[visits].sum()), config.global_batch_size
    if num_samples < size:
        raise DataError(
            f"epoch {epoch} holds {num_samples} samples, less than one global batch of {size}",
            fix=f"take a global batch of at most {num_samples}, or more data" if num_samples else "add data",
        )
    return visits, counts


def _choose_shards(
    counts: NDArray[np.int64], config: OrderConfig, epoch: int, modalities: Sequence[str] | None
) -> NDArray[np.int64]:
    """Return the shards of an epoch, each as often as it is read.

    A modality of m shards and w passes walks around its shards, in the same order in all epochs, by
    floor((e + 1) w m) - floor(e w m) shards in epoch e: in the long run each is read equally often.

    Args:
        counts: kept samples of each shard.
        config: seed and weights.
        epoch: which epoch, from 0.
        modalities: modality of each shard.
    """
    if config.modality_weights == {}:
        return np.arange(len(counts), dtype=np.int64)
    assert modalities is not None, "weights need the shards' modalities"
    names = np.asarray(modalities, dtype=str)
    own = {name: np.flatnonzero(names == name) for name in sorted(set(modalities))}
    passes = passes_by_modality(
        config.modality_weights, {name: int(counts[shards].sum()) for name, shards in own.items()}
    )
    chosen = [np.zeros(0, dtype=np.int64)]
    for name, shards in own.items():
        walk = sample_rng(config.seed, 0, 0, f"order.walk.{name}").permutation(shards)
        pace = passes[name] * len(walk)
        chosen.append(walk[np.arange(math.floor(epoch * pace), math.floor((epoch + 1) * pace)) % len(walk)])
    return np.concatenate(chosen)
