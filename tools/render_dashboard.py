"""Draw a dashboard from a running Prometheus into one page, where no Grafana is at hand.

    python tools/render_dashboard.py run --prometheus http://127.0.0.1:9090 --run NAME --out run.html

It asks what the dashboard's JSON asks, in its order, with its variables filled in; the drawing is simpler
than Grafana's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from matplotlib.dates import ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cluster.live import duration
from cluster.monitoring.panels import shipped
from frepa_dist.evaluate.plots import COLORS
from shards.support.page import Page

NUM_POINTS = 240


def say(value: float, unit: str) -> str:
    """A value in its unit, for people."""
    if not math.isfinite(value):
        return "-"
    if unit == "s":
        return duration(value) if value >= 1 else f"{value * 1000:.3g} ms"
    if unit == "percentunit":
        return f"{value:.3g}".rstrip(".") if value > 100 else f"{100 * value:.3g} %"
    if unit in ("bytes", "Bps"):
        power = min(4, int(math.log(max(value, 1), 1024)))
        return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}" + "/s" * (
            unit == "Bps"
        )
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


class Source:
    """A Prometheus, and what is looked at.

    Args:
        url: of Prometheus.
        variables: values of `$run` and the like.
        minutes: how far back.
    """

    def __init__(self, url: str, variables: Mapping[str, str], minutes: float) -> None:
        self._url, self._variables = url.rstrip("/"), variables
        self.end = time.time()
        self.start = self.end - 60 * minutes

    def _ask(self, path: str, query: str, **more: float) -> list[dict[str, Any]]:
        for name, value in self._variables.items():
            query = query.replace(f"${name}", value)
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode({'query': query, **more})}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 (the user's own server)
                found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        except urllib.error.URLError as error:
            sys.exit(f"frepa: error: {url}: {error}")
        return found

    def over_time(self, query: str) -> list[dict[str, Any]]:
        """Series of (time, value) pairs."""
        step = max((self.end - self.start) / NUM_POINTS, 0.25)
        return self._ask("query_range", query, start=self.start, end=self.end, step=step)

    def now(self, query: str) -> list[dict[str, Any]]:
        """Series of one value."""
        return self._ask("query", query, time=self.end)


def legend(pattern: str, labels: Mapping[str, str]) -> str:
    """The name of a series."""
    for name in ("__name__", *labels):
        pattern = pattern.replace(f"{{{{{name}}}}}", labels.get(name, ""))
    return "" if pattern == "__auto" else pattern


def draw_lines(panel: Mapping[str, Any], source: Source) -> Figure:
    """A panel of lines, or of what is stacked."""
    figure = Figure(figsize=(4.2, 2.9), layout="constrained")
    axes = figure.subplots()
    defaults = panel["fieldConfig"]["defaults"]
    series = sorted(
        (legend(target["legendFormat"], found["metric"]), found["values"])
        for target in panel["targets"]
        for found in source.over_time(target["expr"])
    )
    stacked = defaults["custom"]["stacking"]["mode"] == "normal"
    below: dict[float, float] = {}
    for number, (name, values) in enumerate(series):
        times = [datetime.fromtimestamp(moment) for moment, _ in values]
        heights, color = [float(value) for _, value in values], COLORS[number % len(COLORS)]
        if stacked:
            low = [below.get(moment, 0.0) for moment, _ in values]
            heights = [a + b for a, b in zip(low, heights, strict=True)]
            axes.fill_between(times, low, heights, color=color, alpha=0.5, label=name, linewidth=0)
            below |= {moment: height for (moment, _), height in zip(values, heights, strict=True)}
        else:
            axes.plot(times, heights, color=color, label=name, linewidth=1.4)
    axes.set_title(panel["title"], fontsize=10, loc="left")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: say(value, defaults["unit"])))
    axes.xaxis.set_major_formatter(ConciseDateFormatter(axes.xaxis.get_major_locator()))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=COLORS[-1], alpha=0.3, linewidth=0.7)
    if not series:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes, color=COLORS[-1])
    elif any(name for name, _ in series):
        axes.legend(fontsize=7, frameon=False, labelcolor="black", ncols=2)
    return figure


def draw_bars(panel: Mapping[str, Any], source: Source) -> Figure:
    """A panel of bars, one for each series."""
    figure = Figure(figsize=(4.2, 2.9), layout="constrained")
    axes = figure.subplots()
    defaults = panel["fieldConfig"]["defaults"]
    (target,) = panel["targets"]
    found = source.now(target["expr"])
    names = [legend(target["legendFormat"], series["metric"]) for series in found]
    values = [float(series["value"][1]) for series in found]
    axes.barh(names, values, color=COLORS[0], height=0.5)
    for place, value in enumerate(values):
        axes.text(value, place, f" {say(value, defaults['unit'])}", va="center", fontsize=8)
    axes.set_title(panel["title"], fontsize=10, loc="left")
    axes.set_xlim(0, defaults.get("max", 1.25 * max(values, default=1) or 1))
    axes.set_xticks([])
    axes.tick_params(labelsize=8, length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def add_stats(page: Page, panels: list[Mapping[str, Any]], source: Source) -> None:
    """A row of single numbers."""
    cells = []
    for panel in panels:
        found = source.now(panel["targets"][0]["expr"])
        unit = panel["fieldConfig"]["defaults"]["unit"]
        cells.append(", ".join(say(float(series["value"][1]), unit) for series in found) or "no data")
    page.table([panel["title"] for panel in panels], [cells])


def render(board: Mapping[str, Any], source: Source, out: Path) -> None:
    """Write the page of a dashboard."""
    page = Page(board["title"], board["description"])
    drawn: list[tuple[Any, str]] = []
    stats: list[Mapping[str, Any]] = []

    def flush() -> None:
        if stats:
            add_stats(page, stats, source)
        if drawn:
            page.gallery(drawn, columns=3)
        stats.clear()
        drawn.clear()

    for panel in board["panels"]:
        if panel["type"] == "row":
            flush()
            page.heading(panel["title"])
        elif panel["type"] == "stat":
            stats.append(panel)
        elif panel["type"] == "table":
            rows = [series["metric"] for series in source.now(panel["targets"][0]["expr"])]
            names = sorted({name for row in rows for name in row} - {"__name__"})
            page.table(
                [panel["title"], *names], [("", *(row.get(name, "") for name in names)) for row in rows]
            )
        else:
            draw = draw_lines if panel["type"] == "timeseries" else draw_bars
            drawn.append((draw(panel, source), panel["description"]))
    flush()
    page.write(out)


def main() -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("board", choices=("run", "fleet", "data", "sweep"))
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="where it is")
    parser.add_argument("--run", default=".+", help="regular expression of the runs")
    parser.add_argument("--minutes", type=float, default=60.0, help="how far back")
    parser.add_argument("--rate-interval", default="1m", help="what $__rate_interval stands for")
    parser.add_argument("--out", type=Path, help="the page; default: BOARD.html")
    arguments = parser.parse_args()
    variables = {"run": arguments.run, "rank": ".*", "__rate_interval": arguments.rate_interval}
    source = Source(arguments.prometheus, variables, arguments.minutes)
    out = arguments.out or Path(f"{arguments.board}.html")
    render(json.loads(shipped(f"dashboards/{arguments.board}.json")), source, out)
    print(out)


if __name__ == "__main__":
    main()
