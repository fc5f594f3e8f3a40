"""The report's figures. `Figure` objects only: no pyplot, no state, no window.

Colors keep their contrast on white and on black; black is left to text and axes, which the page recolors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#3d85c6", "#dd7e18", "#4a9e5c", "#c94f6d", "#8d6fc9", "#1f9fa8", "#8a8f98")

MOST_IN_LEGEND = 14  # lines below each other

Records = Sequence[Mapping[str, Any]]


def _plain(name: str) -> str:
    """A name that somebody chose, in which matplotlib shall find no formula."""
    return name.replace("$", r"\$")


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=COLORS[-1], alpha=0.3, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def curve_figure(records: Records, title: str, names: Sequence[str]) -> Figure:
    """Draw logged values over steps.

    Args:
        records: lines of metrics.jsonl; a value that a line lacks is left out.
        title: of the figure.
        names: of the values.
    """
    figure = Figure(figsize=(3.6, 2.7), layout="constrained")
    axes = figure.subplots()
    for name, color in zip(names, COLORS * math.ceil(len(names) / len(COLORS)), strict=False):
        points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))]
        steps, values = zip(*points, strict=True) if points else ((), ())
        marker = "o" if len(points) < 30 else ""
        axes.plot(steps, values, color=color, label=name, linewidth=1.6, marker=marker, markersize=3)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=8)
    if len(names) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor="black")
    _style(axes)
    return figure


def spectra_figure(spectra: Mapping[str, npt.NDArray[np.floating[Any]]]) -> Figure:
    """Draw the power spectra of images, (R,) each, by cycles per image side; zero frequency is left out."""
    figure = Figure(figsize=(2.4, 2.4), layout="constrained")
    axes = figure.subplots()
    for (label, values), color in zip(spectra.items(), COLORS, strict=False):
        axes.loglog(
            np.arange(1, len(values)), np.maximum(values[1:], 1e-16), color=color, label=label, linewidth=1.4
        )
    axes.set_xlabel("cycles per image side", fontsize=9)
    axes.set_ylabel("power", fontsize=9)
    axes.legend(fontsize=9, frameon=False, labelcolor="black", loc="lower left")
    _style(axes)
    return figure


@dataclass(frozen=True)
class Line:
    """A line of `lines_figure`.

    Attributes:
        label: for the legend.
        x, y: its points.
        low, high: ends of the interval at each point, None where there are none.
        color: None takes the next one.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    color: str | tuple[float, ...] | None = None


def lines_figure(
    lines: Sequence[Line],
    *,
    xlabel: str,
    ylabel: str,
    is_log: bool = False,
    limits: tuple[float, float] | None = None,
    reference: float | None = None,
    size: tuple[float, float] = (4.6, 3.2),
) -> Figure:
    """Draw lines with their intervals as bands.

    Args:
        lines: at least one.
        xlabel: what x is.
        ylabel: what y is.
        is_log: whether x is drawn by its logarithm, base 2.
        limits: of y.
        reference: a value of y to mark, such as chance.
        size: in inches, to which room for the legend is added.
    """
    columns = math.ceil(len(lines) / MOST_IN_LEGEND) if len(lines) > 1 else 0
    figure = Figure(figsize=(size[0] + columns * 1.1, size[1]), layout="constrained")
    axes = figure.subplots()
    for line, color in zip(lines, COLORS * math.ceil(len(lines) / len(COLORS)), strict=False):
        shade = line.color or color
        marker = "o" if len(line.x) < 30 else ""
        axes.plot(
            line.x, line.y, color=shade, label=_plain(line.label), linewidth=1.6, marker=marker, markersize=3
        )
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=shade, alpha=0.2, linewidth=0)
    if is_log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if limits is not None:
        axes.set_ylim(*limits)
    if reference is not None:
        axes.axhline(reference, color=COLORS[-1], linewidth=1, linestyle="--")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    if columns:
        figure.legend(fontsize=8, frameon=False, labelcolor="black", loc="outside right upper", ncols=columns)
    _style(axes)
    return figure


def matrix_figure(
    values: npt.NDArray[np.floating[Any]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """Draw a matrix (r, c) as colors, the first row on top; numbers too where there is room for them."""
    height, width = 1.1 + 0.24 * len(rows), 2.6 + 0.3 * len(columns)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, vmin=limits[0], vmax=limits[1], cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    if len(columns) <= 16:
        middle = sum(limits) / 2
        for (row, column), value in np.ndenumerate(values):
            shade = "#fefefe" if value < middle else "#010101"  # pure black would follow the page's text
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=5.5, color=shade)
    figure.colorbar(image, ax=axes, label=label, shrink=0.8).ax.tick_params(labelsize=7)
    return figure


def intervals_figure(
    labels: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float] | None],
    *,
    xlabel: str,
    limits: tuple[float, float],
    reference: float | None = None,
    bars: bool = True,
) -> Figure:
    """Draw values with their intervals, one below the other.

    Args:
        labels: what each value is of.
        values: n numbers.
        intervals: low and high end of each, None where there is none.
        xlabel: what the values are.
        limits: of the axis; it grows to hold what lies outside.
        reference: a value to mark, such as chance.
        bars: draw bars from zero, else points.
    """
    figure = Figure(figsize=(7.6, 0.9 + 0.36 * len(labels)), layout="constrained")
    axes = figure.subplots()
    places = list(range(len(labels)))
    if bars:
        axes.barh(places, values, color=COLORS[0], height=0.62)
    else:
        axes.plot(values, places, "o", color=COLORS[0], markersize=6)
    for place, interval in zip(places, intervals, strict=True):
        if interval is not None:
            axes.plot(interval, [place, place], color="black", linewidth=1.2, marker="|", markersize=6)
    ends = [*values, *(end for interval in intervals if interval for end in interval)]
    low, high = min(limits[0], *ends), max(limits[1], *ends)
    for place, value in zip(places, values, strict=True):
        axes.text(high + 0.02 * (high - low), place, f"{value:.3f}", va="center", fontsize=9, clip_on=False)
    if reference is not None:
        axes.axvline(reference, color=COLORS[-1], linewidth=1, linestyle="--")
    axes.set_xlim(low, high)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_yticks(places, [_plain(label) for label in labels])
    axes.set_xlabel(xlabel, fontsize=9)
    _style(axes)
    axes.tick_params(axis="y", labelsize=9, length=0)
    axes.grid(visible=False, axis="y")
    return figure


def forest_figure(
    labels: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float] | None],
    points: Sequence[Sequence[float]],
    *,
    xlabel: str,
    reference: float | None = None,
) -> Figure:
    """Draw means with their intervals and what they are means of, one below the other.

    Args:
        labels: what each mean is of.
        values: n means.
        intervals: low and high end of each, None where there is none.
        points: of each mean its values, as small circles where there are several.
        xlabel: what the values are.
        reference: a value to mark, such as no difference.
    """
    figure = Figure(figsize=(7.6, 0.9 + 0.3 * len(labels)), layout="constrained")
    axes = figure.subplots()
    for place, (value, interval, some) in enumerate(zip(values, intervals, points, strict=True)):
        if interval is not None:
            axes.plot(interval, [place, place], color=COLORS[0], linewidth=2, solid_capstyle="butt")
        axes.plot([value], [place], "s", color=COLORS[0], markersize=6)
        if len(some) > 1:
            axes.plot(some, [place] * len(some), "o", color="black", markersize=4, markerfacecolor="none")
    if reference is not None:
        axes.axvline(reference, color=COLORS[-1], linewidth=1, linestyle="--")
    axes.margins(x=0.08)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_yticks(range(len(labels)), [_plain(label) for label in labels])
    axes.set_xlabel(xlabel, fontsize=9)
    _style(axes)
    axes.tick_params(axis="y", labelsize=9, length=0)
    axes.grid(visible=False, axis="y")
    return figure


def phases_figure(seconds: Mapping[str, float]) -> Figure:
    """Draw how a step's time is spent: one bar, a part of it for each phase, in seconds."""
    figure = Figure(figsize=(7.6, 1.6), layout="constrained")
    axes = figure.subplots()
    start = 0.0
    for name, color in zip(seconds, COLORS * math.ceil(len(seconds) / len(COLORS)), strict=False):
        axes.barh(0, seconds[name], left=start, color=color, height=0.5, label=name)
        start += seconds[name]
    axes.set_yticks([])
    axes.set_xlim(0, start or 1)
    axes.set_xlabel("seconds per step", fontsize=9)
    _style(axes)
    axes.spines["left"].set_visible(False)
    figure.legend(
        fontsize=8,
        frameon=False,
        labelcolor="black",
        loc="outside upper left",
        ncols=min(7, len(seconds) or 1),
    )
    return figure


def share_figure(
    lines: Mapping[str, Sequence[tuple[float, float, float | None]]],
    ylabel: str,
    *,
    xlabel: str = "labels of the training part",
    are_counts: bool = False,
) -> Figure:
    """Draw values over the share of the labels, or over a number of images, on a logarithmic axis.

    Args:
        lines: by encoder: share or number, mean, and standard deviation or None.
        ylabel: what the values are.
        xlabel: what the shares or numbers are of.
        are_counts: whether these are numbers.
    """
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for (name, points), color in zip(
        lines.items(), COLORS * math.ceil(len(lines) / len(COLORS)), strict=False
    ):
        shares, means, spreads = zip(*points, strict=True)
        errors = [spread or 0.0 for spread in spreads]
        axes.errorbar(
            shares, means, yerr=errors, color=color, label=_plain(name), marker="o", markersize=4,
            linewidth=1.6, capsize=2,
        )  # fmt: skip
    axes.set_xscale("log")
    ticks = sorted({share for points in lines.values() for share, _, _ in points})
    axes.set_xticks(ticks, [f"{tick:,.0f}" if are_counts else f"{100 * tick:.4g}%" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.margins(x=0.08)
    axes.legend(fontsize=8, frameon=False, labelcolor="black", loc="best")
    _style(axes)
    return figure
