"""Large remote files, read in parts side by side: a fault costs one part, and memory stays bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

PART_BYTES = 8 << 20
PARTS_AT_ONCE = 4
"""Parts under way; they pay where a single connection is slower than the network."""


def read_parts(
    read: Callable[[int, int], bytes],
    num_bytes: int,
    *,
    part_bytes: int = PART_BYTES,
    at_once: int = PARTS_AT_ONCE,
) -> Iterator[bytes]:
    """Yield a file's parts in their order.

    Args:
        read: reads (offset, size), from several threads.
        num_bytes: size of the file.
        part_bytes: size of a part.
        at_once: parts under way, so `part_bytes * at_once` is the memory that this takes.
    """
    spans = iter([(start, min(part_bytes, num_bytes - start)) for start in range(0, num_bytes, part_bytes)])
    if num_bytes <= part_bytes:
        yield from (read(*span) for span in spans)
        return
    pool = ThreadPoolExecutor(at_once, "parts")
    try:
        coming: deque[Future[bytes]] = deque()
        for span in spans:
            coming.append(pool.submit(read, *span))
            if len(coming) == at_once:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
