"""Where a dataset lies: a folder, or a prefix of an S3 bucket; the one interface of both.

Files of a store are named by relative paths with `/`. A file appears whole or not at all, under whatever name
it is written, and a reader never sees a part of one.
"""

from __future__ import annotations

import fcntl
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shards.stores.atomic import TEMP_MARK, remove_temporaries, replace_file, writing_to
from shards.support.errors import DataError, EnvironmentFault

S3_PREFIX = "s3://"
BUILD_LOCK = ".build.lock"


class MissingFile(DataError):
    """There is no such file or object."""


class Stored(NamedTuple):
    """A file of a store."""

    path: str
    num_bytes: int


class Store(ABC):
    """A place for files. May be pickled; the copy opens connections of its own.

    Attributes:
        uri: the place as text, `s3://bucket/prefix` or an absolute path; enters error messages.

    All methods raise `EnvironmentFault` when the place cannot be reached or written.
    """

    uri: str

    def __str__(self) -> str:
        return self.uri

    def where(self, path: str) -> str:
        """Name a file for people."""
        return f"{self.uri}/{path}" if path else self.uri

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Read a whole file.

        Raises:
            MissingFile: there is none.
        """

    @abstractmethod
    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset` on; fewer where the file ends before.

        Raises:
            MissingFile: there is none.
        """

    @abstractmethod
    def num_bytes(self, path: str) -> int | None:
        """Size of a file, None where there is none."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Write a file whole, replacing one that is there."""

    @abstractmethod
    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        """Write a pointer only if the file still holds `expected` (None: does not exist).

        Raises:
            EnvironmentFault: another writer was faster.
        """

    @abstractmethod
    def writing(self, path: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for writing large content; it appears when the block ends well, else nothing does.

        The file may be read back and sought inside the block.
        """

    @abstractmethod
    def delete(self, path: str) -> None:
        """Delete a file; nothing happens where there is none."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Stored]:
        """List the files whose path begins with `prefix`, in the order of their paths' bytes."""

    @abstractmethod
    def lock(self, owner: str) -> AbstractContextManager[None]:
        """Hold the place against other builders for the length of the block.

        Args:
            owner: names the state folder that builds here. Whoever calls holds that folder, so a lock of the
                same owner is what a killed build has left.

        Raises:
            EnvironmentFault: another builder holds it.
        """

    def local_path(self, path: str) -> Path | None:
        """Where the file lies on this machine's file system, None for a remote store."""
        return None


class LocalStore(Store):
    """A folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.uri = str(self.folder)

    def read(self, path: str) -> bytes:
        """Read a whole file."""
        with self._reading(path):
            return (self.folder / path).read_bytes()

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """Read a part of a file."""
        with self._reading(path), (self.folder / path).open("rb") as file:
            return os.pread(file.fileno(), size, offset)

    def num_bytes(self, path: str) -> int | None:
        """Size of a file, None where there is none."""
        try:
            return (self.folder / path).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise EnvironmentFault(f"cannot be examined: {error.strerror}", where=self.where(path)) from error

    def write(self, path: str, data: bytes) -> None:
        """Write a file whole."""
        with self.writing(path) as file:
            file.write(data)

    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        """Write a pointer; only the holder of the lock does it, so a look beforehand is enough."""
        found = self.read(path) if self.num_bytes(path) is not None else None
        if found != expected:
            raise faster_writer(self.where(path))
        self.write(path, data)

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        """Open a temporary neighbor, renamed at the end."""
        target = self.folder / path
        with writing_to(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(target) as file:
            yield file

    def delete(self, path: str) -> None:
        """Delete a file."""
        with writing_to(self.folder / path):
            (self.folder / path).unlink(missing_ok=True)

    def list(self, prefix: str = "") -> Iterator[Stored]:
        """List files; temporaries of other writers and locks are none."""
        top = self.folder / prefix.rpartition("/")[0]
        if not top.is_dir():
            return
        files = (
            path
            for path in top.rglob("*")
            if path.is_file() and not path.name.startswith(".") and TEMP_MARK not in path.name
        )
        names = (path.relative_to(self.folder).as_posix() for path in files)
        for name in sorted((name for name in names if name.startswith(prefix)), key=os.fsencode):
            num_bytes = self.num_bytes(name)
            if num_bytes is not None:  # not deleted meanwhile
                yield Stored(name, num_bytes)

    @contextmanager
    def lock(self, owner: str) -> Iterator[None]:
        """Hold the folder; the lock ends with the process, however it ends."""
        with lock_folder(self.folder):
            remove_temporaries(self.folder, *(path for path in self.folder.iterdir() if path.is_dir()))
            yield

    def local_path(self, path: str) -> Path | None:
        """Where the file lies."""
        return self.folder / path

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise MissingFile(
                "no such file", where=self.where(path), fix="restore the file, or build again"
            ) from None
        except OSError as error:
            raise EnvironmentFault(f"cannot be read: {error.strerror}", where=self.where(path)) from error


def open_store(place: Store | Path | str) -> Store:
    """Open a place: `s3://bucket/prefix`, or a folder, which need not exist yet.

    Raises:
        ConfigError: the text is no place.
    """
    if isinstance(place, Store):
        return place
    if is_remote(place):
        from shards.stores.s3_store import (
            S3Store,  # boto3 takes .3 s to import, and most programs never need it
        )

        return S3Store(str(place))
    return LocalStore(Path(place))


def is_remote(place: Path | str) -> bool:
    """Whether a place is in S3."""
    return str(place).startswith(S3_PREFIX)


def faster_writer(where: str) -> EnvironmentFault:
    """Make the error of a conditional write that lost."""
    return EnvironmentFault(
        "another program has written here since this one read it",
        where=where,
        fix="see that one builder at a time writes to a dataset, then run the same command again",
    )


@contextmanager
def lock_folder(folder: Path, *, name: str = BUILD_LOCK, mode: int = 0o777) -> Iterator[None]:
    """Hold a folder against other processes; the lock ends with the process, however it ends.

    Args:
        folder: what is held; it is made with `mode` if need be.
        name: of the lock file in it.
        mode: permissions of a new folder.

    Raises:
        EnvironmentFault: another process holds it, or the folder cannot be written.
    """
    path = folder / name
    with writing_to(folder):
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentFault(
                "another process is writing here",
                where=folder,
                fix="wait for it, or choose another destination",
            ) from None
        yield
    finally:
        os.close(descriptor)
