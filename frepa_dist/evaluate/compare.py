"""Whether one encoder is better than another on the same images: paired tests.

Shapes: n images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, rankdata

from frepa_dist.evaluate.scores import Bool, Float64, Int64, Measure, resamples
from shards.read.draws import sample_rng


@dataclass(frozen=True)
class Difference:
    """What one encoder has over another.

    Attributes:
        value: measure of the first minus that of the second.
        low, high: 95% interval of it.
        p: of a two-sided test that there is none.
        test: which test that is.
    """

    value: float
    low: float
    high: float
    p: float
    test: str


def delong(first: Float64, second: Float64, positive: Bool) -> Difference:
    """Compare the AUROCs of two scores of the same images (DeLong, DeLong and Clarke-Pearson 1988).

    By midranks (Sun and Xu 2014). Images count as independent: of patients with several images take
    `permutation_test`. So too where AUROCs differ and their estimated variance is none, as of an encoder that
    is always right and one that is always wrong: interval and p are NaN then.

    Args:
        first: (n,) scores of one encoder, higher is likelier.
        second: (n,) those of the other.
        positive: (n,), with at least two of either kind.
    """
    m, n = int(positive.sum()), int((~positive).sum())
    from_positives, from_negatives = [], []
    for scores in (first, second):
        ranks = rankdata(scores)
        own, others = scores[positive], scores[~positive]
        from_positives.append((ranks[positive] - rankdata(own)) / n)
        from_negatives.append(1 - (ranks[~positive] - rankdata(others)) / m)
    value = float(np.mean(from_positives[0]) - np.mean(from_positives[1]))
    variance = float(
        np.var(from_positives[0] - from_positives[1], ddof=1) / m
        + np.var(from_negatives[0] - from_negatives[1], ddof=1) / n
    )
    if variance == 0:
        end, p = (value, 1.0) if value == 0 else (np.nan, np.nan)
        return Difference(value, end, end, p, "DeLong")
    deviation = variance**0.5
    p = float(2 * norm.sf(abs(value) / deviation))
    half = float(norm.ppf(0.975)) * deviation
    return Difference(value, value - half, value + half, p, "DeLong")


def permutation_test(
    first: Float64,
    second: Float64,
    y: Int64,
    groups: Int64 | None,
    measure: Measure,
    *,
    num: int = 2000,
    seed: int = 0,
) -> Difference:
    """Compare any measure of two encoders: were they alike, their scores could be swapped image by image.

    Scores are turned to ranks within each encoder and class first, since two encoders' scores have no common
    unit; so only measures of order (AUROC, average precision) mean here what they mean elsewhere.

    Args:
        first: (n, K) scores of one encoder.
        second: (n, K) those of the other.
        y: (n,) classes.
        groups: (n,) patients, whose images are swapped together; None swaps each by itself.
        measure: what is compared.
        num: swaps drawn; the smallest p is 1 / (num + 1).
        seed: of the draws.

    Returns:
        The difference, its percentile interval over resampled units, and the share of swaps that give at
        least as much (Phipson and Smyth 2010 count the one that was seen).
    """
    first, second = (np.apply_along_axis(rankdata, 0, scores) for scores in (first, second))
    value = measure(first, y) - measure(second, y)
    units = np.unique(np.arange(len(y)) if groups is None else groups, return_inverse=True)[1]
    rng = sample_rng(seed, 0, 0, "permutation test")
    count = 0
    for _ in range(num):
        swap = (rng.random(units.max() + 1) < 0.5)[units][:, None]
        one, other = np.where(swap, second, first), np.where(swap, first, second)
        # the tolerance is for sums in another order
        count += abs(measure(one, y) - measure(other, y)) >= abs(value) - 1e-12
    spread = [
        measure(first[drawn], y[drawn]) - measure(second[drawn], y[drawn])
        for drawn in resamples(units, y, num, seed)
    ]
    low, high = np.percentile(spread, [2.5, 97.5])
    return Difference(value, float(low), float(high), (count + 1) / (num + 1), "permutation")


def holm(p_values: Float64) -> Float64:
    """Correct p values for how many there are (Holm 1979): (m,) -> (m,)."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.maximum.accumulate(p_values[order] * factors)
    result = np.empty_like(corrected)
    result[order] = np.minimum(corrected, 1.0)
    return result
