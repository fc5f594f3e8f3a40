"""Which settings mattered: how much worse a random forest predicts the metric without each key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.sweep.distributions import Distribution

LEAST_TRIALS = 8
TREES, REPEATS = 100, 20


@dataclass(frozen=True)
class Importance:
    """What was found.

    Attributes:
        num_trials: that the forest was fitted to.
        fit: its R^2 on trials that each tree had not seen; about 0 or below: the numbers mean nothing.
        keys: by key the loss of R^2 when its values are shuffled among trials: mean and standard deviation
            over repetitions; the largest first.
    """

    num_trials: int
    fit: float
    keys: dict[str, tuple[float, float]]

    def describe(self) -> str:
        """What was computed, in words."""
        worth = (
            ""
            if self.fit > 0.2
            else " It hardly predicts: read nothing into these numbers, or run more trials."
        )
        return (
            f"Permutation importance in a random forest of {TREES} trees that predicts the last value of "
            f"{self.num_trials} trials from their settings: by how much its R^2 on the same trials falls "
            f"when the values of one key are shuffled, mean and standard deviation over {REPEATS} shuffles. "
            f"Out of bag the forest has an R^2 of {self.fit:.2f}.{worth} Trials that were stopped early "
            "count with the value they had."
        )


def encode(space: Mapping[str, Distribution], points: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float64]:
    """Settings as numbers (n, keys): logarithms where draws are logarithmic, places in the list for names."""
    columns = []
    for key, distribution in space.items():
        values = [point[key] for point in points]
        if distribution.loguniform is not None:
            columns.append([math.log(value) for value in values])
        elif all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            columns.append([float(value) for value in values])
        else:
            places = [repr(value) for value in distribution.values]
            columns.append([float(places.index(repr(value))) for value in values])
    return np.array(columns, np.float64).T.reshape(len(points), len(space))


def find_importance(
    space: Mapping[str, Distribution],
    points: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    seed: int = 0,
) -> Importance | None:
    """Fit and shuffle; None where there are too few trials, or nothing varies.

    Args:
        space: the keys.
        points: settings of n trials.
        values: their metric.
        seed: of the forest and the shuffles.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    x, y = encode(space, points), np.asarray(values, np.float64)
    if len(y) < LEAST_TRIALS or not np.ptp(y):
        return None
    forest = RandomForestRegressor(TREES, oob_score=True, random_state=seed).fit(x, y)
    found = permutation_importance(forest, x, y, n_repeats=REPEATS, random_state=seed, scoring="r2")
    order = np.argsort(-found.importances_mean, kind="stable")
    keys = list(space)
    return Importance(
        len(y),
        float(forest.oob_score_),
        {keys[i]: (float(found.importances_mean[i]), float(found.importances_std[i])) for i in order},
    )
