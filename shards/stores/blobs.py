"""One object of a source, read lazily: its head, the whole, or as a file for readers that need one."""

from __future__ import annotations

import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, BinaryIO

from shards.stores.store import is_remote
from shards.support.errors import DataError, EnvironmentFault


class ChangedObject(DataError):
    """An object is not what it was when it was listed, or is gone."""


class Blob(ABC):
    """The bytes of one object.

    Attributes:
        uri: where it is, private.
        name: file name with its suffix, for formats that are told by it (`.nii.gz`).
        num_bytes: its size when it was listed.
    """

    uri: str
    name: str
    num_bytes: int

    @abstractmethod
    def head(self, num_bytes: int) -> bytes:
        """The first bytes; fewer where the object is smaller.

        Raises:
            ChangedObject: the object is gone, or another one than listed.
            OSError: a local file cannot be read.
            EnvironmentFault: a remote one cannot be read.
        """

    @abstractmethod
    def read(self) -> bytes:
        """All bytes; raises as `head`."""

    def sha256(self) -> bytes:
        """Digest of all bytes."""
        return hashlib.sha256(self.read()).digest()

    @contextmanager
    def as_file(self) -> Iterator[Path]:
        """The object as a file on this machine, for the length of the block.

        Raises:
            EnvironmentFault: there is no room for it; else as `head`.
        """
        data = self.read()
        with temporary_file(self.name) as file:
            with writing_temporary():
                file.write(data)
                file.flush()
            yield Path(file.name)


class BytesBlob(Blob):
    """Bytes that are in memory already."""

    def __init__(self, data: bytes, name: str = "") -> None:
        self.uri, self.name, self.num_bytes, self._data = name, Path(name).name, len(data), data

    def head(self, num_bytes: int) -> bytes:
        """The first bytes."""
        return self._data[:num_bytes]

    def read(self) -> bytes:
        """All bytes."""
        return self._data


class FileBlob(Blob):
    """A file; read once, then held.

    Args:
        path: where it is.
        num_bytes: its size when it was listed.
        version: what `file_version` said then; "" for any.
    """

    def __init__(self, path: str, num_bytes: int, version: str = "") -> None:
        self.uri, self.name, self.num_bytes = path, Path(path).name, num_bytes
        self._version = version
        self._data: bytes | None = None

    def head(self, num_bytes: int) -> bytes:
        """The first bytes."""
        if self._data is not None:
            return self._data[:num_bytes]
        with self._open() as file:
            return file.read(num_bytes)

    def read(self) -> bytes:
        """All bytes."""
        if self._data is None:
            with self._open() as file:
                self._data = file.read()
        return self._data

    @contextmanager
    def as_file(self) -> Iterator[Path]:
        """The file itself."""
        with self._open():
            yield Path(self.uri)

    def _open(self) -> BinaryIO:
        fix = "run the same command again, which lists the source anew"
        try:
            file = open(self.uri, "rb")  # noqa: SIM115 (the caller closes it)
        except (FileNotFoundError, NotADirectoryError):
            raise ChangedObject("the file is gone since it was listed", where=self.uri, fix=fix) from None
        facts = os.fstat(file.fileno())
        if facts.st_size != self.num_bytes or self._version not in ("", file_version(facts)):
            file.close()
            raise ChangedObject("the file was changed since it was listed", where=self.uri, fix=fix)
        return file


def open_blob(uri: str, num_bytes: int, version: str) -> Blob:
    """Open an object of a source, local or in S3, as it was listed.

    Args:
        uri: an absolute path, or `s3://bucket/key`.
        num_bytes: its size.
        version: entity tag of an object in S3, `file_version` of a file; "" for any.
    """
    if is_remote(uri):
        from shards.stores.s3 import S3Blob  # boto3 takes .3 s to import, and local builds never need it

        return S3Blob(uri, num_bytes, version)
    return FileBlob(uri, num_bytes, version)


def file_version(facts: os.stat_result) -> str:
    """What tells a changed file from the one that was listed, besides its size."""
    return str(facts.st_mtime_ns)


def temporary_file(name: str) -> AbstractContextManager[IO[bytes]]:
    """Open a temporary file for the object of a name, in the folder that TMPDIR names.

    Raises:
        EnvironmentFault: it cannot be made.
    """
    with writing_temporary():
        return NamedTemporaryFile(suffix=temporary_suffix(name))


@contextmanager
def writing_temporary() -> Iterator[None]:
    """Turn an `OSError` of writing a temporary file into a fault of this machine, which no object has."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"no temporary file can be written: {error.strerror or error}",
            where=tempfile.gettempdir(),
            fix="free disk space, or set TMPDIR to a folder with more",
        ) from error


def temporary_suffix(name: str) -> str:
    """The suffixes that readers tell formats by (".nii.gz"), and nothing else of a private name."""
    path = Path(name)
    return Path(path.stem).suffix + path.suffix if path.suffix == ".gz" else path.suffix
