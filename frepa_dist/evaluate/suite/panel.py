"""Statistics of a suite: what the seeds of an encoder gave for the same test images, and differences.

Two questions are kept apart. Over test images: would these very weights do as well on other images of the
kind? Over seeds: would another training do as well? The intervals and p values here are about the first;
the second is told by the standard deviation over seeds, and of one seed nothing is told.

Shapes: S seeds, n test images, V looks at an image (draws of the labels, filters), K classes, G patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, rankdata, t

from frepa_dist.evaluate.compare import Difference
from frepa_dist.evaluate.scores import Bool, Float64, Int64, resamples
from shards.read.draws import sample_rng


@dataclass(frozen=True)
class Panel:
    """One measure of one encoder on the test images.

    Attributes:
        values: (S, n) a value of each image, NaN where it cannot be told: the measure is their mean. Or
            (S, V, n, K) scores of classes: it is the macro AUROC, the mean over looks.
        groups: (n,) patients; images of one are never drawn or swapped apart.
        y: (n,) classes, of scores.
    """

    values: Float64
    groups: Int64
    y: Int64 | None = None

    def by_seed(self, drawn: Int64 | slice = slice(None)) -> Float64:
        """The measure of each seed (S,), on all images or some; NaN where none of these can tell it."""
        if self.y is not None:
            means: Float64 = macro_auroc_of_many(self.values[:, :, drawn], self.y[drawn]).mean(axis=1)
            return means
        chosen = self.values[:, drawn]
        known = np.isfinite(chosen)
        counts = known.sum(axis=1)
        sums = np.where(known, chosen, 0).sum(axis=1)
        shares: Float64 = np.divide(sums, counts, out=np.full(len(chosen), np.nan), where=counts > 0)
        return shares

    @property
    def labels(self) -> Int64:
        """(n,) what every draw has to hold some of: classes, or one for all."""
        return np.zeros(len(self.groups), np.int64) if self.y is None else self.y


def stack_panels(panels: Sequence[Panel]) -> Panel | None:
    """The seeds of one encoder as one panel; None where they are not of the same test images."""
    first = panels[0]
    alike = all(
        panel.values.shape[1:] == first.values.shape[1:]
        and np.array_equal(panel.groups, first.groups)
        and np.array_equal(panel.labels, first.labels)
        for panel in panels
    )
    return Panel(np.concatenate([panel.values for panel in panels]), first.groups, first.y) if alike else None


def macro_auroc_of_many(scores: Float64, y: Int64) -> Float64:
    """`scores.macro_auroc` of many scores (..., n, K) of the same images (n,) -> (...)."""
    ranks = rankdata(scores, axis=-2)
    is_own = y[:, None] == np.arange(scores.shape[-1])  # (n, K)
    counts = is_own.sum(axis=0)
    sums = np.einsum("...nk,nk->...k", ranks, is_own)
    areas = (sums - counts * (counts + 1) / 2) / (counts * (len(y) - counts))
    means: Float64 = areas.mean(axis=-1)
    return means


def interval_over_units(panel: Panel, num: int, seed: int) -> tuple[float, float]:
    """95% percentile interval of the mean over seeds, test images (patients) drawn with replacement."""
    means = [panel.by_seed(drawn).mean() for drawn in resamples(panel.groups, panel.labels, num, seed)]
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return float(low), float(high)


class SeedSpread(NamedTuple):
    """Of values of several seeds: mean, standard deviation, 95% interval of the mean by Student's t.

    The interval takes the values for draws from a normal distribution; of three seeds it is wide.
    """

    mean: float
    deviation: float
    low: float
    high: float


def spread_over_seeds(values: Sequence[float] | Float64) -> SeedSpread | None:
    """Spread of values of seeds, None of a single one."""
    if len(values) < 2:
        return None
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(t.ppf(0.975, len(values) - 1)) * deviation / len(values) ** 0.5
    return SeedSpread(mean, deviation, mean - half, mean + half)


def compare_panels(first: Panel, second: Panel, *, num_resamples: int, num: int, seed: int) -> Difference:
    """Compare two encoders by the difference of their means over seeds, paired by test image.

    The null hypothesis of the permutation: for each patient (image), what the one encoder gave with all its
    seeds could as well be what the other gave; so all seeds are swapped at once, and images of one patient
    together. Scores are turned to ranks first, as by `compare.permutation_test`. It needs as many seeds of
    both where the measure is an AUROC; with other numbers, p is that of a normal distribution with the
    standard deviation of the bootstrap.

    Args:
        first: of the same images as the second; of image values, only those count that both can tell.
        second: what is taken off.
        num_resamples: of the bootstrap that gives the interval.
        num: swaps drawn; the smallest p is 1 / (num + 1).
        seed: of all draws.
    """
    if first.y is None:
        return _compare_values(first, second, num_resamples, num, seed)
    value = float(first.by_seed().mean() - second.by_seed().mean())
    spread = [
        first.by_seed(drawn).mean() - second.by_seed(drawn).mean()
        for drawn in resamples(first.groups, first.y, num_resamples, seed)
    ]
    low, high = np.percentile(spread, [2.5, 97.5])
    if len(first.values) == len(second.values):
        p, test = _swap_scores(first, second, value, num, seed), "permutation"
    else:
        p, test = _normal_p(value, float(np.std(spread, ddof=1))), "bootstrap, normal"
    return Difference(value, float(low), float(high), p, test)


def _normal_p(value: float, deviation: float) -> float:
    if deviation == 0:  # a difference that no draw changes cannot be judged by the draws
        return 1.0 if value == 0 else float("nan")
    return float(2 * norm.sf(abs(value) / deviation))


def _swap_scores(first: Panel, second: Panel, value: float, num: int, seed: int) -> float:
    """Share of swaps, the one that was seen among them, whose difference is at least as large."""
    assert first.y is not None
    one, other = (rankdata(panel.values, axis=-2) for panel in (first, second))
    count = 0
    for swap in _swaps(first.groups, num, seed):
        chosen = swap[:, None]
        gap = macro_auroc_of_many(np.where(chosen, other, one), first.y).mean()
        gap -= macro_auroc_of_many(np.where(chosen, one, other), first.y).mean()
        count += abs(gap) >= abs(value) - 1e-12  # the tolerance is for sums in another order
    return (count + 1) / (num + 1)


def _swaps(groups: Int64, num: int, seed: int) -> list[Bool]:
    """Which images (n,) change sides, `num` times, whole patients at once."""
    units = np.unique(groups, return_inverse=True)[1]
    rng = sample_rng(seed, 0, 0, "permutation test")
    return [(rng.random(units.max() + 1) < 0.5)[units] for _ in range(num)]


def _compare_values(first: Panel, second: Panel, num_resamples: int, num: int, seed: int) -> Difference:
    gaps: npt.NDArray[Any] = first.values.mean(axis=0) - second.values.mean(axis=0)
    known = np.isfinite(gaps)  # NaN of any seed makes the mean NaN
    if not known.any():
        return Difference(float("nan"), float("nan"), float("nan"), 1.0, "no image that both can tell")
    gaps, groups = gaps[known], first.groups[known]
    value, one_class = float(gaps.mean()), np.zeros(len(gaps), np.int64)
    spread = [gaps[drawn].mean() for drawn in resamples(groups, one_class, num_resamples, seed)]
    low, high = np.percentile(spread, [2.5, 97.5])
    flipped = [np.where(swap, -gaps, gaps).mean() for swap in _swaps(groups, num, seed)]
    count = int((np.abs(flipped) >= abs(value) - 1e-12).sum())
    return Difference(value, float(low), float(high), (count + 1) / (num + 1), "permutation")
