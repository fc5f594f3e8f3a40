"""The journal of a sweep: a JSON line for all that happens, from which tables, pages and decisions are made.

Ray writes its own state down now and then, and forgets what schedulers have seen; this is written at once.

{"event": "trial", "trial", "name", "values", "parent"}    a trial begins; under PBT, goes on from another one
{"event": "report", "trial", "name", "report", "step", "value", "details", "stopped", "last"}
{"event": "failure", "trial", "name", "cause", "at", "final"}    tried again, unless that was final
{"event": "end", "trial"}

A failure's `at` counts those that the run wrote down itself; null where nobody was left to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from frepa_dist.journal import append_line
from frepa_dist.runs import read_json_lines

JOURNAL = "journal.jsonl"
State = Literal["running", "done", "stopped", "failed"]


@dataclass
class Report:
    """What was measured at a checkpoint.

    Attributes:
        number: of the report within its trial, from 1.
        step: of the checkpoint.
        value: of the metric.
        details: what else was measured.
        name: of the run that it is of.
    """

    number: int
    step: int
    value: float
    details: dict[str, float]
    name: str


@dataclass
class TrialRecord:
    """All that is known of a trial.

    Attributes:
        trial: Ray's name of it.
        name: of its run, the last one under PBT.
        values: dotted key -> value that it was given, the last under PBT.
        parents: names of runs that it went on from under PBT, with the changes.
        reports: in order.
        failures: causes, oldest first.
        state: how it stands.
    """

    trial: str
    name: str
    values: dict[str, Any]
    parents: list[str] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    state: State = "running"

    @property
    def value(self) -> float | None:
        """The last value, None before the first."""
        return self.reports[-1].value if self.reports else None


class Journal:
    """Writes the journal; what is in it already is not written again.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = {_identity(entry) for entry in read_json_lines(path)}

    def write(self, event: str, trial: str, **details: Any) -> bool:
        """Append an entry; whether it was new. A trial that is tried again reports what it had reported."""
        entry = {"event": event, "trial": trial, **details}
        is_nameless = event == "failure" and details["at"] is None  # nobody was left to write it down
        if not is_nameless and _identity(entry) in self._known:
            return False
        self._known.add(_identity(entry))
        append_line(self._path, entry)
        return True


def _identity(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return entry["event"], entry["trial"], entry.get("name"), entry.get("report"), entry.get("at")


def read_journal(path: Path) -> list[TrialRecord]:
    """All trials, in the order in which they began."""
    return digest(read_json_lines(path))


def digest(entries: Iterable[Mapping[str, Any]]) -> list[TrialRecord]:
    """Put together what a journal's entries say of each trial."""
    trials: dict[str, TrialRecord] = {}
    for entry in entries:
        event, key = entry["event"], entry["trial"]
        if event == "trial":
            if key not in trials:
                trials[key] = TrialRecord(key, entry["name"], entry["values"])
            else:
                trials[key].name, trials[key].values = entry["name"], entry["values"]
                trials[key].parents.append(entry["parent"])
            continue
        record = trials[key]
        if event == "report":
            _take_report(record, entry)
        elif event == "failure":
            record.failures.append(entry["cause"])
            record.state = "failed" if entry["final"] else "running"
        elif record.state == "running":  # "end"
            record.state = "done"
    return list(trials.values())


def _take_report(record: TrialRecord, entry: Mapping[str, Any]) -> None:
    # under PBT a trial goes back to where its parent was
    record.reports = [report for report in record.reports if report.number < entry["report"]]
    record.reports.append(
        Report(entry["report"], entry["step"], entry["value"], entry["details"], entry["name"])
    )
    record.state = "stopped" if entry["stopped"] else "done" if entry["last"] else "running"


def read_decisions(path: Path) -> dict[tuple[str, int], tuple[float, bool]]:
    """What was reported and decided: (trial, number of the report) -> (value, whether it was ended)."""
    return {
        (entry["trial"], entry["report"]): (entry["value"], entry["stopped"])
        for entry in read_json_lines(path)
        if entry["event"] == "report"
    }
