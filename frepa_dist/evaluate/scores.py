"""How good scores of classes are: AUROC, average precision, accuracy, kappa, each with a bootstrap interval.

Shapes: n images, K classes, M measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from shards.read.draws import sample_rng

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Measure = Callable[[Float64, Int64], float]

LEAST_WHOLE, NUM_TRIED = 0.1, 100
"""Share of the draws of a bootstrap that have to hold every class, for those that do not to be made again."""


def auroc(scores: Float64, positive: Bool) -> float:
    """Area under the ROC curve: the chance that a positive scores higher than a negative, ties count half.

    Args:
        scores: (n,).
        positive: (n,), with at least one of either kind.
    """
    num = int(positive.sum())
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - num * (num + 1) / 2) / (num * (len(scores) - num)))


def macro_auroc(scores: Float64, y: Int64) -> float:
    """Mean over the K classes of the AUROC of one against the rest; of two classes, both are the same number.

    Args:
        scores: (n, K).
        y: (n,) classes, each of the K there.
    """
    return float(np.mean([auroc(scores[:, k], y == k) for k in range(scores.shape[1])]))


def macro_auprc(scores: Float64, y: Int64) -> float:
    """Average precision: of two classes that of the second, of more the mean of one against the rest.

    Args:
        scores: (n, K).
        y: (n,) classes, each of the K there.
    """
    num_classes = scores.shape[1]
    classes = (1,) if num_classes == 2 else range(num_classes)
    return float(np.mean([average_precision(scores[:, k], y == k) for k in classes]))


def average_precision(scores: Float64, positive: Bool) -> float:
    """Mean of the precision at each positive; equal scores are one threshold.

    As scikit-learn's, whose checks of its arguments take a hundred times as long: a bootstrap feels it.

    Args:
        scores: (n,).
        positive: (n,), with at least one true.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    found = np.cumsum(positive[order])[ends]
    return float((np.diff(found, prepend=0) * found / (ends + 1)).sum() / found[-1])


def accuracy(scores: Float64, y: Int64) -> float:
    """Share of images whose own class scores highest."""
    return float(np.mean(scores.argmax(axis=1) == y))


def balanced_accuracy(scores: Float64, y: Int64) -> float:
    """Mean over the classes of the share of their images whose own class scores highest."""
    hits = scores.argmax(axis=1) == y
    return float(np.mean([hits[y == k].mean() for k in range(scores.shape[1])]))


def quadratic_kappa(scores: Float64, y: Int64) -> float:
    """Cohen's kappa with quadratic weights (Cohen 1968), for classes that are grades 0..K-1.

    1 is agreement, 0 what chance gives; 0 too where all predictions and all labels are one grade.
    """
    num_classes = scores.shape[1]
    predicted = scores.argmax(axis=1)
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (y, predicted), 1)
    grades = np.arange(num_classes)
    weights = (grades[:, None] - grades[None, :]) ** 2
    by_chance = (weights * np.outer(counts.sum(axis=1), counts.sum(axis=0))).sum() / len(y)
    return float(1 - (weights * counts).sum() / by_chance) if by_chance else 0.0


def measures(num_classes: int, *, are_grades: bool = False) -> dict[str, Measure]:
    """The measures of a task by name, the AUROC first."""
    chosen: dict[str, Measure] = {
        "auroc": macro_auroc,
        "auprc": macro_auprc,
        "accuracy": accuracy,
        "balanced_accuracy": balanced_accuracy,
    }
    return chosen | ({"kappa": quadratic_kappa} if are_grades and num_classes > 2 else {})


def resamples(units: Int64, y: Int64, num: int, seed: int) -> Iterator[Int64]:
    """Draw images with replacement, whole units (patients) at a time.

    Of a draw that lacks a class no AUROC can be taken: it is made again. Where so many classes are rare that
    most draws would be (`LEAST_WHOLE` of `NUM_TRIED`), units that hold the classes that a draw lacks are
    added to it at random.

    Args:
        units: (n,) which unit each image belongs to.
        y: (n,) classes.
        num: how many draws.
        seed: of the draws.

    Yields:
        Indices of images, as many as their units hold; of rare classes a few more.
    """
    members = members_of(units)
    numbers = np.unique(units, return_inverse=True)[1]
    holders = {k: np.unique(numbers[y == k]) for k in np.unique(y).tolist()}

    def draw(rng: np.random.Generator) -> tuple[Int64, set[int]]:
        drawn = np.concatenate([members[unit] for unit in rng.integers(len(members), size=len(members))])
        return drawn, holders.keys() - set(np.unique(y[drawn]).tolist())

    trial = sample_rng(seed, 0, 0, "bootstrap, tried")  # of its own, so that the draws stay what they are
    is_common = np.mean([not draw(trial)[1] for _ in range(NUM_TRIED)]) >= LEAST_WHOLE
    rng = sample_rng(seed, 0, 0, "bootstrap")
    while num:
        drawn, missing = draw(rng)
        if missing and is_common:
            continue
        num -= 1
        while missing:
            added = members[rng.choice(holders[min(missing)])]
            drawn, missing = np.concatenate([drawn, added]), missing - set(y[added].tolist())
        yield drawn


def members_of(units: Int64) -> list[Int64]:
    """Indices of the images of each unit, ascending; the units (n,) in the order of their names."""
    order = np.argsort(units, kind="stable")
    starts = np.unique(units[order], return_index=True)[1]
    return np.split(order, starts[1:])


def bootstrap_intervals(
    scores: Float64,
    y: Int64,
    groups: Int64 | None,
    num_resamples: int,
    seed: int,
    wanted: Sequence[Measure] = (macro_auroc,),
) -> Float64:
    """95% percentile intervals over test images, or patients, drawn with replacement.

    Args:
        scores: (n, K) of the test part.
        y: (n,) classes.
        groups: (n,) patients, or None.
        num_resamples: how often.
        seed: of the draws.
        wanted: M measures.

    Returns:
        (M, 2), low and high.
    """
    units = np.arange(len(y)) if groups is None else groups
    values = [
        [measure(scores[drawn], y[drawn]) for measure in wanted]
        for drawn in resamples(units, y, num_resamples, seed)
    ]
    limits: npt.NDArray[Any] = np.percentile(values, [2.5, 97.5], axis=0)
    return limits.T
