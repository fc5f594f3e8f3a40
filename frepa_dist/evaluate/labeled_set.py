"""Labeled pictures for the probes, from files (`evaluate.labelled`) or from the index of a dataset.

Shapes: n pictures, K classes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from frepa_dist.evaluate.labelled import SPLIT, SPLITS, LabeledImages, read_labeled
from frepa_dist.evaluate.pictures import FilePictures, Pictures, ShardPictures, is_dataset, open_shards
from frepa_dist.evaluate.scores import Bool, Int64
from shards.support.errors import ConfigError, DataError


@dataclass(frozen=True)
class LabeledSet:
    """Pictures with their classes.

    Attributes:
        pictures: n of them.
        classes: K names, sorted; grades by their number.
        y: (n,) class of each.
        groups: (n,) patients, None when they are not known.
        splits: n times "train" or "test", None when the split is not given.
        num_left_out: pictures without a label, or of classes that were not asked for.
        label_column: what the labels are called, None for a folder per class.
        where: what to name in errors.
        patients: names of the groups, (n,), as the table has them.
    """

    pictures: Pictures
    classes: list[str]
    y: Int64
    groups: Int64 | None
    splits: list[str] | None
    num_left_out: int
    label_column: str | None
    where: str
    patients: list[str] | None = None

    @property
    def labels(self) -> list[str]:
        """Name of the class of each."""
        return [self.classes[k] for k in self.y]

    def counts(self, part: Bool | None = None) -> list[int]:
        """How many pictures of each class there are, or are in a part (n,)."""
        y = self.y if part is None else self.y[part]
        return [int(count) for count in np.bincount(y, minlength=len(self.classes))]


def read_labeled_set(
    images: Path | str,
    labels: Path | None = None,
    *,
    label_column: str = "label",
    classes: Collection[str] | None = None,
    are_grades: bool = False,
    modality: str | None = None,
) -> LabeledSet:
    """Read a labeled set.

    Args:
        images: a folder of files, or a dataset of shards that was built with labels.
        labels: of files a CSV file, None for a folder per class (see `labelled.read_labeled`).
        label_column: its column of labels; of a dataset, the label.
        classes: the only classes to use, None for all.
        are_grades: class names are numbers, and sorted as such.
        modality: of files: what they are; of a dataset: the only one to use.

    Raises:
        ConfigError: a column is missing, a split has an unknown name, or a grade is no number.
        DataError: there are fewer than two classes, or something cannot be read.
    """
    if not is_dataset(images):
        folder = Path(images)
        found = read_labeled(folder, labels, label_column=label_column, classes=classes)
        names = [str(path.relative_to(folder)) for path in found.paths]
        column = None if labels is None else label_column
        where = str(labels or images)
        return _assemble(FilePictures(folder, names, modality), found, are_grades, column, where)
    if labels is not None:
        raise ConfigError(
            "a dataset has its labels in its index",
            where=labels,
            fix="leave --labels out, or build the dataset with `frepa shards build --labels`",
        )
    pictures, found = _from_shards(open_shards(images, modality), label_column, classes)
    return _assemble(pictures, found, are_grades, label_column, str(images))


def _assemble(
    pictures: Pictures, found: LabeledImages, are_grades: bool, column: str | None, where: str
) -> LabeledSet:
    try:
        classes = sorted(set(found.labels), key=float if are_grades else None)
    except ValueError as error:
        raise ConfigError(
            "grades have to be numbers", where=where, allowed=f"numbers, not {', '.join(set(found.labels))}"
        ) from error
    numbers = {name: k for k, name in enumerate(classes)}
    groups = None if found.patients is None else np.unique(found.patients, return_inverse=True)[1]
    y = np.array([numbers[label] for label in found.labels], np.int64)
    left_out, patients = found.num_left_out, found.patients
    return LabeledSet(pictures, classes, y, groups, found.splits, left_out, column, where, patients)


def _from_shards(
    pictures: ShardPictures, column: str, classes: Collection[str] | None
) -> tuple[ShardPictures, LabeledImages]:
    """The samples that have a label, and what is known of them."""
    labels = [str(info.get(column) or "") for info in pictures.info]
    kept = [i for i, name in enumerate(labels) if name and (classes is None or name in classes)]
    if len({labels[i] for i in kept}) < 2:
        columns = sorted({name for info in pictures.info for name in info})
        raise DataError(
            f"a probe needs two classes or more of '{column}', found "
            f"{', '.join(sorted({labels[i] for i in kept})) or 'none'}",
            where=pictures.where,
            allowed=f"the labels of the dataset: {', '.join(columns) or '(none)'}",
        )
    patients: list[str] | None = None
    if any(pictures.patients):
        patients = [pictures.patients[i] or f"(row {i})" for i in kept]
    chosen = ShardPictures(
        pictures.reader,
        [pictures.names[i] for i in kept],
        [pictures.places[i] for i in kept],
        [pictures.hashes[i] for i in kept],
    )
    splits = _splits([pictures.info[i].get(SPLIT) for i in kept], column, pictures.where)
    left_out = len(labels) - len(kept)
    return chosen, LabeledImages([], [labels[i] for i in kept], splits, patients, left_out)


def _splits(given: Sequence[object], column: str, where: str) -> list[str] | None:
    if column == SPLIT or not any(given):
        return None
    try:
        return [SPLITS[str(name or "").strip().lower()] for name in given]
    except KeyError as error:
        raise ConfigError(
            f"unknown split {error}", where=where, allowed=f"{', '.join(sorted(SPLITS))}, of every sample"
        ) from None


def check_alike(first: LabeledSet, second: LabeledSet) -> None:
    """See that two sets have the same classes, and no picture in common.

    Raises:
        DataError: they do not.
    """
    if first.classes != second.classes:
        raise DataError(
            f"the classes are {', '.join(second.classes)}, those learned {', '.join(first.classes)}",
            where=second.where,
            allowed="the same names of classes in both sets",
            fix="choose some with --classes, or rename them in one of the files",
        )
    digests = dict(zip(first.pictures.digests(), first.pictures.names, strict=True))
    pairs = zip(second.pictures.digests(), second.pictures.names, strict=True)
    shared = [(digests[digest], name) for digest, name in pairs if digest in digests]
    if shared:
        raise DataError(
            f"{len(shared)} pictures are in both sets, such as {shared[0][1]} ({shared[0][0]} there)",
            where=second.where,
            fix="judge on other pictures than those that are learned from",
        )
