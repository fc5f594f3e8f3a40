"""What is appended to a run's files of JSON lines, read once."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


class Follower:
    """Reads a file of JSON lines as it grows; it need not be there yet.

    Args:
        path: the file.
        last_bytes: how much of its end is read at first; None reads all of it.
    """

    def __init__(self, path: Path, last_bytes: int | None = None) -> None:
        self._path, self._last_bytes = path, last_bytes
        self._inode, self._offset = -1, 0

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """What was appended since the last call.

        A line that is not whole yet is left for the next call; one that a crash has torn is left out.

        Returns:
            Whether the file is another one than before, as when a run goes back to a checkpoint, so that what
            was read of it no longer counts; and the new records.
        """
        try:
            with self._path.open("rb") as file:
                stat = os.fstat(file.fileno())
                is_new = stat.st_ino != self._inode or stat.st_size < self._offset
                if is_new:
                    self._inode, self._offset = stat.st_ino, 0
                    if self._last_bytes is not None and stat.st_size > self._last_bytes:
                        file.seek(stat.st_size - self._last_bytes - 1)
                        file.readline()  # to the beginning of a line
                        self._offset = file.tell()
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            had = self._inode >= 0
            self._inode, self._offset = -1, 0
            return had, []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        records = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return is_new, records
