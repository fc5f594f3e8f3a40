"""Measures of test images one by one: their means, the intervals of these, and what a file keeps of them.

A row is one image's measures by name; NaN where that image cannot tell a measure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from frepa_dist.evaluate.leakage import NOT_CHECKED
from frepa_dist.evaluate.scores import Int64, resamples
from shards.support.settings import Settings

Row = Mapping[str, float]


class ImageResult(Settings):
    """Measures of test images, of something that learned on the maps of a frozen encoder.

    Attributes:
        encoder: what was frozen.
        images: where the images lie.
        names: of the test images.
        by_image: of each measure its values, in the order of `names`; None where an image cannot tell it.
        mean: of each measure over the test images that can tell it.
        low, high: 95% bootstrap interval over test images, or patients where they are known (percentiles).
        num_train: training images.
        leakage: whether images were in the pretraining data, in words.
        groups: number of the patient of each test image, None where patients are not known.
    """

    encoder: str
    images: str
    names: list[str]
    by_image: dict[str, list[float | None]]
    mean: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    num_train: int
    leakage: str = NOT_CHECKED
    groups: list[int] | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")


def summarize(
    rows: Sequence[Row], num_resamples: int, seed: int, groups: Sequence[int] | None = None
) -> dict[str, Any]:
    """`by_image`, `mean`, `low` and `high` of an `ImageResult`; see `intervals_over_images`."""
    low, high = intervals_over_images(rows, num_resamples, seed, groups)
    return {"by_image": values_by_image(rows), "mean": mean_over_images(rows), "low": low, "high": high}


def values_by_image(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """Of each measure its values in the order of the rows, None for NaN: what paired tests compare."""
    return {name: [None if np.isnan(row[name]) else float(row[name]) for row in rows] for name in rows[0]}


def mean_over_images(rows: Sequence[Row]) -> dict[str, float]:
    """Of each measure over the images that can tell it; a measure that none can tell is left out."""
    found = {}
    for name in rows[0]:
        values = [row[name] for row in rows if not np.isnan(row[name])]
        if values:
            found[name] = float(np.mean(values))
    return found


def draws_of_images(
    num_images: int, groups: Sequence[int] | None, num_resamples: int, seed: int
) -> Iterator[Int64]:
    """Draw images, or whole groups of them, with replacement: `scores.resamples` where there are no classes.

    Args:
        num_images: n.
        groups: (n,) patient of each image; None where each image stands for itself.
        num_resamples: how often is drawn.
        seed: of the draws.
    """
    units = np.arange(num_images) if groups is None else np.array(groups, np.int64)
    return resamples(units, np.zeros(num_images, np.int64), num_resamples, seed)


def intervals_over_images(
    rows: Sequence[Row], num_resamples: int, seed: int, groups: Sequence[int] | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """95% percentile intervals of the means over images drawn with replacement: low and high ends.

    Args:
        rows: measures of each image.
        num_resamples: how often is drawn.
        seed: of the draws.
        groups: patient of each image; all images of a patient are drawn together.
    """
    names = list(mean_over_images(rows))
    table = np.array([[row[name] for name in names] for row in rows])
    is_known, values = ~np.isnan(table), np.nan_to_num(table)
    with np.errstate(invalid="ignore"):  # a draw may hold no image that can tell
        means = [
            values[drawn].sum(axis=0) / is_known[drawn].sum(axis=0)
            for drawn in draws_of_images(len(rows), groups, num_resamples, seed)
        ]
        low, high = np.nanpercentile(means, [2.5, 97.5], axis=0)
    return dict(zip(names, low.tolist(), strict=True)), dict(zip(names, high.tolist(), strict=True))


def shown_places(values: Sequence[float | None], chosen: Sequence[int] | None) -> list[tuple[str, int]]:
    """Places of the images to show, chosen or else `worst_middle_best`, with words to begin with."""
    if chosen is not None:
        return [("", place) for place in chosen if place < len(values)]
    return [(f"{word}: ", place) for word, place in worst_middle_best(values)]


def name_test(place: int) -> str:
    """What a page calls a test image, by its place in `ImageResult.names`: file names may name patients."""
    return f"test image {place + 1}"


def worst_middle_best(values: Sequence[float | None]) -> list[tuple[str, int]]:
    """Places of the best, the median and the worst image by a measure that is better the higher it is.

    Fewer where there are fewer images that can tell it; none twice.
    """
    order = [int(place) for place in np.argsort([np.nan if v is None else v for v in values], kind="stable")]
    known = [place for place in order if values[place] is not None]
    if not known:
        return []
    middle = [("median", known[len(known) // 2])] if len(known) > 2 else []
    worst = [("worst", known[0])] if len(known) > 1 else []
    return [("best", known[-1]), *middle, *worst]
