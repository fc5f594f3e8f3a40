"""The results of a sweep as tables: who is best, and how sure that is; pure functions of the journal."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from cluster.sweep.config import SweepConfig
from cluster.sweep.journal import TrialRecord
from cluster.sweep.points import SEED

Row = dict[str, Any]


def trial_rows(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> list[Row]:
    """A row for each trial, the best first, those without a value last."""
    rows = []
    for trial in trials:
        last = trial.reports[-1] if trial.reports else None
        details = last.details if last else {}
        rows.append(
            {
                "trial": trial.name,
                **{key: trial.values.get(key) for key in sweep.space},
                "state": trial.state,
                "reports": len(trial.reports),
                "step": last.step if last else None,
                sweep.metric.kind: trial.value,
                **{
                    key: value
                    for key, value in details.items()
                    if key not in (sweep.metric.kind, "n", "auroc")
                },
                "failures": len(trial.failures),
                "error": trial.failures[-1] if trial.state == "failed" else "",
            }
        )
    sign = -1 if sweep.metric.direction == "max" else 1
    kind = sweep.metric.kind
    rows.sort(key=lambda row: (row[kind] is None, sign * (row[kind] or 0.0), row["trial"]))
    return rows


def group_key(sweep: SweepConfig, trial: TrialRecord) -> str:
    """What trials that differ in their seed alone have in common."""
    return json.dumps({key: trial.values.get(key) for key in sweep.space if key != SEED}, sort_keys=True)


def setting_rows(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> list[Row]:
    """A row for each setting that was tried with several seeds, the best mean first.

    Trials that ended early are left out. Empty where the sweep has no seeds.
    """
    if SEED not in sweep.space:
        return []
    groups: dict[str, list[float]] = {}
    for trial in trials:
        if trial.state == "done" and trial.value is not None:
            groups.setdefault(group_key(sweep, trial), []).append(trial.value)
    rows = [
        {
            **json.loads(key),
            f"mean {sweep.metric.kind}": statistics.fmean(values),
            "standard deviation": statistics.stdev(values) if len(values) > 1 else None,
            "seeds": len(values),
        }
        for key, values in groups.items()
    ]
    sign = -1 if sweep.metric.direction == "max" else 1
    return sorted(rows, key=lambda row: sign * row[f"mean {sweep.metric.kind}"])


class Best(NamedTuple):
    """What won.

    Attributes:
        trial: the first of those with the best settings.
        value: of the metric: where seeds were swept, the mean over them.
        seeds: how many trials that is.
    """

    trial: TrialRecord
    value: float
    seeds: int

    def describe(self, kind: str) -> str:
        """In a few words."""
        mean = f"mean of {self.seeds} seeds, from " if self.seeds > 1 else ""
        return f"{kind} {cell(self.value)} ({mean}{self.trial.name})"


def find_best(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> Best | None:
    """The best settings; None while nothing was measured.

    Trials that came to their end go before those that were stopped. Where seeds were swept, the setting with
    the best mean over the most seeds counts, not the luckiest seed.
    """
    done = [trial for trial in trials if trial.state == "done" and trial.value is not None]
    known = done or [trial for trial in trials if trial.value is not None]
    if not known:
        return None
    sign = 1 if sweep.metric.direction == "max" else -1
    groups: dict[str, list[TrialRecord]] = {}
    for trial in known:
        groups.setdefault(group_key(sweep, trial) if SEED in sweep.space else trial.trial, []).append(trial)
    most = max(len(group) for group in groups.values())
    found = [
        Best(group[0], statistics.fmean(trial.value or 0.0 for trial in group), len(group))
        for group in groups.values()
        if len(group) == most
    ]
    return max(found, key=lambda best: sign * best.value)


def count_states(trials: Sequence[TrialRecord], planned: int) -> dict[str, int]:
    """How many trials are waiting, running, done, stopped and failed."""
    counts = dict.fromkeys(("waiting", "running", "done", "stopped", "failed"), 0)
    for trial in trials:
        counts[trial.state] += 1
    counts["waiting"] = max(0, planned - len(trials))
    return counts


def columns_of(rows: Sequence[Row]) -> list[str]:
    """All columns that any row has, in order of appearance, but for those in which nothing stands."""
    names = dict.fromkeys(key for row in rows for key in row)
    return [
        name for name in names if any(row.get(name) not in (None, "", 0) for row in rows) or name == "state"
    ]


def to_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def cell(value: Any) -> str:
    """A value in a few letters."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_text(rows: Sequence[Row]) -> str:
    """Rows as a table for a terminal."""
    columns = columns_of(rows)
    cells = [columns, *([cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
