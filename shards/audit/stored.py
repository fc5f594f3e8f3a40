"""Samples of one dataset, as images that are looked for in another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.audit.evaluated import EvaluatedResult, describe_pixels
from shards.builder.members import decode_stored, read_member
from shards.dataset import read_index
from shards.schema import ShardInfo
from shards.stores.store import Store
from shards.support.errors import DataError

MOST_AT_ONCE = 20_000  # samples that are looked for
_ROWS_AT_ONCE = 128
_IMAGE = ("key", "image_offset", "image_size", "image_crc32c", "image_ext", "dtype")


@dataclass(frozen=True)
class StoredImages:
    """Samples that are evaluated on.

    Attributes:
        store: their dataset.
        shards: all of its snapshot.
        places: of each sample, number of the shard and row.
        names: of each, what a report calls it.
    """

    store: Store
    shards: Sequence[ShardInfo]
    places: Sequence[tuple[int, int]]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class StoredTask:
    """Some samples of a shard, and their places among the images."""

    store: Store
    shard: ShardInfo
    rows: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]


def plan_stored(images: StoredImages) -> Iterator[StoredTask]:
    """Cut the samples into tasks, shard by shard."""
    places = np.array(images.places, np.int64).reshape(-1, 2)
    order = np.lexsort((places[:, 1], places[:, 0]))
    for number in np.unique(places[:, 0]):
        mine = order[places[order, 0] == number]
        for start in range(0, len(mine), _ROWS_AT_ONCE):
            some = mine[start : start + _ROWS_AT_ONCE]
            yield StoredTask(images.store, images.shards[number], places[some, 1], some)


def cut_blocks(images: StoredImages) -> Iterator[StoredImages]:
    """Cut samples into blocks that are looked for one after the other: each sample takes 60 KB of memory."""
    for start in range(0, len(images), MOST_AT_ONCE):
        some = slice(start, start + MOST_AT_ONCE)
        yield StoredImages(images.store, images.shards, images.places[some], images.names[some])


def read_stored(task: StoredTask) -> EvaluatedResult:
    """Read the samples of a task; those that are damaged are told."""
    images, unreadable = [], {}
    rows = read_index(task.store, task.shard, _IMAGE).take(task.rows).to_pylist()
    for number, row in zip(task.numbers.tolist(), rows, strict=True):
        try:
            images.append(describe_pixels(number, _read_pixels(task.store, task.shard, row)))
        except DataError as error:
            unreadable[number] = str(error)
    return EvaluatedResult(images, unreadable)


def read_samples(
    store: Store, shard: ShardInfo, rows: npt.NDArray[np.int64]
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Keys and pixels of some samples of a shard.

    Raises:
        DataError: one is damaged.
    """
    for row in read_index(store, shard, _IMAGE).take(rows).to_pylist():
        yield row["key"], _read_pixels(store, shard, row)


def _read_pixels(store: Store, shard: ShardInfo, row: dict[str, Any]) -> npt.NDArray[Any]:
    return decode_stored(read_member(store, shard.path, row, "image"), row["image_ext"], row["dtype"])


def image_names(files: Sequence[Path] | StoredImages, images: Path | str) -> list[str]:
    """What a report calls images: files relative to their folder where they lie in it."""
    if isinstance(files, StoredImages):
        return list(files.names)
    return [file_name(path, images) for path in files]


def file_name(path: Path, images: Path | str) -> str:
    """What a report calls a file: relative to the folder of images where it lies in it."""
    return str(path.relative_to(images)) if images and path.is_relative_to(images) else str(path)
