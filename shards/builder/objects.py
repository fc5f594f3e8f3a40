"""The objects of a plan as a worker meets them: told apart from what they were when the plan was made."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shards.formats.common import Opened, ReadOptions, Unreadable
from shards.formats.registry import open_object
from shards.stores.blobs import Blob, ChangedObject, open_blob
from shards.stores.store import is_remote
from shards.support.errors import EnvironmentFault, FrepaError

IDENTITY_BYTES = 16
UNKNOWN_IDENTITY = bytes(IDENTITY_BYTES)
"""Of an object that was never read."""

AHEAD, AHEAD_BYTES = 8, 16 << 20
"""Remote objects read ahead by a worker, and the size up to which they are."""

_CHUNK_BYTES = 1 << 22
_HELD_BYTES = 64 << 20  # larger files are hashed without being held: slides have gigabytes
_UNREACHABLE = frozenset(
    {
        errno.ESTALE,
        errno.ENOTCONN,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ETIMEDOUT,
        errno.ENODEV,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
    }
)
"""What goes wrong with a place or a machine; other errors are a single file's."""


@dataclass(frozen=True)
class PlannedObject:
    """An object with those of its units that go into one shard.

    Attributes:
        number: of the object within its source.
        name: identifies it within the source; bytes of a path.
        uri: where it is.
        num_bytes: its size when the plan was made.
        version: its ETag or time of change.
        identity: `content_identity` when the plan was made.
        labels: a JSON object.
        facts: what its header says, a JSON object.
        patient: salted, None when unknown.
        volume: salted, shared by the units of an object that has several, and by the objects of a series.
        first_slice: where its first unit lies in the volume.
        in_series: whether the volume has further objects.
        units: the unit's number in the object and its key in the dataset, of each unit to be made.
    """

    number: int
    name: bytes
    uri: str
    num_bytes: int
    version: str
    identity: bytes
    labels: str
    facts: str
    patient: str | None
    volume: str | None
    first_slice: int
    in_series: bool
    units: Sequence[tuple[int, str]]


def content_identity(blob: Blob, version: str) -> bytes:
    """Name what an object holds, in 16 bytes: of its content, or of its ETag and size where that is remote.

    A remote object is not read for it: its ETag changes with its content.
    """
    if is_remote(blob.uri):
        return hashlib.sha256(f"{version}|{blob.num_bytes}".encode()).digest()[:IDENTITY_BYTES]
    if blob.num_bytes <= _HELD_BYTES:
        return blob.sha256()[:IDENTITY_BYTES]
    digest = hashlib.sha256()
    with open(blob.uri, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.digest()[:IDENTITY_BYTES]


def read_ahead(
    items: Iterable[PlannedObject], is_left_out: Callable[[PlannedObject], bool] = lambda item: False
) -> Iterator[tuple[PlannedObject, Blob | None]]:
    """Yield objects in order; of remote ones of a moderate size the next few are being read meanwhile.

    A worker would else wait for the network between two decodings. Memory: `AHEAD` x `AHEAD_BYTES`.

    Args:
        items: the objects.
        is_left_out: objects that need not be read.

    Returns:
        Each object, and its bytes where they are at hand. What could not be read is left to be read again.
    """
    queue: deque[tuple[PlannedObject, Future[Blob | None] | None]] = deque()
    with ThreadPoolExecutor(AHEAD) as pool:
        for item in items:
            is_fetched = is_remote(item.uri) and item.num_bytes <= AHEAD_BYTES and not is_left_out(item)
            queue.append((item, pool.submit(_fetch, item) if is_fetched else None))
            if len(queue) > AHEAD:
                first, future = queue.popleft()
                yield first, future.result() if future else None
        for first, future in queue:
            yield first, future.result() if future else None


def _fetch(item: PlannedObject) -> Blob | None:
    try:
        blob = open_blob(item.uri, item.num_bytes, item.version)
        blob.read()
    except (FrepaError, OSError):
        return None
    return blob


@contextmanager
def open_planned(
    item: PlannedObject, options: ReadOptions, roots: Sequence[str], blob: Blob | None = None
) -> Iterator[tuple[Blob, Opened]]:
    """Open an object for decoding, if it still is what it was.

    Args:
        item: the object.
        options: how it is read.
        roots: local folders that the sources lie in, to tell a lost file from a lost disk.
        blob: its bytes, where they are at hand.

    Raises:
        Unreadable: with reason "changed" where it is gone or another one than planned, else as its reader
            says.
        EnvironmentFault: its place cannot be reached.
    """
    blob = blob or open_blob(item.uri, item.num_bytes, item.version)
    with reading_object(item.uri, roots):
        if content_identity(blob, item.version) != item.identity:
            raise Unreadable("changed", where=item.uri)
        opened = open_object(blob, options)
    with opened:
        yield blob, opened


@contextmanager
def reading_object(uri: str, roots: Sequence[str]) -> Iterator[None]:
    """Turn what goes wrong with one object into `Unreadable`; what goes wrong with its place stays a fault.

    Raises:
        Unreadable: the object is gone, another one, or cannot be read.
        EnvironmentFault: its place cannot be reached.
    """
    try:
        yield
    except (ChangedObject, FileNotFoundError) as error:
        _check_place(uri, roots)
        raise Unreadable("changed", where=uri) from error
    except OSError as error:
        if error.errno in _UNREACHABLE:
            raise _unreachable(uri, os.strerror(error.errno)) from error
        raise Unreadable("unreadable_file", error.strerror or "", where=uri) from error
    except FrepaError:
        raise
    except Exception as error:  # a bug: one object of millions must not end the build without its name
        error.add_note(f"while reading {uri}")
        raise


def _check_place(uri: str, roots: Sequence[str]) -> None:
    """Raise when a file is missing with the whole folder it belongs to: a disk that went away."""
    for root in roots:
        if Path(uri).is_relative_to(root) and not os.path.lexists(uri):
            try:
                with os.scandir(root) as entries:
                    if next(entries, None) is None:
                        raise _unreachable(root, "the source is empty all at once")
            except OSError as error:
                raise _unreachable(root, error.strerror or "it is gone") from error


def _unreachable(where: str, why: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"the source cannot be read: {why}",
        where=where,
        fix="make it reachable again, then run the same command again",
    )
