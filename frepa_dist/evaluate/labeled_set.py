"""Labeled pictures for the probes, from files (`evaluate.labelled`) or from the index of a dataset.

Shapes: n pictures, K classes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np

from frepa_dist.evaluate.grouping import Groups, Units, group_files, group_samples
from frepa_dist.evaluate.labelled import SPLIT, SPLITS, LabeledImages, read_labeled
from frepa_dist.evaluate.pictures import FilePictures, Pictures, ShardPictures, is_dataset, open_shards
from frepa_dist.evaluate.scores import Bool, Int64
from shards.audit.stored import file_name
from shards.support.errors import ConfigError, DataError


@dataclass(frozen=True)
class LabeledSet:
    """Pictures with their classes.

    Attributes:
        pictures: n of them.
        classes: K names, sorted; grades by their number.
        y: (n,) class of each.
        groups: (n,) those of one group show one patient or volume, or are equal: no split may part them. None
            where each picture is one of its own.
        splits: n times "train" or "test", None when the split is not given.
        num_left_out: pictures without a label, or of classes that were not asked for.
        label_column: what the labels are called, None for a folder per class.
        where: what to name in errors.
        patients: (n,) as the table of files has them.
        units: what the groups are.
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
    units: Units = "images"

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
        names = [file_name(path, folder) for path in found.paths]
        column = None if labels is None else label_column
        where = str(labels or images)
        pictures = FilePictures(folder, names, modality)
        groups = group_files(found.patients, pictures.digests())
        return _assemble(pictures, found, groups, are_grades, column, where)
    if labels is not None:
        raise ConfigError(
            "a dataset has its labels in its index",
            where=labels,
            fix="leave --labels out, or build the dataset with `frepa shards build --labels`",
        )
    everything = open_shards(images, modality)
    kept, found = _from_shards(everything, label_column, classes)
    groups = group_samples(everything, kept)
    return _assemble(everything.take(kept), found, groups, are_grades, label_column, str(images))


def _assemble(
    pictures: Pictures,
    found: LabeledImages,
    groups: Groups,
    are_grades: bool,
    column: str | None,
    where: str,
) -> LabeledSet:
    try:
        classes = sorted(set(found.labels), key=float if are_grades else None)
    except ValueError as error:
        raise ConfigError(
            "grades have to be numbers", where=where, allowed=f"numbers, not {', '.join(set(found.labels))}"
        ) from error
    numbers = {name: k for k, name in enumerate(classes)}
    return LabeledSet(
        pictures=pictures,
        classes=classes,
        y=np.array([numbers[label] for label in found.labels], np.int64),
        groups=None if groups.names is None else np.unique(groups.names, return_inverse=True)[1],
        splits=found.splits,
        num_left_out=found.num_left_out,
        label_column=column,
        where=where,
        patients=found.patients,
        units=groups.units,
    )


def _from_shards(
    pictures: ShardPictures, column: str, classes: Collection[str] | None
) -> tuple[list[int], LabeledImages]:
    """The numbers of the samples that have a label, and what is known of them."""
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
    splits = _splits([pictures.info[i].get(SPLIT) for i in kept], column, pictures.where)
    left_out = len(labels) - len(kept)
    return kept, LabeledImages([], [labels[i] for i in kept], splits, None, left_out)


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
    shared = _find_shared(_content(first), _content(second))
    if shared:
        raise DataError(
            f"{len(shared)} pictures are in both sets, such as {shared[0][1]} ({shared[0][0]} there)",
            where=second.where,
            fix="judge on other pictures than those that are learned from",
        )


def check_apart(data: LabeledSet) -> None:
    """See that no picture is on both sides of the split that is given.

    Raises:
        DataError: some are.
    """
    if data.splits is None:
        return
    learned, tested = (
        compress(_content(data), [split == part for split in data.splits]) for part in ("train", "test")
    )
    shared = _find_shared(learned, tested)
    if shared:
        raise DataError(
            f"{len(shared)} pictures of the test part are in the training part too, such as {shared[0][1]} "
            f"({shared[0][0]} there)",
            where=data.where,
            fix="leave them out of one of the two parts",
        )


def _content(data: LabeledSet) -> Iterator[tuple[str, str]]:
    """Digest and name of each picture."""
    return zip(data.pictures.digests(), data.pictures.names, strict=True)


def _find_shared(known: Iterable[tuple[str, str]], asked: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Names among the known, and names, of those that are asked for and known."""
    names = dict(known)
    return [(names[digest], name) for digest, name in asked if digest in names]
