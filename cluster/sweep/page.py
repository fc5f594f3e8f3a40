"""The page about a sweep: who won and by how much, what mattered, and how each trial got there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.sweep.config import SweepConfig
from cluster.sweep.distributions import Distribution
from cluster.sweep.importance import LEAST_TRIALS, find_importance
from cluster.sweep.journal import TrialRecord
from cluster.sweep.table import cell, columns_of, find_best, setting_rows, trial_rows
from shards.support.page import Page
from shards.support.settings import dump_yaml

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRIC_WORDS = {
    "probe": "AUROC of logistic regression on frozen features, cross-validated inside the training part of "
    "the labeled set; its test part was not touched",
    "knn": "AUROC of nearest neighbors' votes on frozen features, cross-validated inside the training part "
    "of the labeled set; its test part was not touched",
    "high_band": "error of reconstructed detail, relative, where the same patches of the same images are "
    "hidden from all trials (0: all detail is back, 1: none, above 1: what is drawn is made up)",
    "hf_recall": "share of the hidden high-frequency tokens that are among the highest in the reconstruction "
    "too, where the same patches of the same images are hidden from all trials (.25 by chance)",
}


def build_page(sweep: SweepConfig, trials: Sequence[TrialRecord], path: Path) -> None:
    """Write the page."""
    done = sum(trial.state == "done" for trial in trials)
    stopped = sum(trial.state == "stopped" for trial in trials)
    failed = sum(trial.state == "failed" for trial in trials)
    page = Page(
        "Sweep",
        f"{sweep.base}: {len(trials)} trials, {done} to their end, {stopped} stopped early, {failed} failed; "
        f"search {sweep.search}, scheduler {sweep.scheduler.kind}, seed {sweep.seed}",
    )
    page.text(f"Metric: {METRIC_WORDS[sweep.metric.kind]}. Better is {'more' if is_up(sweep) else 'less'}.")
    add_results(page, sweep, trials)
    add_importance(page, sweep, trials)
    known = [trial for trial in trials if trial.value is not None]
    if known:
        page.heading("Parallel coordinates")
        page.figure(
            draw_parallel(sweep, known),
            "A line for each trial, from its settings to its last value; dark is better, dashed was stopped.",
        )
        page.heading("Learning curves")
        page.figure(draw_curves(sweep, known), f"{sweep.metric.kind} at each report, by optimizer step.")
    page.heading("The sweep")
    page.code(dump_yaml(sweep.model_dump(mode="json", exclude_none=True)))
    page.write(path)


def is_up(sweep: SweepConfig) -> bool:
    """Whether larger values are better."""
    return sweep.metric.direction == "max"


def add_results(page: Page, sweep: SweepConfig, trials: Sequence[TrialRecord]) -> None:
    """Tables of settings and trials."""
    best = find_best(sweep, trials)
    settings = setting_rows(sweep, trials)
    if settings:
        page.heading("Settings over seeds")
        add_table(page, settings)
        page.text("Mean and standard deviation over seeds, of trials that came to their end.")
    page.heading("Trials")
    if best is not None:
        told = ", ".join(f"{key} {cell(value)}" for key, value in best.trial.values.items())
        page.text(f"Best: {best.describe(sweep.metric.kind)}: {told}; its config is best.yaml.")
    if not settings:
        page.note(SEEDS_NOTE)
    add_table(page, trial_rows(sweep, trials))


SEEDS_NOTE = (
    "One seed for each setting: the best of many trials is partly luck. Before it is believed, run the first "
    "few again with several seeds (train.seed of kind grid), and measure them on images that no trial was "
    "chosen by."
)


def add_table(page: Page, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a table."""
    columns = columns_of(list(map(dict, rows)))
    page.table(columns, [[shown(row.get(name)) for name in columns] for row in rows])


def shown(value: Any) -> Any:
    """A cell; lists as text."""
    return value if value is None or isinstance(value, int | float | str) else str(value)


def add_importance(page: Page, sweep: SweepConfig, trials: Sequence[TrialRecord]) -> None:
    """Importance of the keys, or why there is none."""
    known = [trial for trial in trials if trial.value is not None]
    page.heading("Importance")
    found = find_importance(
        sweep.space,
        [trial.values for trial in known],
        [float(trial.value or 0) for trial in known],
        sweep.seed,
    )
    if found is None:
        page.text(
            f"Not computed: it takes {LEAST_TRIALS} trials of different values, there are {len(known)}."
        )
        return
    page.text(found.describe())
    page.figure(draw_importance(found.keys), "Loss of R^2 when a key's values are shuffled.")


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of a size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def draw_importance(keys: Mapping[str, tuple[float, float]]) -> Figure:
    """Bars, the largest on top."""
    figure, axes = new_figure(7, 0.8 + 0.35 * len(keys))
    names = list(keys)[::-1]
    axes.barh(names, [keys[n][0] for n in names], xerr=[keys[n][1] for n in names], color="#3a7ca5")
    axes.set_xlabel("loss of R^2")
    return figure


def place(distribution: Distribution, value: Any, others: Sequence[Any]) -> float:
    """Where a value lies on its axis, from 0 to 1; `others` are all values that occur, in order."""
    if distribution.range is None:
        return others.index(value) / max(1, len(others) - 1)
    low, high = (float(end) for end in distribution.range)
    if distribution.loguniform is not None:
        return float(np.log(value / low) / np.log(high / low))
    return float((value - low) / (high - low))


def in_order(values: Sequence[Any]) -> list[Any]:
    """Distinct values: numbers by size, others by their text."""
    distinct = list({repr(value): value for value in values}.values())
    numbers = all(isinstance(value, int | float) for value in distinct)
    return sorted(distinct) if numbers else sorted(distinct, key=repr)


def draw_parallel(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> Figure:
    """Parallel coordinates of settings and value."""
    from matplotlib import colormaps

    values = np.array([trial.value for trial in trials], float)
    low, high = values.min(), values.max()
    share = (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
    worth = share if is_up(sweep) else 1 - share
    keys = list(sweep.space)
    figure, axes = new_figure(max(6, 1.9 * (len(keys) + 1)), 4)
    for trial, height, good in zip(trials, share, worth, strict=True):
        heights = []
        for key in keys:
            others = in_order([other.values[key] for other in trials])
            heights.append(place(sweep.space[key], trial.values[key], others))
        line = "--" if trial.state == "stopped" else "-"
        axes.plot([*heights, height], line, color=colormaps["viridis_r"](float(good)), alpha=0.8)
    for x, key in enumerate(keys):
        axes.axvline(x, color="0.6", linewidth=0.8, zorder=0)
        for height, text in axis_labels(sweep.space[key], [trial.values[key] for trial in trials]):
            axes.text(x, height, f" {text}", fontsize=8, va="center")
    for height, value in ((0.0, low), (1.0, high)) if high > low else ((0.5, low),):
        axes.text(len(keys), height, f" {value:.4g}", fontsize=8, va="center")
    axes.axvline(len(keys), color="0.6", linewidth=0.8, zorder=0)
    names = [key.removeprefix("method.").removeprefix("train.") for key in keys]
    axes.set_xticks(range(len(keys) + 1), [*names, sweep.metric.kind], rotation=15, ha="right")
    axes.set_yticks([])
    axes.set_ylim(-0.05, 1.05)  # all texts, wherever the lines end
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def axis_labels(distribution: Distribution, values: Sequence[Any]) -> list[tuple[float, str]]:
    """Height and text of what stands at an axis."""
    others = in_order(values)
    if distribution.range is None:
        return [(place(distribution, value, others), cell(value)) for value in others]
    return [(0.0, cell(distribution.range[0])), (1.0, cell(distribution.range[1]))]


def draw_curves(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> Figure:
    """The metric of each trial over its steps."""
    figure, axes = new_figure(7, 4)
    best = find_best(sweep, trials)
    for trial in trials:
        is_best = best is not None and trial.trial == best.trial.trial
        axes.plot(
            [report.step for report in trial.reports],
            [report.value for report in trial.reports],
            "--" if trial.state == "stopped" else "-",
            marker=".",
            linewidth=2.2 if is_best else 1,
            label=f"{trial.name}{' (best)' if is_best else ''}",
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(sweep.metric.kind)
    if len(trials) <= 12:
        axes.legend(fontsize=8)
    return figure
