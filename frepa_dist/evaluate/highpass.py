"""What a classifier of whole images still knows when the images lose their low frequencies (Frepa, fig. 1).

A linear probe learns from the features of raw images. The test images are then high-passed more and more, by
1 - exp(-rho^2 / (2 d0^2)), and classified by the same probe: an encoder that stands on tone falls to chance
at once, one that stands on detail does not. Nothing is learned from filtered images.

Normalized images are filtered, so that what loses its mean is left at the mean that the encoder was trained
around.

Shapes: n images, K classes, D width, F filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from frepa_dist.evaluate.classifiers import choose_c, fit
from frepa_dist.evaluate.encoder import Encoder
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.grouping import Units
from frepa_dist.evaluate.leakage import NOT_CHECKED
from frepa_dist.evaluate.pictures import Pictures
from frepa_dist.evaluate.probe import find_leaks
from frepa_dist.evaluate.scores import accuracy, bootstrap_intervals, macro_auroc
from frepa_dist.evaluate.task import ProbeTask, read_parts
from frepa_dist.spectrum import gaussian_high_pass
from shards.support.errors import DataError
from shards.support.progress import Progress
from shards.support.settings import Settings

CUTOFFS = (0.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0)
BATCH_SIZE = 32


class HighPassResult(Settings):
    """How good a probe of raw images is on filtered ones.

    Attributes:
        encoder: what was probed.
        images: where the images lie.
        label_column: the column of labels, None for a folder per class.
        classes: names, sorted.
        num_train: training images.
        names: of the test images.
        cutoffs: d0 of each filter in cycles per image side; 0 is the raw image.
        accuracy, auroc: at each cut-off, with their 95% bootstrap intervals (percentiles).
        correct: at each cut-off whether each test image was classified right, in the order of `names`.
        chance: accuracy of always naming the class that most training images have.
        resampled: what the bootstrap draws.
        seed: of the split, the folds and the bootstrap.
        y, groups: class of each test image, and number of what is drawn at once (None: of images).
        scores: (F, n, K), at each cut-off those of each test image.
        leakage: whether test images were in the pretraining data, in words.
    """

    encoder: str
    images: str
    label_column: str | None
    classes: list[str]
    num_train: int
    names: list[str]
    cutoffs: list[float]
    accuracy: list[float]
    accuracy_low: list[float]
    accuracy_high: list[float]
    auroc: list[float]
    auroc_low: list[float]
    auroc_high: list[float]
    correct: list[list[bool]]
    chance: float
    resampled: Units
    seed: int = Field(ge=0)
    y: list[int] = Field(default_factory=list)
    groups: list[int] | None = None
    scores: list[list[list[float]]] = Field(default_factory=list)
    leakage: str = NOT_CHECKED

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")

    def describe(self) -> str:
        """A table for the terminal."""
        lines = [
            f"{', '.join(self.classes)}; {self.num_train} images to learn from, {len(self.names)} to test "
            f"on, by chance {self.chance:.3f} right; 95% intervals over {self.resampled}",
            f"{'high-pass at':>14} {'accuracy':>26} {'AUROC':>26}",
        ]
        for place, cutoff in enumerate(self.cutoffs):
            name = f"{cutoff:g} cycles" if cutoff else "raw"
            shares = " ".join(
                f"{values[place]:.3f} [{low[place]:.3f}, {high[place]:.3f}]".rjust(26)
                for values, low, high in (
                    (self.accuracy, self.accuracy_low, self.accuracy_high),
                    (self.auroc, self.auroc_low, self.auroc_high),
                )
            )
            lines.append(f"{name:>14} {shares}")
        lines.append(f"leakage: {self.leakage}")
        return "\n".join(lines)


def run_highpass(
    encoder: str,
    task: ProbeTask,
    *,
    cutoffs: Sequence[float] = CUTOFFS,
    device: str | None = None,
    allow_leakage: bool = False,
    states: Sequence[Path] = (),
) -> HighPassResult:
    """Probe an encoder, and test the probe on images that are high-passed more and more.

    Args:
        encoder: see `features.SOURCES`.
        task: what is to be told.
        cutoffs: d0 in cycles per image side (bins of the spectrum, at any size); 0 is the raw image.
        device: where the encoder runs, None takes a GPU if there is one.
        allow_leakage: go on where test images were in the run's pretraining data; the result says so.
        states: private folders of the builds of those data, see `leakage.check_leakage`.

    Raises:
        FrepaError: what is wrong with encoder, images or labels.
    """
    parts = read_parts(task)
    leakage = find_leaks(encoder, parts, allow_leakage, states)
    test_y, test_groups = parts.test_y, parts.test_groups
    to_learn, to_test = np.flatnonzero(parts.is_train).tolist(), np.flatnonzero(parts.is_test).tolist()
    loaded = load_encoder(encoder, device)
    (x,) = embed_filtered(loaded, parts.train.pictures, to_learn, (0.0,))
    c, _ = choose_c(x, parts.y, parts.groups, task.seed)
    probe = fit(x, parts.y, c)
    scores = [probe.scores(rows) for rows in embed_filtered(loaded, parts.test.pictures, to_test, cutoffs)]
    limits = np.array(
        [
            bootstrap_intervals(
                s, test_y, test_groups, task.num_resamples, task.seed, (accuracy, macro_auroc)
            )
            for s in scores
        ]
    )  # (F, 2 measures, 2 ends)
    return HighPassResult(
        encoder=loaded.name,
        images=task.transfer or task.images,
        label_column=parts.train.label_column,
        classes=parts.train.classes,
        num_train=len(to_learn),
        names=[Path(parts.test.pictures.names[number]).name for number in to_test],
        cutoffs=list(cutoffs),
        accuracy=[accuracy(s, test_y) for s in scores],
        accuracy_low=limits[:, 0, 0].tolist(),
        accuracy_high=limits[:, 0, 1].tolist(),
        auroc=[macro_auroc(s, test_y) for s in scores],
        auroc_low=limits[:, 1, 0].tolist(),
        auroc_high=limits[:, 1, 1].tolist(),
        correct=[(s.argmax(axis=1) == test_y).tolist() for s in scores],
        chance=float(np.mean(test_y == np.bincount(parts.y).argmax())),
        resampled=parts.test.units,
        seed=task.seed,
        y=test_y.tolist(),
        groups=None if test_groups is None else np.unique(test_groups, return_inverse=True)[1].tolist(),
        scores=[s.tolist() for s in scores],
        leakage=leakage,
    )


def embed_filtered(
    encoder: Encoder, pictures: Pictures, chosen: Sequence[int], cutoffs: Sequence[float]
) -> list[npt.NDArray[np.float32]]:
    """Features (n, D) of the chosen pictures, for each filter.

    Raises:
        DataError: a picture cannot be read, or a feature is not finite.
    """
    found: list[list[npt.NDArray[np.float32]]] = [[] for _ in cutoffs]
    with Progress(len(chosen), "features") as progress:
        for start in range(0, len(chosen), BATCH_SIZE):
            pixels = pictures.pixels(chosen[start : start + BATCH_SIZE], encoder.image_size)
            images = encoder.normalize(torch.from_numpy(pixels))
            for cutoff, rows in zip(cutoffs, found, strict=True):
                rows.append(encoder.embed(high_pass(images, cutoff)).cpu().numpy())
            progress.update(len(pixels))
    features = [np.concatenate(rows) for rows in found]
    if not all(np.isfinite(rows).all() for rows in features):
        raise DataError(
            "the features hold NaN or infinity", where=encoder.name, fix="use an earlier checkpoint"
        )
    return features


def high_pass(images: Tensor, cutoff: float) -> Tensor:
    """The images (B, 3, S, S) themselves at a cut-off of 0, else `spectrum.gaussian_high_pass` of them."""
    return gaussian_high_pass(images, cutoff) if cutoff > 0 else images
