"""Linear probe: logistic regression on frozen features, judged by the area under the ROC curve (AUROC).

Features are standardized by the training part; the strength of the penalty is chosen by cross-validation
inside the training part; the test part is used once. Where patients are known, no patient is on two sides of
any split, and the bootstrap draws patients, since two eyes of one are no two independent images.

Shapes: n images, D width, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from frepa_dist.evaluate.features import extract_features, load_encoder
from frepa_dist.evaluate.labelled import LabeledImages, read_labeled
from frepa_dist.evaluate.leakage import NOT_CHECKED, check_leakage
from frepa_dist.evaluate.scores import Bool, Float64, Int64, bootstrap_intervals, macro_auroc
from shards.support.errors import DataError
from shards.support.progress import track
from shards.support.settings import Settings

C_GRID = tuple(10.0**power for power in range(-5, 3))  # inverse strength of the L2 penalty
NUM_FOLDS = 5  # of the cross-validation
TEST_FOLDS = 4  # a split that is made holds out one of these
MAX_ITERATIONS = 2000


class ProbeResult(Settings):
    """What a probe found, and how.

    Attributes:
        encoder: what was probed.
        images: where the images lie.
        label_column: the column of labels, None for a folder per class.
        classes: names, sorted; of two, the AUROC is that of the second.
        num_train, num_test: images of each class.
        num_left_out: rows without a label, or of other classes.
        split: "given", or "made" with `seed`.
        resampled: what the bootstrap draws, "images" or "patients".
        c: the inverse penalty that was chosen; `c_at_edge` says that it is the least or largest tried.
        inner_auroc: mean AUROC of the cross-validation with it.
        auroc: on the test part; of several classes, the mean of one against the rest.
        low, high: 95% bootstrap interval (percentiles).
        num_resamples: of the bootstrap.
        seed: of the split, the folds and the bootstrap.
        smoke_test: the labels mean nothing medical; only that the probe ran is to be seen.
        leakage: whether images were in the pretraining data, in words.
    """

    encoder: str
    images: str
    label_column: str | None
    classes: list[str]
    num_train: list[int]
    num_test: list[int]
    num_left_out: int
    split: str
    resampled: str
    c: float
    c_at_edge: bool
    inner_auroc: float
    auroc: float
    low: float
    high: float
    num_resamples: int
    seed: int
    smoke_test: bool
    leakage: str = NOT_CHECKED

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")

    def describe(self) -> str:
        """A few lines for the terminal."""
        classes = ", ".join(
            f"{name} {train} + {test}"
            for name, train, test in zip(self.classes, self.num_train, self.num_test, strict=True)
        )
        kind = "AUROC" if len(self.classes) == 2 else "AUROC (mean of one against the rest)"
        smoke = "\na smoke test: these labels compare no methods" if self.smoke_test else ""
        return (
            f"{kind} {self.auroc:.3f}  95% interval [{self.low:.3f}, {self.high:.3f}]  C = {self.c:g}\n"
            f"classes (train + test): {classes}; split {self.split}; {self.num_left_out} left out{smoke}\n"
            f"leakage: {self.leakage}"
        )


def run_probe(
    encoder: str,
    images: Path,
    labels: Path | None = None,
    *,
    label_column: str = "label",
    classes: Collection[str] | None = None,
    seed: int = 0,
    num_resamples: int = 1000,
    batch_size: int = 64,
    device: str | None = None,
    smoke_test: bool = False,
    allow_leakage: bool = False,
    states: Sequence[Path] = (),
) -> ProbeResult:
    """Probe an encoder on labeled images.

    Args:
        encoder: see `features.SOURCES`.
        images: folder of the images.
        labels: CSV file, None for a folder per class (see `labelled.read_labeled`).
        label_column: its column of labels.
        classes: the only classes to use, None for all.
        seed: of the split, where none is given, of the folds and of the bootstrap.
        num_resamples: of the bootstrap.
        batch_size: images at a time.
        device: where the encoder runs, None takes a GPU if there is one.
        smoke_test: say with the result that its labels are not medical.
        allow_leakage: go on where images were in the run's pretraining data; the result says so.
        states: private folders of the builds of those data, see `leakage.check_leakage`.

    Raises:
        FrepaError: what is wrong with encoder, images or labels.
    """
    labeled = read_labeled(images, labels, label_column=label_column, classes=classes)
    names = sorted(set(labeled.labels))
    y = np.array([names.index(label) for label in labeled.labels], np.int64)
    groups = None if labeled.patients is None else np.unique(labeled.patients, return_inverse=True)[1]
    is_test = _split(labeled, y, groups, seed, where=labels or images)
    leakage = check_leakage(
        encoder,
        labeled.paths,
        images=images,
        allow=allow_leakage,
        states=states,
        patients=labeled.patients,
        tested=is_test.tolist(),
    )
    loaded = load_encoder(encoder, device)
    x = extract_features(loaded, labeled.paths, batch_size=batch_size)
    c, inner = choose_c(x[~is_test], y[~is_test], None if groups is None else groups[~is_test], seed)
    scores = fit(x[~is_test], y[~is_test], c).scores(x[is_test])
    test_groups = None if groups is None else groups[is_test]
    ((low, high),) = bootstrap_intervals(scores, y[is_test], test_groups, num_resamples, seed)
    return ProbeResult(
        encoder=loaded.name,
        images=str(images),
        label_column=None if labels is None else label_column,
        classes=names,
        num_train=np.bincount(y[~is_test], minlength=len(names)).tolist(),
        num_test=np.bincount(y[is_test], minlength=len(names)).tolist(),
        num_left_out=labeled.num_left_out,
        split="made" if labeled.splits is None else "given",
        resampled="images" if groups is None else "patients",
        c=c,
        c_at_edge=c in (C_GRID[0], C_GRID[-1]),
        inner_auroc=inner,
        auroc=macro_auroc(scores, y[is_test]),
        low=low,
        high=high,
        num_resamples=num_resamples,
        seed=seed,
        smoke_test=smoke_test,
        leakage=leakage,
    )


def _split(labeled: LabeledImages, y: Int64, groups: Int64 | None, seed: int, where: object) -> Bool:
    """Which images are the test part, (n,); checks that both parts can be used."""
    if labeled.splits is not None:
        is_test = np.array([split == "test" for split in labeled.splits])
    else:
        folds = stratified_folds(y, groups, TEST_FOLDS, seed)
        if not folds:
            raise _too_few(labeled, where)
        is_test = np.zeros(len(y), bool)
        is_test[folds[0][1]] = True
    if groups is not None and set(groups[is_test]) & set(groups[~is_test]):
        raise DataError(
            "the split that is given has images of one patient on both sides",
            where=where,
            fix="split by patient",
        )
    train, test = (np.bincount(part, minlength=y.max() + 1) for part in (y[~is_test], y[is_test]))
    if train.min() < 2 or test.min() < 1:
        raise _too_few(labeled, where)
    return is_test


def _too_few(labeled: LabeledImages, where: object) -> DataError:
    counts = {name: labeled.labels.count(name) for name in sorted(set(labeled.labels))}
    return DataError(
        f"too few images of a class: {', '.join(f'{name} {count}' for name, count in counts.items())}",
        where=where,
        allowed="two training images and one test image of each class, of different patients",
        fix="add images, or leave the class out",
    )


def stratified_folds(y: Int64, groups: Int64 | None, most: int, seed: int) -> list[tuple[Int64, Int64]]:
    """Stratified folds (indices of the training part, of the other), every class on both sides of each.

    There are as many folds as the rarest class has images (patients), at most `most`; none below 2.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    rarest = min(
        len(np.unique(np.arange(len(y))[y == k] if groups is None else groups[y == k])) for k in set(y)
    )
    num = min(most, rarest)
    if num < 2:
        return []
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    folds = kind(num, shuffle=True, random_state=seed).split(y, y, groups)
    num_classes = len(set(y))
    return [(a, b) for a, b in folds if len(set(y[a])) == len(set(y[b])) == num_classes]


class LinearProbe:
    """A fitted standardization and logistic regression."""

    def __init__(self, scaler: Any, regression: Any) -> None:
        self._scaler, self._regression = scaler, regression

    def scores(self, x: npt.NDArray[np.floating[Any]]) -> Float64:
        """Scores (n, K) of features (n, D), higher is likelier; only the order in a column counts."""
        standardized = self._scaler.transform(x)
        if len(self._regression.classes_) > 2:
            return np.asarray(self._regression.predict_proba(standardized), np.float64)
        # probabilities would run into ties at 0 and 1
        decision = np.asarray(self._regression.decision_function(standardized), np.float64)
        return np.stack([-decision, decision], axis=1)


def fit(x: npt.NDArray[np.floating[Any]], y: Int64, c: float) -> LinearProbe:
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
    x: npt.NDArray[np.floating[Any]], y: Int64, groups: Int64 | None, seed: int
) -> tuple[float, float]:
    """Choose the inverse penalty of the highest mean AUROC over folds; the stronger penalty of equals.

    Args:
        x: (n, D) training features.
        y: (n,) classes.
        groups: (n,) patients, or None.
        seed: of the folds.

    Returns:
        The inverse penalty and its mean AUROC.

    Raises:
        DataError: there are too few images of a class for two folds.
    """
    folds = stratified_folds(y, groups, NUM_FOLDS, seed)
    if not folds:
        raise DataError(
            "too few training images of a class to choose the penalty by cross-validation",
            allowed="two of each class, of different patients",
        )
    means = [
        float(np.mean([macro_auroc(fit(x[a], y[a], c).scores(x[b]), y[b]) for a, b in folds]))
        for c in track(C_GRID, total=len(C_GRID), description="choose C", unit="value")
    ]
    best = int(np.argmax(means))
    return C_GRID[best], means[best]
