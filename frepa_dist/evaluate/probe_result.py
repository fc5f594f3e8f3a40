"""What a probe found: every measure with its interval, and the score of each test image for paired tests."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from frepa_dist.evaluate.grouping import Units
from frepa_dist.evaluate.labeled_set import LabeledSet
from frepa_dist.evaluate.leakage import NOT_CHECKED
from frepa_dist.evaluate.scores import Bool, Float64, Int64, bootstrap_intervals, measures
from shards.support.settings import Settings

SHOWN = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "kappa": "quadratic kappa",
}


class Estimate(Settings):
    """A measure on the test part, with its 95% bootstrap interval (percentiles)."""

    value: float
    low: float
    high: float

    def describe(self) -> str:
        """As text."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class ImageScores(Settings):
    """Of each test image, in one order.

    Attributes:
        names: files relative to the folder, or keys of samples.
        y: number of the class.
        groups: number of what is drawn at once (`ProbeResult.resampled`), None where each image is; no name
            of a patient is kept.
        scores: one for each class, higher is likelier.
    """

    names: list[str]
    y: list[int]
    groups: list[int] | None
    scores: list[list[float]]

    def arrays(self) -> tuple[Float64, Int64, Int64 | None]:
        """Scores (n, K), classes (n,) and patients (n,) or None."""
        groups = None if self.groups is None else np.array(self.groups, np.int64)
        return np.array(self.scores, np.float64), np.array(self.y, np.int64), groups


class Transfer(Settings):
    """The set that a probe was judged on, where that is another than it learned from."""

    images: str
    label_column: str | None


class ProbeResult(Settings):
    """What a probe found, and how.

    Attributes:
        encoder: what was probed.
        images: where the images lie.
        label_column: the column of labels, None for a folder per class.
        classes: names, sorted; of two, AUROC and AUPRC are those of the second.
        are_grades: the classes are grades, in their order.
        num_train, num_test: images of each class.
        num_left_out: rows without a label, or of other classes.
        split: "given", "made" with `seed`, or "transfer": all of another set is the test part.
        transfer: that set.
        head: what stands on the encoder.
        chosen: what the head chose by cross-validation; `at_edge`: that is the first or last it tried.
        inner_auroc: mean AUROC of the cross-validation with it, None where nothing was chosen.
        training: settings of a head that is trained by steps.
        num_parameters: that the head, and an encoder which is trained too, learned; None: see `head`.
        resampled: what the bootstrap draws.
        measures: on the test part, all from the same resamples; of several classes, AUROC and AUPRC are the
            mean of one against the rest.
        num_resamples: of the bootstrap.
        seed: of the split, the folds and the bootstrap.
        smoke_test: the labels mean nothing medical; only that the probe ran is to be seen.
        test: the scores of each test image.
        leakage: whether test images were in the pretraining data, in words.
    """

    encoder: str
    images: str
    label_column: str | None
    classes: list[str]
    are_grades: bool = False
    num_train: list[int]
    num_test: list[int]
    num_left_out: int
    split: Literal["given", "made", "transfer"]
    transfer: Transfer | None = None
    head: str
    chosen: dict[str, float]
    at_edge: bool
    inner_auroc: float | None
    training: dict[str, Any] | None = None
    num_parameters: int | None = None
    resampled: Units
    measures: dict[str, Estimate]
    num_resamples: int
    seed: int
    smoke_test: bool
    test: ImageScores
    leakage: str = NOT_CHECKED

    @property
    def auroc(self) -> Estimate:
        """The AUROC."""
        return self.measures["auroc"]

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")

    def describe(self) -> str:
        """A few lines for the terminal."""
        classes = ", ".join(
            f"{name} {train} + {test}"
            for name, train, test in zip(self.classes, self.num_train, self.num_test, strict=True)
        )
        mean = "" if len(self.classes) == 2 else "; AUROC and AUPRC: mean of one against the rest"
        judged = f"transfer to {self.transfer.images}" if self.transfer else f"split {self.split}"
        head = f"{self.head} head {self.describe_choice()}".strip()
        lines = [f"{head}; 95% intervals over {self.resampled}{mean}"]
        lines += [f"{SHOWN[name]:18} {found.describe()}" for name, found in self.measures.items()]
        lines.append(f"classes (train + test): {classes}; {judged}; {self.num_left_out} left out")
        lines.append(f"leakage: {self.leakage}")
        if self.smoke_test:
            lines.append("a smoke test: these labels compare no methods")
        return "\n".join(lines)

    def describe_choice(self) -> str:
        """What the head chose, empty where it chose nothing."""
        edge = " (edge of what was tried)" if self.at_edge else ""
        return ", ".join(f"{name} = {value:g}" for name, value in self.chosen.items()) + edge


def estimate(
    scores: Float64,
    y: Int64,
    groups: Int64 | None,
    *,
    are_grades: bool = False,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Every measure of scores (n, K) of classes (n,), with intervals from the same resamples.

    Args:
        scores: of the test part.
        y: classes.
        groups: (n,) patients, or None.
        are_grades: the classes are grades, in their order.
        num_resamples: of the bootstrap.
        seed: of its draws.
    """
    wanted = measures(scores.shape[1], are_grades=are_grades)
    limits = bootstrap_intervals(scores, y, groups, num_resamples, seed, list(wanted.values()))
    return {
        name: Estimate(value=measure(scores, y), low=float(low), high=float(high))
        for (name, measure), (low, high) in zip(wanted.items(), limits, strict=True)
    }


def image_scores(data: LabeledSet, is_test: Bool, scores: Float64) -> ImageScores:
    """Scores (n, K) of the test part of a set, with what paired tests need."""
    places = np.flatnonzero(is_test)
    groups = None
    if data.groups is not None:
        groups = [int(number) for number in np.unique(data.groups[is_test], return_inverse=True)[1]]
    return ImageScores(
        names=[data.pictures.names[place] for place in places],
        y=data.y[is_test].tolist(),
        groups=groups,
        scores=scores.tolist(),
    )
