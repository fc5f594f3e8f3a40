"""Samples that repeat the pixels of another one: found from the indices, 16 bytes per sample in memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.dataset import read_index
from shards.schema import ShardInfo
from shards.stores.store import Store

_THREADS = 16
_COLUMNS = ["key", "object", "unit"]

Int = npt.NDArray[np.int64]


class SampleNumbers:
    """Numbers all samples of some shards, in the order of the shards and of their rows."""

    def __init__(self, shards: Sequence[ShardInfo]) -> None:
        self.shards = list(shards)
        self.starts = np.cumsum([0, *(shard.num_samples for shard in shards)])
        self._order = {shard.path: number for number, shard in enumerate(shards)}

    @property
    def num_samples(self) -> int:
        """Of all shards."""
        return int(self.starts[-1])

    def number(self, shards: Sequence[str], rows: Int) -> Int:
        """Numbers of samples, from path and row; -1 for those of other shards."""
        places = np.array([self._order.get(path, -1) for path in shards], np.int64)
        return np.where(places >= 0, self.starts[places] + rows, -1)

    def locate(self, numbers: Int) -> tuple[Int, Int]:
        """Place of the shard, and row in it, of samples."""
        places = np.searchsorted(self.starts, numbers, side="right") - 1
        return places, numbers - self.starts[places]


@dataclass(frozen=True)
class Repeats:
    """Samples that repeat another one, a row each: `object` and `unit` are those of the former."""

    shard: list[str]
    row: Int
    key: list[str]
    object: Int
    unit: Int
    original_key: list[str]


def find_repeats(store: Store, numbers: SampleNumbers, excluded: Int, candidates: Int) -> Repeats:
    """Find which samples repeat the pixels of one that comes before them or is no candidate.

    Args:
        store: the dataset.
        numbers: of all its shards, the oldest first.
        excluded: samples that no other one may repeat, since they are left out.
        candidates: samples that are not known to be unique yet.
    """
    hashes = _read_hashes(store, numbers)
    is_active = np.ones(numbers.num_samples, bool)
    is_active[excluded] = False
    is_candidate = np.zeros(numbers.num_samples, bool)
    is_candidate[candidates] = True
    # those that are known to be unique come first, so that none of them becomes a repetition of a newer one
    rank = np.flatnonzero(is_active & ~is_candidate)
    rank = np.concatenate([rank, np.flatnonzero(is_active & is_candidate)])
    order = rank[np.lexsort((hashes[rank, 1], hashes[rank, 0]))]
    ordered = hashes[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    original = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
    is_repeat = ~is_first & is_candidate[order]
    found = np.argsort(order[is_repeat], kind="stable")
    return _describe(store, numbers, order[is_repeat][found], original[is_repeat][found])


def _read_hashes(store: Store, numbers: SampleNumbers) -> npt.NDArray[np.uint64]:
    """Pixel hashes of all samples, (N, 2)."""

    def read(shard: ShardInfo) -> npt.NDArray[np.uint64]:
        column = read_index(store, shard, ["pixel_hash"])["pixel_hash"].combine_chunks()
        _, offsets, data = column.buffers()
        bounds = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
        text = bytes(memoryview(data)[bounds[0] : bounds[-1]])
        return np.frombuffer(bytes.fromhex(text.decode()), np.uint64).reshape(-1, 2)

    hashes = np.empty((numbers.num_samples, 2), np.uint64)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(numbers.shards), 1024):  # results do not pile up
            chunk = numbers.shards[start : start + 1024]
            for place, found in enumerate(pool.map(read, chunk), start):
                hashes[numbers.starts[place] : numbers.starts[place + 1]] = found
    return hashes


def _describe(store: Store, numbers: SampleNumbers, repeated: Int, original: Int) -> Repeats:
    """Look up keys; a shard's index is read once."""
    wanted = np.unique(np.concatenate([repeated, original]))
    places, rows = numbers.locate(wanted)
    tables = [
        read_index(store, numbers.shards[int(place)], _COLUMNS).take(pa.array(rows[places == place]))
        for place in np.unique(places)
    ]
    if not tables:
        return Repeats([], repeated, [], repeated, repeated, [])
    table = pa.concat_tables(table.replace_schema_metadata(None) for table in tables)
    mine, theirs = np.searchsorted(wanted, repeated), np.searchsorted(wanted, original)
    places, rows = numbers.locate(repeated)
    return Repeats(
        shard=[numbers.shards[int(place)].path for place in places],
        row=rows,
        key=table["key"].take(pa.array(mine)).to_pylist(),
        object=table["object"].to_numpy()[mine],
        unit=table["unit"].to_numpy()[mine],
        original_key=table["key"].take(pa.array(theirs)).to_pylist(),
    )
