"""What the dashboards show: `panels.yml`, read and checked; and which metrics a query reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib import resources
from typing import Self

from pydantic import Field, model_validator

from shards.support.metrics import METRICS
from shards.support.settings import Settings, parse_yaml

COLUMNS = 24  # of a dashboard of Grafana
SELECTORS = {"{RUN}": '{run=~"$run"}', "{RANK}": '{run=~"$run", rank=~"$rank"}'}


def shipped(name: str) -> str:
    """The text of a file of this package."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


class Panel(Settings):
    """One panel: exactly one of `lines`, `bars` (legend -> query), `stat`, `table` (a query).

    Attributes:
        title: above it.
        unit: of the values, as Grafana names it; of the first metric where not given.
        width: of the dashboard's 24 columns; a third, of a number a sixth.
        text: what to look for.
        stack: whether series are drawn on top of each other.
        most: end of the axis.
        steps: values from which on a number turns yellow and red.
    """

    title: str
    lines: dict[str, str] = Field(default_factory=dict)
    bars: dict[str, str] = Field(default_factory=dict)
    stat: str = ""
    table: str = ""
    unit: str = ""
    width: int = Field(0, ge=0, le=COLUMNS)
    text: str = ""
    stack: bool = False
    most: float | None = None
    steps: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(map(bool, (self.lines, self.bars, self.stat, self.table))) != 1:
            raise ValueError("give exactly one of 'lines', 'bars', 'stat' and 'table'")
        return self

    @property
    def queries(self) -> list[tuple[str, str]]:
        """Legends and queries, selectors filled in."""
        found = self.lines or self.bars or {"": self.stat or self.table}
        return [(legend, fill_in(query)) for legend, query in found.items()]

    @property
    def kind(self) -> str:
        """Grafana's name of the type of panel."""
        return "timeseries" if self.lines else "bargauge" if self.bars else "stat" if self.stat else "table"


class Board(Settings):
    """One dashboard: rows of panels; `runs_of` is the metric whose runs can be chosen."""

    name: str
    title: str
    text: str
    runs_of: str
    rows: dict[str, list[Panel]]
    has_ranks: bool = False
    several_runs: bool = True

    def panels(self) -> Iterator[Panel]:
        """All panels, row by row."""
        for panels in self.rows.values():
            yield from panels


def read_boards() -> list[Board]:
    """The boards of `panels.yml`."""
    found = parse_yaml(shipped("panels.yml"), where="panels.yml")
    return [Board.model_validate(item) for item in found]


def fill_in(query: str) -> str:
    """Put the selectors into a query."""
    for short, full in SELECTORS.items():
        query = query.replace(short, full)
    return query


def names_in(query: str) -> set[str]:
    """Metrics and recording rules that a query reads; of a histogram its own name."""
    bare = re.sub(r'"[^"]*"|\$\w+', "", query)
    found = set(re.findall(r"\b(?:run:)?frepa_\w+(?::\w+)?|\bALERTS\b|\bup\b", bare))
    histograms = {metric.name for metric in METRICS if metric.kind == "histogram"}
    return {
        base if (base := re.sub(r"_(bucket|sum|count)$", "", name)) in histograms else name for name in found
    }


def metrics_behind(names: Iterable[str], recorded: dict[str, str]) -> set[str]:
    """The metrics that recording rules among `names` are made of."""
    found: set[str] = set()
    for name in names:
        if name in recorded:
            inner = names_in(recorded[name]) - {name}
            found |= inner | metrics_behind(inner, recorded)
    return found


def read_recorded() -> dict[str, str]:
    """Expressions of the recording rules by name."""
    groups = parse_yaml(shipped("rules/recording.yml"), where="recording.yml")["groups"]
    return {rule["record"]: rule["expr"] for group in groups for rule in group["rules"]}
