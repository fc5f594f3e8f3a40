"""A run on the terminal as it goes: what is shown, as a function of what its folder says. No torch."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from frepa_dist.follow import Follower
from frepa_dist.runs import CONFIG, EVENTS, METRICS
from frepa_dist.status import RankStatus, RunStatus, is_over, summarize

KEPT_RECORDS = 600  # log lines that sparklines are drawn of
FIRST_BYTES = 1 << 20  # of metrics.jsonl: enough for so many lines
SPARK_WIDTH = 24
FIXED_LINES = 15  # of a frame: border, headline, error, titles, what says that there is more
STYLES = {"training": "bold green", "done": "bold green", "silent": "bold yellow", "requeue": "bold yellow"}
BARS = "▁▂▃▄▅▆▇█"
PHASE_STYLES = ("cyan", "blue", "magenta", "green", "yellow", "red")
# what is told of an event, beside its name
DETAILS = ("step", "to_step", "cause", "error", "not_finite", "metric", "reason", "number", "checkpoint")


@dataclass(frozen=True)
class Snapshot:
    """What is known of a run at a moment.

    Attributes:
        run: its folder.
        status: how it stands; None before it has begun.
        records: the last log lines.
        events: the last events.
        is_over: whether nothing more will come.
    """

    run: Path
    status: RunStatus | None
    records: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    is_over: bool = False


class RunReader:
    """Reads a run folder again and again, and of files that grow only what is new."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._metrics = Follower(run / METRICS, FIRST_BYTES)
        self._event_log = Follower(run / EVENTS)
        self._records: deque[dict[str, Any]] = deque(maxlen=KEPT_RECORDS)
        self._events: list[dict[str, Any]] = []

    def read(self) -> Snapshot:
        """How the run stands now."""
        if not (self._run / CONFIG).is_file():
            return Snapshot(self._run, None, (), ())
        is_new, records = self._metrics.read()
        if is_new:
            self._records.clear()
        self._records.extend(
            {name: value for name, value in record.items() if isinstance(value, (int, float))}
            for record in records
            if "step" in record
        )
        is_new, events = self._event_log.read()
        self._events = events if is_new else self._events + events
        status = summarize(self._run, self._events, list(self._records)[-1:])
        return Snapshot(self._run, status, list(self._records), self._events, is_over(self._run))


def frame(shot: Snapshot, height: int = 40) -> RenderableType:
    """All that is shown, in `height` lines where that are at least 22."""
    status = shot.status
    if status is None:
        return Panel(Text(f"waiting for a run to begin in {shot.run}"), title="frepa watch")
    room = max(7, height - FIXED_LINES)
    rows = room * 2 // 5
    lower = Table.grid(expand=True, padding=(0, 2))
    lower.add_column(ratio=1)
    lower.add_column(ratio=1)
    lower.add_row(_phases(shot.records, rows), _ranks(status, shot.records, rows))
    parts: list[RenderableType] = [_headline(shot, status)]
    if status.error:
        parts.append(Text(status.error, style="red", no_wrap=True, overflow="ellipsis"))
    events = _events(shot.events, room - 2 * rows)
    parts += [Text(), _values(shot.records, rows), Text(), lower, Text(), events]
    return Panel(Group(*parts), title=f"frepa watch {shot.run}", title_align="left")


def _headline(shot: Snapshot, status: RunStatus) -> RenderableType:
    """State, progress, time left, speed, checkpoints."""
    at_work = [rank.step for rank in status.ranks if rank.state in ("training", "stopping")]
    step = max([status.step, *at_work, 0]) if status.state in ("training", "silent") else max(status.step, 0)
    words = Text().append(status.state, style=STYLES.get(status.state, "bold red"))
    words.append(f"  step {step:,}", style="bold")
    if status.total_steps > 0:
        words.append(f" of {status.total_steps:,} ({step / status.total_steps:.1%})")
    last = shot.records[-1] if shot.records else {}
    if "epoch" in last:
        words.append(f"  epoch {last['epoch']}")
    left = seconds_left(shot.records, status.total_steps - step)
    if status.state == "training" and left is not None:
        words.append(f"  {duration(left)} left", style="bold")
    if "samples_per_second" in last:
        speeds = [record["samples_per_second"] for record in shot.records]
        words.append(f"\n{last['samples_per_second']:,.1f} images/s ")
        words.append(sparkline(speeds, SPARK_WIDTH), style="cyan")
        words.append(f" median {median(speeds):,.1f}")
    made = status.checkpoints
    words.append(
        f"\ncheckpoints: {len(made)}, newest of step {made[-1]:,}" if made else "\nno checkpoint yet"
    )
    if status.faults:
        words.append(f"   {len(status.faults)} faults, {status.restarts} restarts", style="yellow")
    total = max(status.total_steps, 1)
    bar = Table.grid(expand=True)
    bar.add_row(ProgressBar(total=total, completed=min(step, total)))
    return Group(bar, words)


def _values(records: Sequence[Mapping[str, Any]], rows: int) -> RenderableType:
    """Losses and what else is logged: the last value, its trend, its course."""
    if not records:
        return Text("nothing is logged yet", style="dim")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("logged")
    table.add_column("last", justify="right")
    table.add_column("trend", justify="right")
    table.add_column(f"last {len(records)} lines")
    names = shown_names(records)
    for name in names[:rows]:
        values = [record[name] for record in records if name in record]
        table.add_row(
            name,
            f"{values[-1]:.4g}",
            trend(values),
            Text(sparkline(values, SPARK_WIDTH).rjust(SPARK_WIDTH), "cyan"),
        )
    if len(names) <= rows:
        return table
    return Group(table, Text(f"and {len(names) - rows} more in {METRICS}", style="dim"))


def shown_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which values are shown, losses first; no counters, no times, no guard that never acted."""
    names = dict.fromkeys(name for record in records for name in record)
    left_out = {"step", "epoch", "samples", "samples_per_second"}

    def acted(name: str) -> bool:
        return any(record.get(name, 0.0) for record in records)

    found = [
        name
        for name in names
        if name not in left_out
        and not name.startswith("time/")
        and (acted(name) or not (name.startswith("guard/") or name.endswith("/skipped")))
    ]
    return sorted(found, key=_place)


def _place(name: str) -> int:
    groups = ("loss", "guard", "mi", "gradient_norm", "lr")
    group = name.partition("/")[0]
    return groups.index(group) if group in groups else len(groups)


def _phases(records: Sequence[Mapping[str, Any]], rows: int) -> RenderableType:
    """Where the time of the last steps went, the longest phases first."""
    timed = [record for record in records if record.get("time/total")][-20:]
    if not timed:
        return Text()
    total = fmean(record["time/total"] for record in timed)
    names = dict.fromkeys(name for record in timed for name in record if name.startswith("time/"))
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("phase")
    table.add_column(f"of {total:.3g} s a step", min_width=20)
    table.add_column()
    shares = {name.removeprefix("time/"): fmean(r.get(name, 0.0) for r in timed) / total for name in names}
    del shares["total"]
    shares["other"] = max(0.0, 1 - sum(shares.values()))
    longest = sorted(shares.items(), key=lambda item: -item[1])[:rows]
    for number, (name, share) in enumerate(longest):
        bar = Text("█" * round(20 * min(share, 1)), style=PHASE_STYLES[number % len(PHASE_STYLES)])
        table.add_row(name, bar, f"{share:.0%}")
    return table


def _ranks(status: RunStatus, records: Sequence[Mapping[str, Any]], rows: int) -> RenderableType:
    """What each rank last said; those first that have been silent for longest."""
    if not status.ranks:
        return Text("no heartbeats: no supervisor listens to this run", style="dim")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("rank", "state", "step", "said something"):
        table.add_column(title, justify="left" if title == "state" else "right")
    patience = max(5.0, 5 * (records[-1].get("time/total", 0.0) if records else 0.0))
    few = len(status.ranks) <= rows
    ranks = status.ranks if few else sorted(status.ranks, key=lambda rank: -rank.seconds_ago)[: rows - 1]
    for rank in ranks:
        style = _rank_style(rank, patience)
        ago = f"{duration(rank.seconds_ago)} ago"
        table.add_row(str(rank.rank), rank.state, f"{max(rank.step, 0):,}", ago, style=style)
    if few:
        return table
    return Group(table, Text(f"and {len(status.ranks) - len(ranks)} that spoke later", style="dim"))


def _rank_style(rank: RankStatus, patience: float) -> str:
    if rank.state == "failed":
        return "red"
    if rank.state in ("done", "requeue") or rank.seconds_ago <= patience:
        return ""
    return "yellow" if rank.seconds_ago <= 6 * patience else "red"


def _events(events: Sequence[Mapping[str, Any]], rows: int) -> RenderableType:
    """The last events, the newest last."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("events")
    table.add_column(no_wrap=True, overflow="ellipsis")
    for event in events[-rows:]:
        moment = time.strftime("%H:%M:%S", time.localtime(event.get("time", 0)))
        told = ", ".join(f"{key.replace('_', ' ')} {_plain(event[key])}" for key in DETAILS if key in event)
        bad = any(word in event["event"] for word in ("fault", "failed", "skipped", "went_back", "spike"))
        name = Text(event["event"].replace("_", " "), style="yellow" if bad else "")
        table.add_row(Text(moment, style="dim"), name.append(f"  {told}", style="dim" if not bad else ""))
    return table


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw values with blocks of eight heights, each the mean of its share of them."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [round(number * len(finite) / count) for number in range(count + 1)]
    means = [fmean(finite[start:end]) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return BARS[3] * count
    return "".join(BARS[min(7, int(8 * (value - low) / (high - low)))] for value in means)


def trend(values: Sequence[float]) -> str:
    """How much the mean of the last quarter differs from that of the quarter before."""
    size = len(values) // 4
    if size < 2:
        return ""
    before, now = fmean(values[-2 * size : -size]), fmean(values[-size:])
    if before == now:
        return "="
    if not before:
        return "↑" if now > before else "↓"
    return f"{'↑' if now > before else '↓'} {abs(now / before - 1):.1%}"


def seconds_left(records: Sequence[Mapping[str, Any]], steps: int) -> float | None:
    """By the median time of the last steps; None where nothing is known."""
    times = [record["time/total"] for record in records[-20:] if record.get("time/total")]
    return median(times) * steps if times and steps > 0 else None


def duration(seconds: float) -> str:
    """A length of time in two units at most."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    return f"{seconds / 86400:.1f} days"
