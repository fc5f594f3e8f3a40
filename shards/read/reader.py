"""Reads single samples out of shards by their index, each member checked by its crc32c."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.dataset import read_hf_index, read_index
from shards.decoding import Stored, decode_image, decode_map
from shards.read.access import MAX_OPEN_SHARDS, CacheRequests, RemoteConfig, ShardFile, Span, open_access
from shards.read.kept import Place
from shards.schema import ShardInfo, Snapshot, hf_tar_path
from shards.stores.store import Store, open_store
from shards.support.errors import DataError

_FIELDS = ("offset", "size", "crc32c")
_IMAGE_COLUMNS = (*(f"image_{field}" for field in _FIELDS), "height", "width", "channels")
_MAP_COLUMNS = tuple(f"hfmap_{field}" for field in _FIELDS)
_TEXT_COLUMNS = ("key", "labels", "image_ext", "dtype")


class Sample(NamedTuple):
    """A stored sample, decoded."""

    key: str
    image: NDArray[Any]
    """(H, W) or (H, W, 3) RGB, as stored: uint8, or int16 Hounsfield units."""
    hf_map: NDArray[np.uint8]
    """(h, w) response map of the whole image (`shards.hf.maps.hf_map`)."""
    num_bytes: int
    """Bytes of its members that were read."""


class _Index(NamedTuple):
    """The columns of an index that reading needs, and the tars that they point into."""

    texts: dict[str, pa.Array]
    numbers: dict[str, NDArray[np.int64]]
    file: ShardFile
    hf_file: ShardFile

    def span(self, member: str, row: int) -> Span:
        """Where a member lies."""
        file = self.file if member == "image" else self.hf_file
        return Span(
            file, int(self.numbers[f"{member}_offset"][row]), int(self.numbers[f"{member}_size"][row])
        )

    def spans(self, row: int) -> list[Span]:
        """What is read for a sample: one span over neighboring members, or one in each of two tars."""
        image, hf_map = self.span("image", row), self.span("hfmap", row)
        if image.file != hf_map.file:
            return [image, hf_map]
        return [Span(image.file, image.offset, hf_map.offset + hf_map.size - image.offset)]


class ShardReader:
    """Random access to the samples of a snapshot.

    Loads indices when they are first needed, and holds a bounded number of them. May be pickled; the copy
    opens files and connections of its own.

    Args:
        place: the dataset.
        snapshot: which of its states; shards are numbered as in `snapshot.shards`.
        hf_digests: HF version of each modality; of those that are not named, the one in the tar.
        remote: how a dataset that is not on this machine is read.

    Raises:
        ConfigError, EnvironmentFault: the folder of the cache cannot be used.
    """

    def __init__(
        self,
        place: Store | Path | str,
        snapshot: Snapshot,
        hf_digests: Mapping[str, str] | None = None,
        remote: RemoteConfig | None = None,
    ) -> None:
        self.store, self.snapshot = open_store(place), snapshot
        self._hf_digests, self._remote = dict(hf_digests or {}), remote or RemoteConfig()
        self._access = open_access(self.store, self._remote)
        # the cache knows nothing of the reader: a cycle would keep files open until the next collection
        load = partial(_load_index, self.store, snapshot, self._hf_digests)
        self._index_or_error = lru_cache(maxsize=MAX_OPEN_SHARDS)(load)

    def __reduce__(self) -> tuple[object, ...]:
        return ShardReader, (self.store, self.snapshot, self._hf_digests, self._remote)

    def read(self, shard: int, row: int) -> Sample:
        """Read and decode the image and the response map of one sample.

        Raises:
            DataError: the shard or its index is missing, cut short or damaged; names shard and key.
            EnvironmentFault: the place cannot be reached.
        """
        (sample,) = self.read_many([(shard, row)])
        if isinstance(sample, DataError):
            raise sample
        return sample

    def read_many(self, places: Sequence[Place]) -> Iterator[Sample | DataError]:
        """Read samples in the order given, side by side where the place is remote.

        Yields:
            For each the sample, or what is wrong with it.

        Raises:
            EnvironmentFault: the place cannot be reached.
        """
        needed = list(dict.fromkeys(shard for shard, _ in places))
        indices = dict(zip(needed, self._access.map(self._index_or_error, needed), strict=True))
        found = [(shard, row, indices[shard]) for shard, row in places]
        spans = [[] if isinstance(index, DataError) else index.spans(row) for _, row, index in found]
        data = self._access.read(list(chain.from_iterable(spans)))
        for (shard, row, index), wanted in zip(found, spans, strict=True):
            if isinstance(index, DataError):
                yield copy(index)
                continue
            parts = {span: next(data) for span in wanted}
            try:
                yield self._decode(shard, row, index, parts)
            except DataError as error:
                yield error

    def read_bytes(self, shard: int, row: int, member: str = "image") -> bytes:
        """Read one member, "image" or "hfmap", checked and as stored.

        Raises:
            DataError, EnvironmentFault: as of `read`.
        """
        index = self._index(shard)
        span = index.span(member, row)
        parts = dict(zip([span], self._access.read([span]), strict=True))
        return self._member(member, row, index, parts)

    def labels(self, shard: int, row: int) -> dict[str, Any]:
        """Labels of a sample, empty where it has none.

        Raises:
            DataError: the index is missing or damaged.
        """
        labels: dict[str, Any] = json.loads(self._index(shard).texts["labels"][row].as_py())
        return labels

    def where(self, shard: int, row: int) -> str:
        """Name a sample for people: shard and key, or shard and row when the index cannot be read."""
        path = self.store.where(self.snapshot.shards[shard].path)
        try:
            return f"{path}, sample {self._index(shard).texts['key'][row].as_py()}"
        except DataError:
            return f"{path}, row {row}"

    def prefetch(self, shards: Sequence[int]) -> None:
        """Say which shards will be needed, so that they are got in the background; see `Access.prefetch`."""
        infos = [self.snapshot.shards[shard] for shard in shards]
        files = [file for info in infos for file in shard_files(info, self._hf_digests)]
        self._access.prefetch(list(dict.fromkeys(files)))

    def take_requests(self) -> CacheRequests:
        """See `Access.take_requests`."""
        return self._access.take_requests()

    def _index(self, shard: int) -> _Index:
        index = self._index_or_error(shard)
        if isinstance(index, DataError):
            raise copy(index)  # raised itself, it would collect tracebacks
        return index

    def _decode(self, shard: int, row: int, index: _Index, parts: Mapping[Span, bytes | DataError]) -> Sample:
        where = self.where(shard, row)
        image, hf_map = (self._member(name, row, index, parts) for name in ("image", "hfmap"))
        texts, numbers = index.texts, index.numbers
        stored = Stored(
            texts["image_ext"][row].as_py(),
            texts["dtype"][row].as_py(),
            *(int(numbers[name][row]) for name in ("height", "width", "channels")),
        )
        return Sample(
            key=texts["key"][row].as_py(),
            image=decode_image(image, stored, where),
            hf_map=decode_map(hf_map, where),
            num_bytes=len(image) + len(hf_map),
        )

    def _member(self, member: str, row: int, index: _Index, parts: Mapping[Span, bytes | DataError]) -> bytes:
        """Cut a member out of what was read, and check it; damaged bytes are asked for once more."""
        wanted, crc = index.span(member, row), int(index.numbers[f"{member}_crc32c"][row])
        span = next(s for s in parts if s.file == wanted.file and s.offset <= wanted.offset)
        data = parts[span]
        if isinstance(data, bytes):
            data = data[wanted.offset - span.offset :][: wanted.size]
        problem = _problem(data, member, wanted.size, crc)
        if problem:
            again = self._access.read_again(wanted)
            if again is not None:
                data = again
                problem = _problem(data, member, wanted.size, crc)
        if problem:
            raise DataError(
                problem,
                where=f"{self.store.where(wanted.file.path)}, sample {index.texts['key'][row].as_py()}",
                fix="restore the shard, build the dataset again, or set bad_samples: skip",
            )
        assert isinstance(data, bytes)
        return data


def _problem(data: bytes | DataError, member: str, size: int, crc: int) -> str:
    """What is wrong with the bytes of a member, empty where nothing is."""
    if isinstance(data, DataError):
        return f"the shard cannot be read: {data.what}"
    if len(data) != size:
        return f"the shard is cut short: {len(data)} of {size} bytes"
    if google_crc32c.value(data) != crc:
        return f"the bytes of {member} are damaged (crc32c differs)"
    return ""


def shard_files(info: ShardInfo, hf_digests: Mapping[str, str]) -> tuple[ShardFile, ShardFile]:
    """The tars that hold the images and the response maps of a shard."""
    file = ShardFile(info.path, info.num_bytes, info.crc32c)
    version = info.hf.get(hf_digests.get(info.modality, ""))
    if version is None:
        return file, file
    path = hf_tar_path(info.path, hf_digests[info.modality])
    return file, ShardFile(path, version.num_bytes, version.crc32c)


def _load_index(
    store: Store, snapshot: Snapshot, hf_digests: Mapping[str, str], shard: int
) -> _Index | DataError:
    """Load an index; what is wrong with it is remembered too, or it would be asked for at each sample."""
    info = snapshot.shards[shard]
    file, hf_file = shard_files(info, hf_digests)
    try:
        table = read_index(store, info, [*_TEXT_COLUMNS, *_IMAGE_COLUMNS, *_MAP_COLUMNS])
        numbers = {name: _numbers(table, name) for name in (*_IMAGE_COLUMNS, *_MAP_COLUMNS)}
        if hf_file != file:
            version = read_hf_index(store, info, hf_digests[info.modality])
            if not version["key"].equals(table["key"]):
                raise DataError("other samples than the shard's", where=store.where(hf_file.path))
            numbers |= {name: _numbers(version, name) for name in _MAP_COLUMNS}
    except DataError as error:
        return error
    texts = {name: table[name].combine_chunks() for name in _TEXT_COLUMNS}
    return _Index(texts, numbers, file, hf_file)


def _numbers(table: pa.Table, name: str) -> NDArray[np.int64]:
    return table[name].to_numpy().astype(np.int64)  # type: ignore[no-any-return]
