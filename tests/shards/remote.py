"""A remote store for tests of the reading side: a folder behind an interface that counts and can fail."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

from shards.stores.store import LocalStore
from shards.support.errors import EnvironmentFault


class CountingStore(LocalStore):
    """Answers as S3 would, and remembers what it was asked.

    Attributes:
        ranges: (path, offset, size) of the range requests.
        whole: requests of whole files, by path, whether at one go or by ranges from a download.
        most_at_once: requests that were under way at the same time.
        fails: requests from this number on find nobody, None: none do.
    """

    def __init__(self, folder: Path, delay_seconds: float = 0.0) -> None:
        super().__init__(folder)
        self._delay = delay_seconds
        self.uri = "s3://bucket/dataset"
        self.ranges: list[tuple[str, int, int]] = []
        self.whole: Counter[str] = Counter()
        self.most_at_once = self._under_way = 0
        self.fails: int | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return CountingStore, (self.folder, self._delay)

    def read(self, path: str) -> bytes:
        with self._lock:
            self.whole[path] += 1
        return super().read(path)

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        with self._lock:
            self.ranges.append((path, offset, size))
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
            fails = self.fails is not None and len(self.ranges) > self.fails
        try:
            time.sleep(self._delay)
            if fails:
                raise EnvironmentFault("the server is gone", where=self.where(path))
            return super().read_range(path, offset, size)
        finally:
            with self._lock:
                self._under_way -= 1

    def local_path(self, path: str) -> Path | None:
        return None
