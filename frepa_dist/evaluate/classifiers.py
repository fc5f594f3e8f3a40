"""Classifiers of frozen features: logistic regression, a linear layer trained by steps, nearest neighbors.

Each is a function of training features alone; what it has to choose is chosen by cross-validation inside
them, by whole patients where they are known.

Shapes: n images, D width, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from frepa_dist.evaluate.heads import HeadTraining, run_steps, seeded
from frepa_dist.evaluate.scores import Float64, Int64, macro_auroc
from frepa_dist.evaluate.splits import cross_validation
from shards.support.progress import Progress

Features = npt.NDArray[np.floating[Any]]
Classifier = Literal["logistic", "linear", "knn"]
Scorer = Callable[[Features], Float64]
"""Scores (n, K) of features (n, D): higher is likelier."""

C_GRID = tuple(10.0**power for power in range(-5, 3))  # inverse strength of the L2 penalty
MAX_ITERATIONS = 2000
K_GRID = (1, 2, 5, 10, 20, 50, 100, 200)  # neighbors; DINO's evaluation uses 10 to 200 and prefers 20
TEMPERATURE = 0.07  # of the neighbors' votes, as in DINO (Caron et al., arXiv 2104.14294)


class LinearTraining(HeadTraining):
    """How a linear layer is trained, by AdamW; the features are standardized, so no BatchNorm is needed.

    MAE's own linear probe uses LARS on batches of 16,384 behind a BatchNorm without scale and shift; medical
    sets have fewer images than that batch. The class probabilities are what it learns; nothing is chosen by
    validation.
    """

    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


class Fitted(NamedTuple):
    """A classifier that has learned.

    Attributes:
        scores: of features.
        chosen: what was chosen, by name.
        at_edge: whether that is the first or the last of what was tried.
        inner_auroc: mean AUROC of the cross-validation with it, None where nothing is chosen.
    """

    scores: Scorer
    chosen: dict[str, float]
    at_edge: bool = False
    inner_auroc: float | None = None


def fit_classifier(
    kind: Classifier,
    x: Features,
    y: Int64,
    groups: Int64 | None,
    seed: int,
    training: LinearTraining | None = None,
    *,
    silent: bool = False,
) -> Fitted:
    """Fit a classifier.

    Args:
        kind: which.
        x: (n, D) training features.
        y: (n,) classes 0..K-1, each of them there.
        groups: (n,) patients, or None.
        seed: of the folds, and of what is trained by steps.
        training: of `linear`.
        silent: show no progress.

    Raises:
        DataError: there are too few images of a class to choose by.
        DivergedError: `linear` left the finite numbers.
    """
    if kind == "linear":
        return Fitted(fit_linear(x, y, training or LinearTraining(seed=seed), silent=silent), {})
    if kind == "knn":
        k, auroc, at_edge = choose_k(x, y, groups, seed, silent=silent)
        return Fitted(fit_neighbors(x, y, k), {"k": k}, at_edge, auroc)
    c, auroc = choose_c(x, y, groups, seed, silent=silent)
    return Fitted(fit(x, y, c).scores, {"C": c}, c in (C_GRID[0], C_GRID[-1]), auroc)


class LinearProbe:
    """A fitted standardization and logistic regression."""

    def __init__(self, scaler: Any, regression: Any) -> None:
        self._scaler, self._regression = scaler, regression

    def scores(self, x: Features) -> Float64:
        """Scores (n, K) of features (n, D), higher is likelier; only the order in a column counts."""
        standardized = self._scaler.transform(x)
        if len(self._regression.classes_) > 2:
            return np.asarray(self._regression.predict_proba(standardized), np.float64)
        # probabilities would run into ties at 0 and 1
        decision = np.asarray(self._regression.decision_function(standardized), np.float64)
        return np.stack([-decision, decision], axis=1)


def fit(x: Features, y: Int64, c: float) -> LinearProbe:
    """Fit logistic regression on standardized features (n, D) and classes (n,) 0..K-1."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(np.asarray(x, np.float64))
    with warnings.catch_warnings():
        # the weakest penalties converge slowly; cross-validation judges what came out
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression = LogisticRegression(C=c, max_iter=MAX_ITERATIONS).fit(scaler.transform(x), y)
    return LinearProbe(scaler, regression)


def choose_c(
    x: Features, y: Int64, groups: Int64 | None, seed: int, *, silent: bool = False
) -> tuple[float, float]:
    """Choose the inverse penalty of the highest mean AUROC over folds; the stronger penalty of equals.

    Args:
        x: (n, D) training features.
        y: (n,) classes.
        groups: (n,) patients, or None.
        seed: of the folds.
        silent: show no progress.

    Returns:
        The inverse penalty and its mean AUROC.

    Raises:
        DataError: there are too few images of a class for two folds.
    """
    folds = cross_validation(y, groups, seed)
    means = []
    with Progress(len(C_GRID), "choose C", unit="value", silent=silent) as progress:
        for c in C_GRID:
            found = [macro_auroc(fit(x[a], y[a], c).scores(x[b]), y[b]) for a, b in folds]
            means.append(float(np.mean(found)))
            progress.update()
    best = int(np.argmax(means))
    return C_GRID[best], means[best]


def fit_neighbors(x: Features, y: Int64, k: int) -> Scorer:
    """Votes of the k nearest training images by the cosine, each of weight exp(cosine / temperature).

    Features are used as they are, as DINO does. Scores are shares of the votes.
    """
    from sklearn.neighbors import KNeighborsClassifier

    def weigh(distances: Float64) -> Float64:
        # a factor that is common to an image's votes cancels: without it they would overflow or vanish
        nearest = distances.min(axis=1, keepdims=True)
        return np.asarray(np.exp((nearest - distances) / TEMPERATURE), np.float64)

    found = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weigh)
    found.fit(np.asarray(x, np.float64), y)
    return lambda asked: np.asarray(found.predict_proba(np.asarray(asked, np.float64)), np.float64)


def allowed_k(num: int) -> tuple[int, ...]:
    """Numbers of neighbors to try with so many training images: at most half of them vote."""
    return tuple(k for k in K_GRID if k <= max(1, num // 2))


def choose_k(
    x: Features, y: Int64, groups: Int64 | None, seed: int, *, silent: bool = False
) -> tuple[int, float, bool]:
    """Choose the number of neighbors of the highest mean AUROC over folds; the smaller of equals.

    Returns:
        The number, its mean AUROC, and whether it is the first or the last that the smallest fold allows;
        arguments and errors as of `choose_c`.
    """
    folds = cross_validation(y, groups, seed)
    grid = allowed_k(min(len(a) for a, _ in folds))
    means = []
    with Progress(len(grid), "choose k", unit="value", silent=silent) as progress:
        for k in grid:
            found = [macro_auroc(fit_neighbors(x[a], y[a], k)(x[b]), y[b]) for a, b in folds]
            means.append(float(np.mean(found)))
            progress.update()
    best = int(np.argmax(means))
    return grid[best], means[best], best in (0, len(grid) - 1)


def fit_linear(x: Features, y: Int64, training: LinearTraining, *, silent: bool = False) -> Scorer:
    """Train a linear layer on standardized features (n, D) and classes (n,) by cross-entropy.

    Raises:
        DivergedError: the loss is no number.
    """
    mean, spread = np.mean(x, axis=0, dtype=np.float64), np.std(x, axis=0, dtype=np.float64)
    scale = 1 / np.where(spread > 0, spread, 1.0)

    def standardize(values: Features) -> Tensor:
        return torch.from_numpy(((values - mean) * scale).astype(np.float32))

    inputs, targets = standardize(x), torch.from_numpy(y)
    device = torch.device("cpu")  # a step is too small for anything else
    with seeded(training.seed, device):
        layer = nn.Linear(x.shape[1], int(y.max()) + 1)
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)

        def loss_of(chosen: Int64, _: np.random.Generator) -> Tensor:
            rows = torch.from_numpy(chosen)
            return functional.cross_entropy(layer(inputs[rows]), targets[rows])

        run_steps([layer], loss_of, np.arange(len(y)), training, "linear head", silent=silent)

    @torch.no_grad()
    def scores(values: Features) -> Float64:
        # of a logit alone, the others are not known; logarithms of shares have no ties at 0 and 1
        return np.asarray(layer(standardize(values)).double().log_softmax(dim=1).numpy(), np.float64)

    return scores
