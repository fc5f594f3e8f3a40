"""Parts of labeled images: train and test, folds, a share of the labels. No patient is ever in two of them.

Shapes: n images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from frepa_dist.evaluate.scores import Bool, Int64, members_of
from shards.read.draws import sample_rng
from shards.support.errors import DataError

NUM_FOLDS = 5  # of a cross-validation
TEST_FOLDS = 4  # a split that is made holds out one of these
LEAST = 2  # images of a class, of different patients, that a cross-validation needs


class Splittable(Protocol):
    """What `split_parts` has to know of a labeled set."""

    @property
    def labels(self) -> Sequence[str]:
        """Names of the classes, of each image."""

    @property
    def splits(self) -> Sequence[str] | None:
        """Of each image "train" or "test", None when the split is not given."""


def split_parts(labeled: Splittable, y: Int64, groups: Int64 | None, seed: int, where: object) -> Bool:
    """Which images are the test part, (n,); checks that both parts can be used.

    Args:
        labeled: with the split that is given, if one is.
        y: (n,) classes.
        groups: (n,) patients, or what else may not be parted; None where images are independent.
        seed: of a split that is made.
        where: the set, for errors.

    Raises:
        DataError: a class has too few images, or a group is on both sides.
    """
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
            "the split that is given has images of one patient or volume, or of two that share an image, on "
            "both sides",
            where=where,
            fix="split by patient, or by volume",
        )
    if is_test.all() or not is_test.any():
        raise DataError(
            f"all images are in one part of the split: {int((~is_test).sum())} to learn from, "
            f"{int(is_test.sum())} to test on",
            where=where,
            fix="name parts 'train' and 'test', or leave the split to us (no such column or folders)",
        )
    train, test = (np.bincount(part, minlength=y.max() + 1) for part in (y[~is_test], y[is_test]))
    if train.min() < LEAST or test.min() < 1:
        raise _too_few(labeled, where)
    return is_test


def _too_few(labeled: Splittable, where: object) -> DataError:
    counts = {name: list(labeled.labels).count(name) for name in sorted(set(labeled.labels))}
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
    if num < LEAST:
        return []
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    folds = kind(num, shuffle=True, random_state=seed).split(y, y, groups)
    num_classes = len(set(y))
    return [(a, b) for a, b in folds if len(set(y[a])) == len(set(y[b])) == num_classes]


def cross_validation(y: Int64, groups: Int64 | None, seed: int) -> list[tuple[Int64, Int64]]:
    """Folds to choose a setting by.

    Raises:
        DataError: there are too few images of a class for two folds.
    """
    folds = stratified_folds(y, groups, NUM_FOLDS, seed)
    if not folds:
        raise DataError(
            "too few training images of a class to choose a setting by cross-validation",
            allowed="two of each class, of different patients",
        )
    return folds


def draw_share(y: Int64, groups: Int64 | None, share: float, draw: int, seed: int) -> Int64:
    """Draw a share of each class, by whole patients.

    Patients are taken in a random order as long as one of their classes lacks images; a class gets `share` of
    its images, rounded, or somewhat more as patients are not cut, and never fewer than two of two patients.

    Args:
        y: (n,) classes.
        groups: (n,) patients; None takes each image as one.
        share: of the images, in (0, 1]; 1 takes all.
        draw: number of the draw; of one number, the order of the patients is the same for every share.
        seed: of the draws.

    Returns:
        Indices, sorted.
    """
    if share >= 1:
        return np.arange(len(y))
    num_classes = int(y.max()) + 1
    wanted = np.maximum(LEAST, np.round(share * np.bincount(y, minlength=num_classes)))
    members = members_of(np.arange(len(y)) if groups is None else groups)
    images, patients = np.zeros(num_classes), np.zeros(num_classes)
    taken = []
    for unit in sample_rng(seed, 0, draw, "share of the labels").permutation(len(members)):
        counts = np.bincount(y[members[unit]], minlength=num_classes)
        if np.any((counts > 0) & ((images < wanted) | (patients < LEAST))):
            taken.append(members[unit])
            images += counts
            patients += counts > 0
    return np.sort(np.concatenate(taken))
