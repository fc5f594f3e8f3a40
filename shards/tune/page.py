"""The page about a search of HF parameters: tables, curves, what the search saw, the worst images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shards.hf.draw import mark_tokens
from shards.hf.tokens import hf_token_indices, rank_tokens
from shards.support.page import Page
from shards.tune.masked import SEARCH, VALIDATION
from shards.tune.recall import BEST, DEFAULT, IDEAL, KEPT_SHARES

if TYPE_CHECKING:
    from shards.tune.search import TuneResult

COLORS = ("#3d85c6", "#dd7e18", "#4a9e5c", "#c94f6d", "#8a8f98")  # seen on white and on black
NUM_WORST, NUM_TRIALS, TILE = 6, 8, 280
COLUMNS = ("group", "way", "images", "mean", "5th percentile", "minimum", "worse copies")


def write_page(result: TuneResult, path: Path) -> None:
    """Write the page.

    Raises:
        EnvironmentFault: it cannot be written.
    """
    config = result.config
    page = Page(
        f"HF parameters of {config.modality}",
        f"{len(result.images)} images with masks at {config.size} px, {config.trials} trials",
    )
    page.heading("Result")
    page.note(result.verdict())
    page.text(
        f"Recall: mask pixels in the kept {config.keep:.0%} of {config.patch_size} px patches, over those in "
        "the best choice of as many patches. The worse copies of each image imitate a noisy sensor and light "
        "from one side. Gradient: plain gradient magnitude inside the field of view. Random: patches drawn "
        "inside it."
    )
    page.heading("Validation", level=3)
    page.text("Images that the search did not see.")
    page.table(COLUMNS, result.rows(VALIDATION))
    page.heading("Search", level=3)
    page.table(COLUMNS, result.rows(SEARCH))
    _add_parameters(page, result)
    page.heading("Recall by share of patches kept")
    page.figure(_curve_figure(result), "Mean over the validation part: share of all mask pixels held.")
    _add_trials(page, result)
    _add_worst(page, result)
    if result.left_out:
        page.heading("Left out")
        page.text(f"{len(result.left_out)} images without a mask, or with an empty one.")
        page.code("\n".join(result.left_out))
    page.write(path)


def _add_parameters(page: Page, result: TuneResult) -> None:
    page.heading("Parameters")
    default, best = (params.model_dump(mode="json") for params in (result.config.start(), result.best))
    page.table(
        ["parameter", "default", "best"],
        [(name, str(value), str(best[name])) for name, value in default.items()],
    )
    page.text("best.yaml holds what differs from the modality's own: frepa shards build --config best.yaml")


def _add_trials(page: Page, result: TuneResult) -> None:
    page.heading("What the search saw")
    page.text(
        "Objective: mean over groups of the recall on the search part, worse copies with a weight of "
        f"{result.config.worse_weight:g}. Where many different trials come close to the best, the exact "
        "values matter little."
    )
    figure = Figure(figsize=(7.4, 3.0), layout="constrained")
    for axes, name in zip(
        figure.subplots(1, 3, sharey=True), ("cutoff_cycles", "log_offset", "low_pass_cycles"), strict=True
    ):
        points = [
            (changes[name], value)
            for changes, value in zip(result.tried, result.objectives, strict=True)
            if changes.get(name) is not None
        ]
        axes.scatter([x for x, _ in points], [y for _, y in points], s=9, color=COLORS[0])
        axes.set_xscale("log")
        axes.set_xlabel(name, fontsize=8)
        _style(axes)
    page.figure(figure, "Each point is a trial; trials without the logarithm or the low-pass have no point.")
    order = np.argsort(result.objectives)[::-1][:NUM_TRIALS]
    rows = [(result.objectives[i], _describe_changes(result.tried[i])) for i in order]
    page.table(["objective", "changes to the default"], rows)


def _describe_changes(changes: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in changes.items()) or "none"


def _add_worst(page: Page, result: TuneResult) -> None:
    page.heading("The worst images")
    page.text(
        "Validation images with the lowest recall of the best parameters. Outlined: patches kept by the "
        "default, by the best, and the best possible choice."
    )
    chosen = sorted(result.select(VALIDATION), key=lambda index: float(result.recalls[BEST][index, 0]))
    start, config = result.config.start(), result.config
    for index in chosen[:NUM_WORST]:
        image = result.images[index]
        items = []
        for way, params in ((DEFAULT, start), (BEST, result.best)):
            tokens = hf_token_indices(image.pixels, config.patch_size, 1.0, params)
            drawn = mark_tokens(image.pixels, tokens, config.patch_size, config.keep, TILE)
            items.append((drawn, f"{way}: {result.recalls[way][index, 0]:.3f}"))
        ideal = rank_tokens(image.mask, 1.0)
        drawn = mark_tokens(image.pixels, ideal, config.patch_size, config.keep, TILE)
        items.append((drawn, f"best possible, {image.file.group} {image.file.image.name}"))
        page.gallery(items, columns=3)


def _curve_figure(result: TuneResult) -> Figure:
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for (way, values), color in zip(result.curves.items(), (COLORS[-1], *COLORS), strict=False):
        style = "--" if way == IDEAL else "-"
        axes.plot(KEPT_SHARES, values, style, color=color, label=way, linewidth=1.6, marker="o", markersize=3)
    axes.axvline(result.config.keep, color=COLORS[-1], linewidth=0.8, linestyle=":")
    axes.set_xlabel("share of patches kept", fontsize=8)
    axes.set_ylabel("share of mask pixels held", fontsize=8)
    axes.legend(fontsize=8, frameon=False, labelcolor="black", loc="lower right")
    _style(axes)
    return figure


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=COLORS[-1], alpha=0.3, linewidth=0.7)
    axes.tick_params(labelsize=8)
