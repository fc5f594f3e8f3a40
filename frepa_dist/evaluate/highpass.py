"""What a classifier of whole images still knows when the images lose their low frequencies (Frepa, fig. 1).

A linear probe learns from the features of raw images. The test images are then high-passed more and more, by
1 - exp(-rho^2 / (2 d0^2)), and classified by the same probe: an encoder that stands on tone falls to chance
at once, one that stands on detail does not. Nothing is learned from filtered images.

Normalized images are filtered, so that what loses its mean is left at the mean that the encoder was trained
around.

Shapes: n images, K classes, D width, F filters.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
from frepa_dist.evaluate.labelled import read_labeled
from frepa_dist.evaluate.leakage import NOT_CHECKED, check_leakage
from frepa_dist.evaluate.scores import accuracy, bootstrap_intervals, macro_auroc
from frepa_dist.evaluate.splits import split_parts
from frepa_dist.evaluate.views import read_pixels
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
        resampled: what the bootstrap draws, "images" or "patients".
        seed: of the split, the folds and the bootstrap.
        y, groups: class and number of the patient (None: not known) of each test image.
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
    resampled: str
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
    images: Path,
    labels: Path | None = None,
    *,
    label_column: str = "label",
    classes: Collection[str] | None = None,
    cutoffs: Sequence[float] = CUTOFFS,
    seed: int = 0,
    num_resamples: int = 1000,
    device: str | None = None,
    allow_leakage: bool = False,
    states: Sequence[Path] = (),
) -> HighPassResult:
    """Probe an encoder, and test the probe on images that are high-passed more and more.

    Args:
        encoder: see `features.SOURCES`.
        images: folder of the images.
        labels: CSV file, None for a folder per class (see `labelled.read_labeled`).
        label_column: its column of labels.
        classes: the only classes to use, None for all.
        cutoffs: d0 in cycles per image side (bins of the spectrum, at any size); 0 is the raw image.
        seed: of the split, where none is given, of the folds and of the bootstrap.
        num_resamples: of the bootstrap.
        device: where the encoder runs, None takes a GPU if there is one.
        allow_leakage: go on where test images were in the run's pretraining data; the result says so.
        states: private folders of the builds of those data, see `leakage.check_leakage`.

    Raises:
        FrepaError: what is wrong with encoder, images or labels.
    """
    labeled = read_labeled(images, labels, label_column=label_column, classes=classes)
    names = sorted(set(labeled.labels))
    y = np.array([names.index(label) for label in labeled.labels], np.int64)
    groups = None if labeled.patients is None else np.unique(labeled.patients, return_inverse=True)[1]
    is_test = split_parts(labeled, y, groups, seed, where=labels or images)
    leakage = check_leakage(
        encoder,
        labeled.paths,
        images=images,
        allow=allow_leakage,
        states=states,
        patients=labeled.patients,
        tested=is_test.tolist(),
    )
    to_learn, to_test = (
        [path for path, is_there in zip(labeled.paths, part, strict=True) if is_there]
        for part in (~is_test, is_test)
    )
    loaded = load_encoder(encoder, device)
    (x,) = embed_filtered(loaded, to_learn, (0.0,))
    train_groups, test_groups = (None, None) if groups is None else (groups[~is_test], groups[is_test])
    c, _ = choose_c(x, y[~is_test], train_groups, seed)
    probe = fit(x, y[~is_test], c)
    scores = [probe.scores(rows) for rows in embed_filtered(loaded, to_test, cutoffs)]
    limits = np.array(
        [
            bootstrap_intervals(s, y[is_test], test_groups, num_resamples, seed, (accuracy, macro_auroc))
            for s in scores
        ]
    )  # (F, 2 measures, 2 ends)
    return HighPassResult(
        encoder=loaded.name,
        images=str(images),
        label_column=None if labels is None else label_column,
        classes=names,
        num_train=len(to_learn),
        names=[path.name for path in to_test],
        cutoffs=list(cutoffs),
        accuracy=[accuracy(s, y[is_test]) for s in scores],
        accuracy_low=limits[:, 0, 0].tolist(),
        accuracy_high=limits[:, 0, 1].tolist(),
        auroc=[macro_auroc(s, y[is_test]) for s in scores],
        auroc_low=limits[:, 1, 0].tolist(),
        auroc_high=limits[:, 1, 1].tolist(),
        correct=[(s.argmax(axis=1) == y[is_test]).tolist() for s in scores],
        chance=float(np.mean(y[is_test] == np.bincount(y[~is_test]).argmax())),
        resampled="images" if groups is None else "patients",
        seed=seed,
        y=y[is_test].tolist(),
        groups=None if test_groups is None else np.unique(test_groups, return_inverse=True)[1].tolist(),
        scores=[s.tolist() for s in scores],
        leakage=leakage,
    )


def embed_filtered(
    encoder: Encoder, paths: Sequence[Path], cutoffs: Sequence[float]
) -> list[npt.NDArray[np.float32]]:
    """Features (n, D) of image files, for each filter.

    Raises:
        DataError: a file cannot be read, or a feature is not finite.
    """
    found: list[list[npt.NDArray[np.float32]]] = [[] for _ in cutoffs]
    with Progress(len(paths), "features") as progress:
        for start in range(0, len(paths), BATCH_SIZE):
            pixels = [read_pixels(path, encoder.image_size) for path in paths[start : start + BATCH_SIZE]]
            images = encoder.normalize(torch.from_numpy(np.stack(pixels)))
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
