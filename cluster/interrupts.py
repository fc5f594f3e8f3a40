"""Ctrl-C and SIGTERM as something to look at, for commands that run until they are told to end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def interrupted_by(*numbers: signal.Signals) -> Iterator[Callable[[], bool]]:
    """Take signals for the length of the block; what is yielded says whether one came."""
    came: list[int] = []

    def hear(number: int, _: FrameType | None) -> None:
        came.append(number)

    before: dict[int, Any] = {number: signal.signal(number, hear) for number in numbers}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
