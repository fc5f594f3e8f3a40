"""What joining datasets does with one shard: read its index, copy it; runs in worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.audit.keys import Hashes, hash_keys
from shards.dataset import read_index
from shards.schema import ShardInfo, hf_tar_path, index_path
from shards.stores.sequential import SequentialReader
from shards.stores.store import MissingFile, Store
from shards.support.errors import DataError


@dataclass(frozen=True)
class ShardScan:
    """What an index says of its samples.

    Attributes:
        keys: (samples,) hashes.
        pixels: (samples, 2) the 128 bits of the pixel hashes.
        has_patients: whether any of them has a patient.
    """

    keys: Hashes
    pixels: npt.NDArray[np.uint64]
    has_patients: bool


def scan_shard(place: tuple[Store, ShardInfo]) -> ShardScan:
    """Read an index; raises as `shards.dataset.read_index`."""
    table = read_index(*place, ["key", "pixel_hash", "patient"])
    has_patients = table["patient"].null_count < table.num_rows
    return ShardScan(hash_keys(table["key"]), parse_hashes(table["pixel_hash"]), has_patients)


def parse_hashes(texts: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """Turn 32 hex digits each into (n, 2) numbers."""
    digits = np.ascontiguousarray(texts.to_numpy().astype("S32")).view(np.uint8).reshape(-1, 32)
    values = np.where(digits > ord("9"), digits - (ord("a") - 10), digits - ord("0")) & 15
    packed = (values[:, ::2] << 4 | values[:, 1::2]).astype(np.uint8)
    return np.ascontiguousarray(packed).view(">u8").astype(np.uint64)


@dataclass(frozen=True)
class CopyTask:
    """A shard to be copied with its index and its HF versions; `path` is that of the copy."""

    store: Store
    shard: ShardInfo
    target: Store
    path: str


def copy_shard(task: CopyTask) -> bool:
    """Copy a shard, unless it is there; return whether it was. Its own index comes last and commits it.

    Raises:
        DataError: what was read is not what the snapshot says.
        EnvironmentFault: a place cannot be reached or written.
    """
    files = list(_files(task))
    if all(task.target.num_bytes(path) == num_bytes for _, path, num_bytes, _ in files if num_bytes) and all(
        _has_checksum(task.target, path, crc32c) for _, path, num_bytes, crc32c in files if not num_bytes
    ):
        return True
    for source, path, num_bytes, crc32c in files:
        if num_bytes:
            _copy(task, source, path, num_bytes, crc32c)
        else:
            data = task.store.read(source)
            _check(google_crc32c.value(data) == crc32c, task.store.where(source))
            task.target.write(path, data)
    return False


def _files(task: CopyTask) -> Iterator[tuple[str, str, int, int]]:
    """Path here and there, size (0 for an index, which is small) and crc32c of each file."""
    for digest, version in sorted(task.shard.hf.items()):
        source, path = hf_tar_path(task.shard.path, digest), hf_tar_path(task.path, digest)
        yield source, path, version.num_bytes, version.crc32c
        yield index_path(source), index_path(path), 0, version.index_crc32c
    yield task.shard.path, task.path, task.shard.num_bytes, task.shard.crc32c
    yield index_path(task.shard.path), index_path(task.path), 0, task.shard.index_crc32c


def _has_checksum(store: Store, path: str, crc32c: int) -> bool:
    """Whether a small file is there with that content; an index holds the checksum of every member."""
    try:
        return bool(google_crc32c.value(store.read(path)) == crc32c)
    except MissingFile:
        return False


def _copy(task: CopyTask, source: str, path: str, num_bytes: int, crc32c: int) -> None:
    reader = SequentialReader(task.store, source, num_bytes)
    with task.target.writing(path) as file:
        for piece in reader.pieces():
            file.write(piece)
        # inside the block: a wrong copy never appears
        _check(reader.finish() == crc32c and reader.position == num_bytes, task.store.where(source))


def _check(is_right: bool, where: str) -> None:
    if not is_right:
        raise DataError(
            "the file is not the one in the snapshot",
            where=where,
            fix="restore it: frepa shards verify --deep",
        )
