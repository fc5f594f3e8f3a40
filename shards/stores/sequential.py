"""Reads a file of a store from front to back in large pieces, and its checksum on the way."""

from __future__ import annotations

from collections.abc import Iterator

import google_crc32c

from shards.stores.store import Store

PIECE_BYTES = 8 << 20
"""Read at once: large enough that a remote store's latency is small beside the transfer."""


class SequentialReader:
    """One file, read once; holds one piece in memory.

    Args:
        store: where it lies.
        path: its name there.
        num_bytes: its size; reading ends there, or before where the file does.

    Attributes:
        position: bytes taken so far.

    All methods raise `MissingFile` when there is no such file, and `EnvironmentFault` when the store cannot
    be reached.
    """

    def __init__(self, store: Store, path: str, num_bytes: int) -> None:
        self._store, self._path, self._num_bytes = store, path, num_bytes
        self._checksum = google_crc32c.Checksum()
        self._piece, self._start, self._fetched = b"", 0, 0
        self.position = 0

    def take(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end of the file."""
        parts = []
        while size > 0 and self._fill():
            part = self._piece[self._start : self._start + size]
            self._advance(len(part))
            size -= len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, size: int) -> None:
        """Pass over bytes; memory stays bounded, however many they are."""
        while size > 0 and self._fill():
            step = min(size, len(self._piece) - self._start)
            self._advance(step)
            size -= step

    def pieces(self) -> Iterator[bytes]:
        """The rest of the file, piece by piece."""
        while self._fill():
            part = self._piece[self._start :]
            self._advance(len(part))
            yield part

    def finish(self) -> int:
        """Read to the end; return the crc32c of the whole file."""
        for _ in self.pieces():
            pass
        return int.from_bytes(self._checksum.digest(), "big")

    def _advance(self, size: int) -> None:
        self._start += size
        self.position += size

    def _fill(self) -> bool:
        """See that the piece holds bytes; False at the end of the file."""
        if self._start < len(self._piece):
            return True
        size = min(PIECE_BYTES, self._num_bytes - self._fetched)
        self._piece = self._store.read_range(self._path, self._fetched, size) if size > 0 else b""
        self._start = 0
        self._fetched += len(self._piece)
        self._checksum.update(self._piece)
        return bool(self._piece)
