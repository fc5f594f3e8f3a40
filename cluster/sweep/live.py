"""A sweep while it runs: a table on a terminal, a line now and then elsewhere; and who is told of it."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cluster.sweep.config import SweepConfig
from cluster.sweep.exports import Publish
from cluster.sweep.journal import TrialRecord, read_journal
from cluster.sweep.layout import Layout
from cluster.sweep.table import cell, columns_of, count_states, find_best, trial_rows

if TYPE_CHECKING:
    from rich.table import Table

LOOK_SECONDS = 1.0
LINE_SECONDS = 30.0
MOST_ROWS = 30


@contextlib.contextmanager
def follow(sweep: SweepConfig, num_reports: int, publish: Publish) -> Iterator[None]:
    """Show, from a thread, what the journal says, for the length of a block.

    Args:
        sweep: the sweep.
        num_reports: how many a trial makes that comes to its end.
        publish: is told how far it is, when that changes.
    """
    done = threading.Event()
    thread = threading.Thread(
        target=_show, args=(sweep, num_reports, publish, done), name="sweep-progress", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show(
    sweep: SweepConfig,
    num_reports: int,
    publish: Publish,
    done: threading.Event,
) -> None:
    path, told, said_at = Layout(sweep.output).journal, None, -LINE_SECONDS
    with contextlib.ExitStack() as stack:
        live = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            live = stack.enter_context(Live(console=Console(stderr=True), auto_refresh=False))
        while True:
            is_last = done.wait(LOOK_SECONDS)
            trials = read_journal(path)
            best = find_best(sweep, trials)
            reports = sum(len(trial.reports) for trial in trials)
            news = count_states(trials, sweep.num_planned), None if best is None else best.value, reports
            if news != told:
                told = news
                publish(*news)
            if live is not None:
                live.update(progress_table(sweep, trials, num_reports), refresh=True)
            elif is_last or time.monotonic() - said_at > LINE_SECONDS:
                said_at = time.monotonic()
                print(progress_line(sweep, trials), file=sys.stderr, flush=True)
            if is_last:
                return


def progress_line(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> str:
    """How far it is, in a line."""
    states = count_states(trials, sweep.num_planned)
    counts = ", ".join(f"{number} {name}" for name, number in states.items() if number)
    best = find_best(sweep, trials)
    reports = sum(len(trial.reports) for trial in trials)
    known = "" if best is None else f"; best {best.describe(sweep.metric.kind)}"
    return f"sweep: {counts or 'no trials'}, {reports} reports{known}"


def progress_table(sweep: SweepConfig, trials: Sequence[TrialRecord], num_reports: int) -> Table:
    """How far it is, as a table: the best trials first."""
    from rich.table import Table

    rows = trial_rows(sweep, trials)
    table = Table(title=progress_line(sweep, trials), title_justify="left")
    columns = columns_of(rows) if rows else ["trial"]
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows[:MOST_ROWS]:
        shown = {**row, "reports": f"{row['reports']} / {num_reports}"}
        table.add_row(*(cell(shown.get(name)) for name in columns))
    if len(rows) > MOST_ROWS:
        table.caption = f"and {len(rows) - MOST_ROWS} more"
    return table
