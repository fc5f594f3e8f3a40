"""How byte ranges of shards are got: from local files, through a cache of whole shards, or range by range."""

from __future__ import annotations

import errno
import os
import tempfile
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Literal, NamedTuple, TypeVar

from shards.stores.cache import ShardCache, Wanted
from shards.stores.store import MissingFile, Store
from shards.support.errors import DataError, EnvironmentFault

MAX_OPEN_SHARDS = 256
"""Shard files held open; a rank uses about streams x block_shards / ranks."""

MAX_REQUESTS = 16
"""Requests to a remote store that one process has under way."""

MAX_DOWNLOADS = 4
"""Whole shards among them."""

T = TypeVar("T")
R = TypeVar("R")


class ShardFile(NamedTuple):
    """A tar of a snapshot."""

    path: str
    num_bytes: int
    crc32c: int


class Span(NamedTuple):
    """Bytes of a tar."""

    file: ShardFile
    offset: int
    size: int


class CacheRequests(NamedTuple):
    """How often shards were asked of the cache to be read; to get them ahead is no request.

    Attributes:
        hit: they were there.
        miss: their download had to be waited for, whoever had begun it.
    """

    hit: int = 0
    miss: int = 0


class RemoteConfig(NamedTuple):
    """How a remote dataset is read; see `shards.read.config.AccessConfig`."""

    mode: Literal["cache", "range"] = "cache"
    cache_dir: Path | None = None
    cache_bytes: int = 64 << 30


class Access(ABC):
    """Reads bytes of the tars of one dataset."""

    @abstractmethod
    def read(self, spans: Sequence[Span]) -> Iterator[bytes | DataError]:
        """Read spans in their order; fewer bytes where a file ends before, an error where there is none.

        Raises:
            EnvironmentFault: the place cannot be reached.
        """

    def read_again(self, span: Span) -> bytes | DataError | None:
        """Read a span past every copy, since it came damaged; None where there is no other way."""
        return None

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """Apply a function that waits for the store to many items, side by side where that helps."""
        return map(function, items)

    def take_requests(self) -> CacheRequests:
        """Requests to the cache since the last call, of this object; none where there is no cache."""
        return CacheRequests()

    def prefetch(self, files: Sequence[ShardFile]) -> None:  # noqa: B027 (only a cache has where to put them)
        """Say which files will be needed, instead of those that were said before, and return at once."""


def open_access(store: Store, config: RemoteConfig) -> Access:
    """Choose the way for a store.

    Raises:
        ConfigError, EnvironmentFault: the cache's folder cannot be used.
    """
    if store.local_path("") is not None:
        return LocalAccess(store)
    if config.mode == "range":
        return RangedAccess(store)
    return CachedAccess(store, ShardCache(config.cache_dir or default_cache_dir(), config.cache_bytes))


def default_cache_dir() -> Path:
    """A folder of this user's below the system's folder for temporary files (TMPDIR)."""
    return Path(tempfile.gettempdir()) / f"frepa-shards-{os.getuid()}"


class LocalAccess(Access):
    """Files of this machine: one `pread` per span, a bounded number of files held open."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, spans: Sequence[Span]) -> Iterator[bytes | DataError]:
        """See `Access`."""
        for span in spans:
            try:
                yield os.pread(self._open(span.file.path), span.size, span.offset)
            except OSError as error:
                yield _explain(error, self._store.where(span.file.path))

    def _open(self, path: str) -> int:
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            local = self._store.local_path(path)
            assert local is not None
            descriptor = self._descriptors[path] = os.open(local, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._descriptors) > MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(path)
        return descriptor


def _explain(error: OSError, where: str) -> DataError:
    """Make an error of what is wrong with a file; what is wrong with the machine is raised.

    Raises:
        EnvironmentFault: other files would fail as well.
    """
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return MissingFile("no such file", where=where)
    if error.errno == errno.EIO:  # a bad sector concerns what lies there
        return DataError(f"cannot be read: {error.strerror}", where=where)
    raise EnvironmentFault(f"cannot be read: {error.strerror}", where=where) from error


class RangedAccess(Access):
    """A remote store, a request per span, many at once."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(MAX_REQUESTS, "shard-requests")

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """See `Access`."""
        return self._pool.map(function, items)

    def read(self, spans: Sequence[Span]) -> Iterator[bytes | DataError]:
        """See `Access`; all spans are asked for at once, and wait in memory."""
        return self.map(self._request, spans)

    def read_again(self, span: Span) -> bytes | DataError | None:
        """See `Access`."""
        return self._request(span)

    def _request(self, span: Span) -> bytes | DataError:
        try:
            return self._store.read_range(span.file.path, span.offset, span.size)
        except DataError as error:
            return error


class CachedAccess(RangedAccess):
    """A remote store through a cache of whole shards on this machine.

    A shard that the cache refuses, since it is not the one of the snapshot, is read range by range: so a
    sample is lost only where its own bytes are damaged, as in a local dataset.
    """

    def __init__(self, store: Store, cache: ShardCache) -> None:
        super().__init__(store)
        self._cache = cache
        self._refused: set[ShardFile] = set()
        self._upcoming: Sequence[ShardFile] = []
        self._requests, self._lock = CacheRequests(), Lock()

    @cached_property
    def _downloads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(MAX_DOWNLOADS, "shard-downloads")

    def read(self, spans: Sequence[Span]) -> Iterator[bytes | DataError]:
        """See `Access`.

        Files are held open only meanwhile: one that is held keeps its room on the disk after it was evicted.
        """
        files = dict.fromkeys(span.file for span in spans)
        opening = {file: self._downloads.submit(self._open, file) for file in files}
        try:
            for span in spans:
                descriptor = opening[span.file].result()
                if descriptor is None:
                    yield self._request(span)
                else:
                    yield self._read_copy(descriptor, span)
        finally:
            for future in opening.values():
                if not future.cancel() and future.exception() is None:
                    descriptor = future.result()
                    if descriptor is not None:
                        os.close(descriptor)

    def _read_copy(self, descriptor: int, span: Span) -> bytes | DataError:
        try:
            return os.pread(descriptor, span.size, span.offset)
        except OSError:  # a bad sector under the copy is no damage of the shard
            return self._request(span)

    def prefetch(self, files: Sequence[ShardFile]) -> None:
        """See `Access`; one after the other."""
        if files != self._upcoming:
            self._upcoming = files
            self._cache.prefetch(self._store, [Wanted(*file) for file in files])

    def _open(self, file: ShardFile) -> int | None:
        if file in self._refused:
            return None
        try:
            descriptor, was_there = self._cache.open(self._store, *file)
        except DataError:
            self._refused.add(file)
            return None
        with self._lock:
            hit, miss = self._requests
            self._requests = CacheRequests(hit + was_there, miss + (not was_there))
        return descriptor

    def take_requests(self) -> CacheRequests:
        """See `Access`."""
        with self._lock:
            requests, self._requests = self._requests, CacheRequests()
        return requests
