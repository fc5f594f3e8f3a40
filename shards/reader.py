"""Reads single samples out of shards by their index: one `pread` per member, each checked by its crc32c."""

from __future__ import annotations

import io
import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import zstandard
from numpy.typing import NDArray

from shards.order import skip_excluded
from shards.schema import ShardInfo, Snapshot, read_exclusions, read_index
from shards.support.errors import DataError

MAX_OPEN_SHARDS = 256
"""Shard files held open, and indices held in memory; a rank uses about streams x block_shards / ranks."""

MAX_MAP_BYTES = 1 << 26
READ_MEMBERS = ("image", "hfmap")
NUMBER_COLUMNS = (
    *(f"{member}_{field}" for member in READ_MEMBERS for field in ("offset", "size", "crc32c")),
    "height",
    "width",
    "channels",
)


class Sample(NamedTuple):
    """A stored sample, decoded."""

    key: str
    image: NDArray[np.uint8]
    """(H, W) or (H, W, 3) RGB, as stored."""
    hf_map: NDArray[np.uint8]
    """(h, w) response map of the whole image (`shards.hf_tokens.hf_map`)."""
    num_bytes: int
    """Bytes read for it."""


class _Index(NamedTuple):
    """The columns of an index that reading needs."""

    keys: pa.Array
    labels: pa.Array
    numbers: dict[str, NDArray[np.int64]]


class ShardReader:
    """Random access to the samples of a snapshot.

    Opens shards and loads indices when they are first needed, and holds a bounded number of both. May be
    pickled; the copy opens files of its own.

    Args:
        root: the dataset.
        snapshot: which of its states; shards are numbered as in `snapshot.shards`.
    """

    def __init__(self, root: Path, snapshot: Snapshot) -> None:
        self.root, self.snapshot = root, snapshot
        self._files: OrderedDict[int, int] = OrderedDict()
        # the cache knows nothing of the reader: a cycle would keep files open until the next collection
        self._index = lru_cache(maxsize=MAX_OPEN_SHARDS)(partial(_load_index, root, snapshot))

    def __reduce__(self) -> tuple[object, ...]:
        return ShardReader, (self.root, self.snapshot)

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def read(self, shard: int, row: int) -> Sample:
        """Read and decode the image and the response map of one sample.

        Raises:
            DataError: the shard or its index is missing, cut short or damaged; names shard and key.
        """
        index = self._index(shard)
        where = self.where(shard, row)
        data = {member: self._read_member(shard, row, member, where) for member in READ_MEMBERS}
        shape = tuple(int(index.numbers[name][row]) for name in ("height", "width", "channels"))
        return Sample(
            key=index.keys[row].as_py(),
            image=_decode_image(data["image"], shape, where),
            hf_map=_decode_map(data["hfmap"], where),
            num_bytes=sum(map(len, data.values())),
        )

    def read_bytes(self, shard: int, row: int, member: str = "image") -> bytes:
        """Read one member, "image" or "hfmap", checked and as stored.

        Raises:
            DataError: as of `read`.
        """
        return self._read_member(shard, row, member, self.where(shard, row))

    def labels(self, shard: int, row: int) -> dict[str, Any]:
        """Labels of a sample, empty where it has none.

        Raises:
            DataError: the index is missing or damaged.
        """
        labels: dict[str, Any] = json.loads(self._index(shard).labels[row].as_py())
        return labels

    def where(self, shard: int, row: int) -> str:
        """Name a sample for people: shard and key, or shard and row when the index cannot be read."""
        path = self.snapshot.shards[shard].path
        try:
            return f"{self.root / path}, sample {self._index(shard).keys[row].as_py()}"
        except DataError:
            return f"{self.root / path}, row {row}"

    def _read_member(self, shard: int, row: int, member: str, where: str) -> bytes:
        numbers = self._index(shard).numbers
        offset, size, crc = (int(numbers[f"{member}_{field}"][row]) for field in ("offset", "size", "crc32c"))
        fix = "restore the shard, build the dataset again, or set bad_samples: skip"
        try:
            data = os.pread(self._open(shard), size, offset)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=where, fix=fix) from error
        if len(data) != size:
            raise DataError(f"the shard is cut short: {len(data)} of {size} bytes", where=where, fix=fix)
        if google_crc32c.value(data) != crc:
            raise DataError(f"the bytes of {member} are damaged (crc32c differs)", where=where, fix=fix)
        return data

    def _open(self, shard: int) -> int:
        descriptor = self._files.get(shard)
        if descriptor is None:
            descriptor = os.open(self.root / self.snapshot.shards[shard].path, os.O_RDONLY | os.O_CLOEXEC)
            self._files[shard] = descriptor
            if len(self._files) > MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return descriptor


def _load_index(root: Path, snapshot: Snapshot, shard: int) -> _Index:
    table = read_index(root, snapshot.shards[shard], ["key", "labels", *NUMBER_COLUMNS])
    numbers = {name: table[name].to_numpy().astype(np.int64) for name in NUMBER_COLUMNS}
    return _Index(table["key"].combine_chunks(), table["labels"].combine_chunks(), numbers)


class KeptSamples:
    """Numbers the samples of some shards that are not excluded.

    Args:
        snapshot: the dataset.
        exclusions: as of `exclusion_rows`.
        modality: number the samples of this one only; None: all.
    """

    def __init__(
        self, snapshot: Snapshot, exclusions: Mapping[int, NDArray[np.int64]], modality: str | None = None
    ) -> None:
        self._exclusions = exclusions
        shards = [(i, s) for i, s in enumerate(snapshot.shards) if modality in (None, s.modality)]
        self._shards = [i for i, _ in shards]
        self._ends = np.cumsum([s.num_samples - len(exclusions.get(i, ())) for i, s in shards])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._shards else 0

    def locate(self, number: int) -> tuple[int, int]:
        """Return shard and row of a sample, `number` in [0, len)."""
        i = int(np.searchsorted(self._ends, number, side="right"))
        shard = self._shards[i]
        row = np.array([number - (self._ends[i - 1] if i else 0)])
        if shard in self._exclusions:
            row = skip_excluded(row, self._exclusions[shard])
        return shard, int(row[0])


def exclusion_rows(root: Path, snapshot: Snapshot) -> dict[int, NDArray[np.int64]]:
    """Rows that the order leaves out because they repeat the pixels of others: shard -> sorted rows.

    Raises:
        DataError: `duplicates.parquet` or an index cannot be read.
    """
    keys = read_exclusions(root)
    if not keys:
        return {}
    wanted = pa.array(sorted(keys), pa.string())
    exclusions = {}
    for shard, info in enumerate(snapshot.shards):
        rows = _rows_of(root, info, wanted)
        if rows.size:
            exclusions[shard] = rows
    return exclusions


def _rows_of(root: Path, info: ShardInfo, keys: pa.Array) -> NDArray[np.int64]:
    column = read_index(root, info, ["key"])["key"]
    found = pc.is_in(column, value_set=keys).to_numpy()
    return np.flatnonzero(found).astype(np.int64)


def _decode_image(data: bytes, shape: Sequence[int], where: str) -> NDArray[np.uint8]:
    """Decode stored pixels; grey ones stay (H, W), so that a crop works on one channel."""
    flags = cv2.IMREAD_GRAYSCALE if shape[2] == 1 else cv2.IMREAD_COLOR_RGB
    # stored pixels are upright: the build has applied any rotation of the source
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None or image.shape[:2] != tuple(shape[:2]):
        got = "nothing" if image is None else f"{image.shape[0]} x {image.shape[1]} pixels"
        raise DataError(f"decodes to {got}, the index says {shape[0]} x {shape[1]}", where=where)
    return np.asarray(image, np.uint8)


def _decode_map(data: bytes, where: str) -> NDArray[np.uint8]:
    try:
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_MAP_BYTES)
        shape, start = _parse_map_header(raw[: raw.index(b"\n") + 1])
        return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
    except (zstandard.ZstdError, ValueError) as error:
        raise DataError(f"the response map cannot be decoded: {error}", where=where) from error


@lru_cache(maxsize=1024)
def _parse_map_header(header: bytes) -> tuple[tuple[int, int], int]:
    """Return shape and start of the cells of a .npy file of uint8 (h, w).

    Remembered, since NumPy parses the header with Python's parser, which takes longer than all else of a map.

    Raises:
        ValueError: it is the header of something else.
    """
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not version 1.0 of .npy")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if len(shape) != 2 or 0 in shape or fortran_order or dtype != np.uint8:
        raise ValueError(f"{dtype} of shape {shape} instead of uint8 (h, w)")
    return shape, len(header)
