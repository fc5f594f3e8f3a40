"""Keep the page about a run up to date while the run goes on, in a process of its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from frepa_dist.runs import CONFIG, EVENTS, METRICS, OUTCOME
from frepa_dist.status import is_over
from shards.support.errors import FrepaError

POLL_SECONDS = 0.2


def keep_report(
    run_dir: Path,
    write: Callable[[float | None], None],
    seconds: float,
    is_stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Write the page when there is something new, at most every `seconds`, and a last time at the end.

    The run need not have begun. A page that cannot be written now is tried again, and told of.

    Args:
        run_dir: the run.
        write: writes the page; it is given how often a browser is to read it again, None for the last one.
        seconds: between two looks.
        is_stopped: whether somebody wants this to end before the run does.

    Returns:
        How often the page was written.
    """
    written, known = 0, None
    while True:
        begun = (run_dir / CONFIG).is_file()
        ends = is_stopped() or (begun and is_over(run_dir))
        found = _state_of(run_dir)
        if begun and (ends or found != known):
            try:
                write(None if ends else seconds)
                written, known = written + 1, found
            except FrepaError as error:
                print(f"frepa: the page is not written this time: {error}", file=sys.stderr, flush=True)
        if ends:
            return written
        wake = time.monotonic() + seconds
        while time.monotonic() < wake and not is_stopped() and not is_over(run_dir):
            time.sleep(min(POLL_SECONDS, seconds))


def _state_of(run_dir: Path) -> list[tuple[int, int] | None]:
    """What changes when there is something new to show; a checkpoint is an event too."""

    def stamp(path: Path) -> tuple[int, int] | None:
        try:
            stat = path.stat()
        except OSError:
            return None
        return stat.st_size, stat.st_mtime_ns

    return [stamp(run_dir / name) for name in (METRICS, EVENTS, OUTCOME)]
