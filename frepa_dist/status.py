"""How a run stands, read from its folder alone: also while it trains, and from any machine that sees it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from frepa_dist.heartbeats import read_pulse
from frepa_dist.journal import read_outcome
from frepa_dist.runs import (
    EVENTS,
    HEARTBEATS,
    METRICS,
    OUTCOME,
    check_run_folder,
    list_checkpoints,
    read_json_lines,
    read_metrics,
)

# heartbeats come every second while steps take less; a step, a start or a checkpoint may take minutes
QUIET_SECONDS = 60.0
# an outcome that a supervisor answers by a restart is taken away before
SETTLED_SECONDS = 15.0


@dataclass(frozen=True)
class RankStatus:
    """What a rank last said, and how many seconds ago (by the clocks of this machine and of the disk's)."""

    rank: int
    state: str
    step: int
    seconds_ago: float
    error: str = ""


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    Attributes:
        run: its folder.
        state: `training`; `silent` when ranks have said nothing for a minute, and not how it ended; `killed`
            when no rank is at work; else how the last start ended. Ranks without a supervisor (started by
            `deepspeed` itself) say nothing: what they log tells that they train.
        step, total_steps: the step it ended after, else the last logged one, and the length of the run; -1
            where unknown.
        checkpoints: steps of the complete checkpoints.
        metrics: the last logged line.
        restarts: how often the supervisor started it again.
        faults: causes of all faults, oldest first.
        events: how many of each kind.
        error: of a failure.
        ranks: what each rank last said.
    """

    run: str
    state: Literal["training", "silent", "killed", "done", "requeue", "failed"]
    step: int
    total_steps: int
    checkpoints: list[int]
    metrics: dict[str, float]
    restarts: int
    faults: list[str]
    events: dict[str, int]
    error: str = ""
    ranks: list[RankStatus] = field(default_factory=list)

    def describe(self) -> str:
        """A few lines for people."""
        total = f" of {self.total_steps}" if self.total_steps >= 0 else ""
        lines = [f"run          {self.run}", f"state        {self.state}, step {max(self.step, 0)}{total}"]
        if self.error:
            lines.append(f"error        {self.error}")
        if self.metrics:
            rate, loss = self.metrics["samples_per_second"], self.metrics.get("loss", math.nan)
            lines.append(f"last logged  loss {loss:.4f}, {rate:.1f} images/s{self._left()}")
        newest = (
            f"{len(self.checkpoints)}, newest of step {self.checkpoints[-1]}" if self.checkpoints else "none"
        )
        lines.append(f"checkpoints  {newest}")
        if self.faults:
            lines.append(
                f"faults       {len(self.faults)}, {self.restarts} restarts; the last: {self.faults[-1]}"
            )
        skipped = {name: count for name, count in self.events.items() if "skip" in name}
        lines += [f"{name.replace('_', ' '):<13}{count}" for name, count in sorted(skipped.items())]
        lines += [
            f"rank {rank.rank:<8}{rank.state}, step {max(rank.step, 0)}, {rank.seconds_ago:.0f} s ago"
            for rank in self.ranks
        ]
        return "\n".join(lines)

    def _left(self) -> str:
        seconds = self.metrics.get("time/total", 0.0) * (self.total_steps - self.step)
        if self.state != "training" or seconds <= 0:
            return ""
        return f", {seconds / 3600:.1f} h left" if seconds > 5400 else f", {seconds / 60:.0f} min left"


def describe_run(run_dir: Path) -> RunStatus:
    """How a run stands.

    Raises:
        DataError: the folder is no run.
    """
    check_run_folder(run_dir)
    return summarize(run_dir, read_json_lines(run_dir / EVENTS), read_metrics(run_dir))


def summarize(
    run_dir: Path, events: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]
) -> RunStatus:
    """As `describe_run`, for who has read the records already: all events, and at least the last metrics."""
    counts: dict[str, int] = {}
    for event in events:
        counts[event["event"]] = counts.get(event["event"], 0) + 1
    ranks = _read_ranks(run_dir)
    outcome = read_outcome(run_dir)
    starts = [event for event in events if event["event"] == "start"]
    return RunStatus(
        run=str(run_dir),
        state=_state(outcome, ranks, _seconds_since_logged(run_dir)),
        step=_step(outcome, metrics),
        total_steps=starts[-1]["total_steps"] if starts else -1,
        checkpoints=[int(path.name.removeprefix("step-")) for path in list_checkpoints(run_dir)],
        metrics=dict(metrics[-1]) if metrics else {},
        restarts=counts.get("restart", 0),
        faults=[event["cause"] for event in events if event["event"] == "fault"],
        events=counts,
        error=str(outcome.get("error", "")) if outcome else "",
        ranks=ranks,
    )


def is_over(run_dir: Path) -> bool:
    """Whether nothing more will come of a run by itself: it is done, or ended and was not started again."""
    outcome = read_outcome(run_dir)
    if outcome is None:
        return False
    try:
        age = time.time() - (run_dir / OUTCOME).stat().st_mtime
    except OSError:
        return False
    return outcome["outcome"] == "done" or age > SETTLED_SECONDS


def _step(outcome: dict[str, Any] | None, metrics: Sequence[Mapping[str, Any]]) -> int:
    ended: int = outcome["step"] if outcome else -1
    logged: int = metrics[-1]["step"] if metrics else -1
    return ended if ended >= 0 else logged


def _read_ranks(run_dir: Path) -> list[RankStatus]:
    found = []
    now = time.time()
    for path in (run_dir / HEARTBEATS).glob("rank-*.json"):
        pulse = read_pulse(path)
        if pulse is not None:
            ago = max(0.0, now - path.stat().st_mtime)
            rank = int(path.stem.removeprefix("rank-"))
            found.append(RankStatus(rank, pulse.state, pulse.step, ago, pulse.error))
    return sorted(found, key=lambda status: status.rank)


def _seconds_since_logged(run_dir: Path) -> float:
    """Age of the newest line of metrics or events, infinite where there is none."""
    paths = [path for path in (run_dir / METRICS, run_dir / EVENTS) if path.is_file()]
    return time.time() - max((path.stat().st_mtime for path in paths), default=-math.inf)


def _state(
    outcome: dict[str, Any] | None, ranks: list[RankStatus], seconds_since_logged: float
) -> Literal["training", "silent", "killed", "done", "requeue", "failed"]:
    if outcome is not None:
        ended: Literal["done", "requeue", "failed"] = outcome["outcome"]
        return ended
    at_work = [rank for rank in ranks if rank.state in ("starting", "training", "stopping")]
    if not ranks and seconds_since_logged < QUIET_SECONDS:
        return "training"
    if not at_work:
        return "killed"
    return "training" if min(rank.seconds_ago for rank in at_work) < QUIET_SECONDS else "silent"
