"""A folder of whole remote shards on this machine, shared by its processes: bounded, checked, safe to kill.

    FOLDER/CRC32C-SIZE-NAME.tar                 a shard, verified; its time of change is that of its last use
    FOLDER/CRC32C-SIZE-NAME.tar.frepa-tmp-...   one that is being downloaded, at its full size from the start
    FOLDER/.lock-*                              locks, held by `flock`: they end with the process

Whoever downloads a shard holds the lock of its checksum, so that others wait for it instead of downloading
it too. Whoever makes room holds the lock of the folder. A download holds a lock on its temporary file: one
that is not locked is what a killed process has left. The folder must be on a local file system.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import google_crc32c

from shards.stores.atomic import TEMP_MARK
from shards.stores.parts import read_parts
from shards.stores.store import Store
from shards.support.errors import ConfigError, DataError, EnvironmentFault, FrepaError

DOWNLOAD_ATTEMPTS = 2
"""A shard that comes with a wrong checksum is downloaded once more."""

NUM_LOCKS = 256
WAIT_SECONDS = 0.05
_ENTRY_PATTERN = re.compile(rf"[0-9a-f]{{8}}-[0-9]+-.*?({re.escape(TEMP_MARK)}.*)?")


class Wanted(NamedTuple):
    """A shard of a store, as the snapshot describes it."""

    path: str
    num_bytes: int
    crc32c: int


class ShardCache:
    """The cache.

    Args:
        folder: where; made for this user only if it does not exist.
        max_bytes: what the shards in it may take together, those that are being downloaded included. A shard
            that a process holds open keeps its room on the disk until it is closed, also when it was evicted.

    Raises:
        EnvironmentFault: the folder cannot be used, or belongs to another user.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(os.path.abspath(folder)), max_bytes
        self._wanted: deque[tuple[Store, Wanted]] = deque()
        self._prefetcher: threading.Thread | None = None
        self._mutex = threading.Lock()
        with self._explained():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.folder.stat().st_uid
        if owner not in (os.getuid(), 0):
            raise EnvironmentFault(
                "the cache's folder belongs to another user, who could change what is read from it",
                where=self.folder,
                fix="choose another folder",
            )
        with self._explained(), self._locked("folder"):
            self._examine()

    def __reduce__(self) -> tuple[object, ...]:
        return ShardCache, (self.folder, self.max_bytes)

    def fetch(self, store: Store, path: str, num_bytes: int, crc32c: int) -> Path:
        """Get a shard; return its file here, which a later `fetch`, also another process's, may evict.

        Args:
            store: where the shard is.
            path: its path in the store.
            num_bytes: its size.
            crc32c: its checksum; with the size, what it is known by here.

        Raises:
            ConfigError: the shard is larger than the cache may be.
            DataError: the shard is missing, or not the one that is described.
            EnvironmentFault: the disk is full, or the store cannot be reached.
        """
        os.close(self.open(store, path, num_bytes, crc32c)[0])
        return self._entry(path, num_bytes, crc32c)

    def open(self, store: Store, path: str, num_bytes: int, crc32c: int) -> tuple[int, bool]:
        """Get a shard; return a file descriptor that stays good when it is evicted, for the caller to close.

        Also whether the shard was there, so that nothing had to be waited for. Raises as `fetch`.
        """
        if num_bytes > self.max_bytes:
            raise ConfigError(
                f"the shard has {num_bytes} bytes, the cache may have {self.max_bytes}",
                where=store.where(path),
                fix="allow the cache more bytes, or read the dataset by ranges",
            )
        entry = self._entry(path, num_bytes, crc32c)
        with self._explained():
            descriptor = _open_used(entry, num_bytes)
            if descriptor is not None:
                return descriptor, True
            with self._locked(f"{crc32c % NUM_LOCKS:02x}"):
                descriptor = _open_used(entry, num_bytes)  # by whom we may have waited for
                if descriptor is None:
                    descriptor = self._download(store, Wanted(path, num_bytes, crc32c), entry)
                return descriptor, False

    def prefetch(self, store: Store, shards: Iterable[tuple[str, int, int]]) -> None:
        """Begin to fetch shards in the background, one after the other, and return at once.

        What an earlier call asked for and has not begun is forgotten. At most half of the cache is filled
        so. What goes wrong is said when the shard is fetched.

        Args:
            store: where the shards are.
            shards: path, size and crc32c of each.
        """
        room, wanted = self.max_bytes // 2, deque[tuple[Store, Wanted]]()
        for shard in itertools.starmap(Wanted, shards):
            room -= shard.num_bytes
            if room < 0:
                break
            wanted.append((store, shard))
        with self._mutex:
            self._wanted = wanted
            # a fork leaves the thread behind; a daemon: a download must not keep a process that ends
            if wanted and (self._prefetcher is None or not self._prefetcher.is_alive()):
                self._prefetcher = threading.Thread(target=self._fetch_wanted, daemon=True)
                self._prefetcher.start()

    def _fetch_wanted(self) -> None:
        while True:
            with self._mutex:
                if not self._wanted:
                    self._prefetcher = None
                    return
                store, shard = self._wanted.popleft()
            with suppress(FrepaError):
                self.fetch(store, *shard)

    def _entry(self, path: str, num_bytes: int, crc32c: int) -> Path:
        name = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(path).name)
        return self.folder / f"{crc32c:08x}-{num_bytes}-{name}"

    def _download(self, store: Store, shard: Wanted, entry: Path) -> int:
        """Download a shard, verify it, and only then give it its name; return it open."""
        temporary, descriptor = self._reserve(entry, shard.num_bytes)
        try:
            for _ in range(DOWNLOAD_ATTEMPTS):
                found = _copy(store, shard, descriptor)
                if found == shard.crc32c:
                    os.fdatasync(descriptor)  # a crash of the machine must not leave a name without its bytes
                    with self._locked("folder"):  # or who adds up the room may see neither name
                        os.rename(temporary, entry)
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
                    return descriptor
            raise DataError(
                f"not the shard of the snapshot: its crc32c is {found:08x}, not {shard.crc32c:08x}",
                where=store.where(shard.path),
                fix="restore the shard, or build the dataset again",
            )
        except BaseException:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)
            raise

    def _reserve(self, entry: Path, num_bytes: int) -> tuple[Path, int]:
        """Make a temporary file of full size, after evicting what it takes."""
        temporary = entry.with_name(f"{entry.name}{TEMP_MARK}{os.getpid()}-{threading.get_ident()}")
        while True:
            with self._locked("folder"):
                entries, busy_bytes = self._examine()
                used = busy_bytes + sum(size for _, size in entries)
                while entries and used + num_bytes > self.max_bytes:
                    used -= _evict(entries)
                if used + num_bytes <= self.max_bytes:
                    return temporary, self._allocate(temporary, num_bytes, entries)
            time.sleep(WAIT_SECONDS)  # all the room is taken by downloads; each becomes an entry

    def _allocate(self, temporary: Path, num_bytes: int, entries: deque[tuple[Path, int]]) -> int:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            while True:
                try:
                    os.posix_fallocate(descriptor, 0, num_bytes)
                    return descriptor
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not entries:
                        raise
                _evict(entries)  # others have filled the disk: make do with less
        except BaseException:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)
            raise

    def _examine(self) -> tuple[deque[tuple[Path, int]], int]:
        """List the entries, least recently used first, and sum up the downloads; remove dead ones."""
        entries: list[tuple[int, Path, int]] = []
        busy_bytes = 0
        for item in os.scandir(self.folder):
            match = _ENTRY_PATTERN.fullmatch(item.name)
            if match is None:
                continue
            path = Path(item.path)
            try:
                facts = item.stat()
            except FileNotFoundError:
                continue  # a download that ended meanwhile
            if match[1] is None:
                entries.append((facts.st_mtime_ns, path, facts.st_size))
            elif _is_held(path):
                busy_bytes += facts.st_size
            else:
                path.unlink(missing_ok=True)
        return deque((path, size) for _, path, size in sorted(entries)), busy_bytes

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        descriptor = os.open(self.folder / f".lock-{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile holds a copy
            os.close(descriptor)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EnvironmentFault(
                f"the cache cannot be written: {error.strerror or error}",
                where=self.folder,
                fix="free disk space there, allow the cache fewer bytes, or choose another folder for it",
            ) from error


def cache_size(folder: Path) -> int:
    """Bytes of the shards in a cache's folder, those that are being downloaded included."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as items:
        for item in items:
            if _ENTRY_PATTERN.fullmatch(item.name):
                with suppress(FileNotFoundError):  # evicted meanwhile
                    total += item.stat().st_size
    return total


def _open_used(entry: Path, num_bytes: int) -> int | None:
    """Open an entry and note that it was used; None where there is none of that size."""
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size != num_bytes:
        os.close(descriptor)
        return None
    os.utime(descriptor)
    return descriptor


def _copy(store: Store, shard: Wanted, descriptor: int) -> int:
    """Write a shard's bytes to a file that has its size; return their checksum."""
    checksum, offset = google_crc32c.Checksum(), 0
    for part in read_parts(lambda start, size: store.read_range(shard.path, start, size), shard.num_bytes):
        checksum.update(part)
        left = memoryview(part)
        while left:  # a write may be a short one
            written = os.pwrite(descriptor, left, offset)
            offset, left = offset + written, left[written:]
    return int.from_bytes(checksum.digest(), "big")


def _evict(entries: deque[tuple[Path, int]]) -> int:
    path, size = entries.popleft()
    path.unlink(missing_ok=True)
    return size


def _is_held(path: Path) -> bool:
    """Whether a process is writing a temporary file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
