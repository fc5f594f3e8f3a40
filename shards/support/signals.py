"""Signals as calls of a function, for the length of a block."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def hearing(numbers: Iterable[int], hear: Callable[[int], None]) -> Iterator[None]:
    """Call `hear(number)` when one of these signals comes; afterwards it is answered as before.

    Only the main thread may enter the block.
    """

    def handle(number: int, _: FrameType | None) -> None:
        hear(number)

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
