"""Ctrl-C and SIGTERM as something to look at, for commands that run until they are told to end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shards.support.signals import hearing


@contextmanager
def interrupted_by(*numbers: signal.Signals) -> Iterator[Callable[[], bool]]:
    """Take signals for the length of the block; what is yielded says whether one came."""
    came: list[int] = []
    with hearing(numbers, came.append):
        yield lambda: bool(came)
