"""Files that appear whole or not at all: written under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shards.support.errors import EnvironmentFault

TEMP_MARK = ".frepa-tmp-"


@contextmanager
def replace_file(path: Path, *, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Open a temporary neighbor of `path` for writing and rename it to `path` when the block ends well.

    The temporary name carries the process id, so two writers never share one. When the block raises, the
    temporary file is removed and `path` stays as it was.

    Raises:
        EnvironmentFault: the disk is full, the folder is read-only, or the device failed.
    """
    temp = path.with_name(f"{path.name}{TEMP_MARK}{os.getpid()}")
    with writing_to(path):
        try:
            with os.fdopen(os.open(temp, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode), "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temp.replace(path)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Replace a small text file: a reader sees the old or the new content, never a part.

    Raises:
        EnvironmentFault: as `replace_file`.
    """
    with replace_file(path) as file:
        file.write(text.encode())


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into an `EnvironmentFault` that names `path`."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"cannot be written: {error.strerror or error}",
            where=path,
            fix="free disk space or choose another destination, then run the same command again",
        ) from error


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(*folders: Path) -> None:
    """Delete what killed writers left in `folders`; call it while holding their lock."""
    for folder in folders:
        for path in folder.glob(f"*{TEMP_MARK}*"):
            path.unlink(missing_ok=True)
