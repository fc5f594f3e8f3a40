"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Progress:
    """Counts done units; draws a bar on a terminal, else prints a line at most every `interval_seconds`.

    Args:
        total: how many units there are, None when that is not known.
        description: what is being done, shown before the bar.
        unit: name of one unit, singular.
        initial: units that an earlier, interrupted attempt had done.
        interval_seconds: least time between two lines when stderr is no terminal.
        silent: show nothing; for the ranks and workers that another one speaks for.
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        *,
        unit: str = "image",
        initial: int = 0,
        interval_seconds: float = 15.0,
        silent: bool = False,
    ) -> None:
        self._total, self._description, self._unit = total, description, unit
        self._done, self._initial, self._note = initial, initial, ""
        self._printed = -1
        self._interval, self._start = interval_seconds, time.monotonic()
        self._last_line, self._silent = self._start, silent
        self._bar = (
            tqdm(total=total, desc=description, unit=unit, initial=initial, leave=True, dynamic_ncols=True)
            if sys.stderr.isatty() and not silent
            else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def update(self, num: int = 1, note: str = "") -> None:
        """Count `num` more units; `note` replaces the text behind the bar."""
        self._done += num
        self._note = note or self._note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(num)
        elif time.monotonic() - self._last_line >= self._interval:
            self._print_line()

    def close(self) -> None:
        """End the bar, or print the closing line."""
        if self._bar is not None:
            self._bar.close()
        elif self._done != self._printed:
            self._print_line()

    def _print_line(self) -> None:
        if self._silent:
            return
        self._last_line, self._printed = time.monotonic(), self._done
        elapsed = self._last_line - self._start
        rate = (self._done - self._initial) / max(elapsed, 1e-9)
        of = f"/{self._total}" if self._total is not None else ""
        left = ""
        if self._total is not None and rate > 0 and self._done < self._total:
            left = f", {(self._total - self._done) / rate:.0f} s left"
        note = f", {self._note}" if self._note else ""
        line = f"{self._description}: {self._done}{of} {self._unit}s, {rate:.1f} {self._unit}s/s{left}{note}"
        print(line, file=sys.stderr, flush=True)


def track(
    iterable: Iterable[T], *, total: int | None = None, description: str, unit: str = "image"
) -> Iterator[T]:
    """Yield from `iterable` and show how far it is."""
    with Progress(total, description, unit=unit) as progress:
        for item in iterable:
            yield item
            progress.update()
