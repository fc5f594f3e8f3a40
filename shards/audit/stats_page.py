"""The statistics of a dataset as one HTML page: tables, plots, and images with their HF tokens marked."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from shards.audit.stats import PERCENTILES, ModalityStats, Stats
from shards.audit.stats_shard import NUM_BINS, RANGES
from shards.hf.draw import KEEP, fit, mark_tokens
from shards.support.page import Page

_SIDE = 240  # longer side of an image on the page, in pixels
_AXES = {"uint8": "grey level", "int16": "Hounsfield units"}


def make_page(stats: Stats) -> Page:
    """Put the page together; the same statistics give the same page."""
    page = Page("What the dataset holds", f"{stats.place}, snapshot {stats.snapshot}")
    page.text(
        f"Counts are of all samples. Pixels were looked at in up to {stats.num_images} images of each "
        f"modality, drawn with seed {stats.seed}. Images are stored with a short side of {stats.size} pixels "
        f"or less; HF tokens are patches of {stats.patch_size} pixels."
    )
    page.heading("Summary")
    page.table(*stats.table())
    page.text("Sides are in pixels: smallest - median - largest. Skipped: repeats that no reader sees.")
    page.table(["", "units"], [[name, number] for name, number in stats.counts])
    for modality in stats.modalities:
        _add_modality(page, modality, stats.patch_size)
    return page


def _add_modality(page: Page, modality: ModalityStats, patch_size: int) -> None:
    page.heading(modality.name)
    page.table(["source", "samples"], list(map(list, modality.sources.items())))
    if modality.left_out:
        page.table(["left out", "units"], list(map(list, modality.left_out.items())))
    sides = sorted(modality.measured.sides)
    titles = ["smallest", *(f"{percentile} %" for percentile in PERCENTILES[1:-1]), "largest"]
    page.table(["size in pixels", *titles], [[side, *modality.percentiles(side)] for side in sides])
    for label in sorted(modality.measured.labels):
        classes = modality.classes(label)
        if classes:
            page.table([f"label {label}", "samples"], [list(item) for item in classes])
            num_more = len(modality.measured.labels[label]) - len(classes)
            if num_more:
                page.text(f"and {num_more} more values")
        else:
            page.text(f"Label {label} has too many values to be a class.")
    figures = [(_draw_histogram(modality, dtype), "") for dtype in sorted(modality.measured.histograms)]
    if modality.measured.ring_tokens:
        figures.append(
            (_draw_heat(modality), f"Where the kept {KEEP:.0%} of the tokens lie, mean of the images")
        )
    if figures:
        page.heading("Pixels and HF tokens", level=3)
        page.gallery(figures, columns=2)
        facts = [["HF definition", modality.hf_digest], *map(list, modality.hf_facts())]
        page.table(["HF tokens", ""], facts)
    if modality.measured.shown:
        page.heading("Images and their HF tokens", level=3)
        items = []
        for shown in modality.measured.shown:
            marked = mark_tokens(shown.pixels, shown.tokens, patch_size, side=_SIDE)
            items += [(fit(shown.pixels, _SIDE), shown.caption), (marked, f"strongest {KEEP:.0%} outlined")]
        page.gallery(items, columns=4)


def _draw_histogram(modality: ModalityStats, dtype: str) -> Figure:
    """Mean histogram of the measured images."""
    low, high = RANGES[dtype]
    edges = np.linspace(low, high, NUM_BINS + 1)
    number = modality.measured.num_images[dtype]
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    axes.stairs(100 * modality.measured.histograms[dtype] / number, edges, fill=True, color="#3b82b8")
    axes.set_yscale("log")
    axes.set_xlabel(f"{_AXES[dtype]} ({number} images)")
    axes.set_ylabel("% of the pixels")
    return figure


def _draw_heat(modality: ModalityStats) -> Figure:
    """How often a place of the image is among the kept tokens."""
    number = len(modality.measured.ring_tokens)
    figure = Figure(figsize=(3.6, 3))
    axes = figure.subplots()
    drawn = axes.imshow(100 * modality.measured.heat / number, cmap="viridis", vmin=0, aspect="equal")
    axes.set_xticks([])
    axes.set_yticks([])
    bar = figure.colorbar(drawn)  # the page shows this figure larger than its neighbor
    bar.set_label("% of the images that keep it", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    return figure
