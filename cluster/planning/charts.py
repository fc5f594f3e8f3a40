"""Figures about plans and simulations; colors keep their contrast on white and on black."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

COLORS = ("#3d85c6", "#dd7e18", "#4a9e5c", "#c94f6d", "#8d6fc9", "#1f9fa8", "#8a8f98")
GREY = COLORS[-1]


def style(axes: Axes) -> None:
    """Light axes with a grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GREY, alpha=0.3, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def log_sizes(axes: Axes, sizes: Sequence[int]) -> None:
    """A logarithmic axis of numbers of GPUs, labelled where there is room."""
    axes.set_xscale("log", base=2)
    shown = [size for size in sizes if size & (size - 1) == 0] or list(sizes)
    axes.xaxis.set_major_locator(FixedLocator([float(size) for size in shown]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend(axes: Axes) -> None:
    """A legend whose text the page recolors."""
    axes.legend(fontsize=8, frameon=False, labelcolor="black")


def memory_figure(
    labels: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    groups: Sequence[str],
    limit: float,
    size: float,
) -> Figure:
    """Draw what takes a GPU's memory: a bar for each layout, in groups.

    Args:
        labels: of the bars of a group.
        parts: GiB of each bar, group by group, by what takes them.
        groups: titles of the groups.
        limit: GiB that may be used.
        size: GiB that there are.
    """
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    num = len(labels)
    for number, (axes, title) in enumerate(zip(all_axes, groups, strict=True)):
        bottom = [0.0] * num
        for (name, values), color in zip(parts.items(), COLORS, strict=False):
            own = list(values[number * num : (number + 1) * num])
            axes.bar(range(num), own, bottom=bottom, color=color, width=0.75, label=name)
            bottom = [low + more for low, more in zip(bottom, own, strict=True)]
        axes.axhline(size, color="black", linewidth=1.1)
        axes.axhline(limit, color="black", linewidth=1.1, linestyle="--")
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xticks(range(num), labels)
        axes.set_xlabel("micro-batch", fontsize=8)
        style(axes)
        axes.grid(visible=False, axis="x")
    all_axes[0].set_ylabel("GiB of each GPU", fontsize=8)
    handles, names = all_axes[0].get_legend_handles_labels()
    figure.legend(
        handles, names, fontsize=8, frameon=False, labelcolor="black", ncols=6, loc="outside upper left"
    )
    return figure


def sizes_figure(
    sizes: Sequence[int], series: Mapping[str, Sequence[float]], ylabel: str, *, mark: float | None = None
) -> Figure:
    """Draw values against the number of GPUs, both logarithmic.

    Args:
        sizes: numbers of GPUs.
        series: values by name.
        ylabel: what they are.
        mark: a value to mark, such as a deadline.
    """
    figure = Figure(figsize=(4.5, 3.1), layout="constrained")
    axes = figure.subplots()
    for (name, values), color in zip(series.items(), COLORS, strict=False):
        axes.plot(sizes, values, color=color, label=name, linewidth=1.6, marker="o", markersize=3)
    if mark is not None:
        axes.axhline(mark, color=GREY, linewidth=1, linestyle="--")
    log_sizes(axes, sizes)
    known = [value for values in series.values() for value in values if math.isfinite(value)]
    low, high = min(known), max(known)
    if low > 0 and high > 5 * low:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.1 * high)
    axes.set_xlabel("GPUs", fontsize=8)
    axes.set_ylabel(ylabel, fontsize=8)
    if len(series) > 1:
        legend(axes)
    style(axes)
    return figure


def step_figure(sizes: Sequence[int], series: Mapping[str, Sequence[float]]) -> Figure:
    """Draw what could take a step's time against the number of GPUs: the highest line decides."""
    figure = sizes_figure(sizes, series, "milliseconds of a step")
    figure.axes[0].set_yscale("log")
    return figure


def interval_figure(
    intervals: Sequence[float],
    goodput: Sequence[float],
    errors: Sequence[float],
    formulas: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    marks: Mapping[str, float],
    spread: tuple[float, float] | None,
) -> Figure:
    """Draw goodput against the checkpoint interval: simulated with error bars, formulas as lines.

    Args:
        intervals: seconds.
        goodput: simulated, means over seeds.
        errors: standard errors of these means.
        formulas: seconds and goodput of each formula, by name.
        marks: intervals to mark, by name.
        spread: interval of the simulated optimum.
    """
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.subplots()
    percent = [100 * value for value in goodput]
    axes.errorbar(
        intervals,
        percent,
        yerr=[200 * error for error in errors],
        fmt="o",
        color=COLORS[0],
        markersize=4,
        capsize=2,
        linewidth=1.2,
        label="simulated (mean, 2 standard errors)",
    )
    for (name, (x, y)), color in zip(formulas.items(), COLORS[1:], strict=False):
        axes.plot(x, [100 * value for value in y], color=color, linewidth=1.6, label=name)
    for (name, value), color, dashes in zip(marks.items(), COLORS[3:], ("--", ":", "-."), strict=False):
        axes.axvline(value, color=color, linestyle=dashes, linewidth=1.6, label=name)
    if spread is not None:
        axes.axvspan(*spread, color=COLORS[0], alpha=0.15, label="simulated optimum, 95 % of resamplings")
    axes.set_xscale("log")
    axes.set_ylim(min(percent) - 0.1 * (max(percent) - min(percent)) - 1e-3, None)
    axes.set_xlabel("seconds between checkpoints", fontsize=8)
    axes.set_ylabel("goodput, %", fontsize=8)
    figure.legend(fontsize=8, frameon=False, labelcolor="black", ncols=3, loc="outside upper left")
    style(axes)
    return figure


def spent_figure(sizes: Sequence[int], shares: Mapping[str, Sequence[float]]) -> Figure:
    """Draw where the time goes that is not useful, in % of all, stacked, against the number of GPUs."""
    figure = Figure(figsize=(4.5, 3.1), layout="constrained")
    axes = figure.subplots()
    bottom = [0.0] * len(sizes)
    for (name, values), color in zip(shares.items(), COLORS, strict=False):
        percent = [100 * value for value in values]
        axes.bar(range(len(sizes)), percent, bottom=bottom, color=color, width=0.75, label=name)
        bottom = [low + more for low, more in zip(bottom, percent, strict=True)]
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("GPUs", fontsize=8)
    axes.set_ylabel("% of the time", fontsize=8)
    legend(axes)
    style(axes)
    axes.grid(visible=False, axis="x")
    return figure
