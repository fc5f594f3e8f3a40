"""Keys of millions of samples, compared through 8-byte hashes: 140 MB for 17.6 M."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.dataset import read_index
from shards.schema import ShardInfo
from shards.stores.store import Store

Hashes = npt.NDArray[np.uint64]


def hash_keys(keys: pa.ChunkedArray) -> Hashes:
    """64-bit hashes of keys, by NumPy: what is equal here is then compared in full.

    Each 8 bytes are mixed (the finalizer of splitmix64, which leaves 0 at 0) and added, so that the hash of a
    key does not depend on how long the others are.
    """
    words = keys.to_numpy().astype(np.bytes_)
    width = -(-words.dtype.itemsize // 8)
    words = np.ascontiguousarray(words.astype(f"S{8 * width}")).view("<u8").reshape(len(words), width)
    hashes = np.zeros(len(words), np.uint64)
    with np.errstate(over="ignore"):
        for column in range(width):
            word = words[:, column] * np.uint64(2 * column + 0x9E3779B97F4A7C15)
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            hashes += word ^ (word >> np.uint64(31))
    return hashes


def find_repeated_keys(
    shards: Sequence[tuple[Store, ShardInfo]], hashes: Sequence[Hashes]
) -> Iterator[tuple[str, list[int]]]:
    """Find keys that two samples have.

    Args:
        shards: where each shard lies.
        hashes: of the keys of each; empty for a shard that is left out.

    Yields:
        A key and the numbers of the shards that hold it, each as often as they do.

    Raises:
        DataError, EnvironmentFault: as `shards.dataset.read_index`.
    """
    together = np.sort(np.concatenate([np.zeros(0, np.uint64), *hashes]))
    repeated = np.unique(together[1:][together[1:] == together[:-1]])
    del together
    if not repeated.size:
        return
    holders: dict[str, list[int]] = defaultdict(list)
    for number, ((store, shard), own) in enumerate(zip(shards, hashes, strict=True)):
        rows = np.flatnonzero(np.isin(own, repeated))
        if rows.size:
            keys = read_index(store, shard, ["key"])["key"].take(pa.array(rows))
            for key in keys.to_pylist():
                holders[key].append(number)
    yield from ((key, numbers) for key, numbers in sorted(holders.items()) if len(numbers) > 1)
