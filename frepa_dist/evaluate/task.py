"""A task of classification: which pictures to learn from, and which to be judged on.

Shapes: n pictures, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from frepa_dist.evaluate.labeled_set import LabeledSet, check_alike, check_apart, read_labeled_set
from frepa_dist.evaluate.scores import Bool, Int64
from frepa_dist.evaluate.splits import split_parts
from shards.support.errors import ConfigError
from shards.support.settings import Settings

ClassName = Annotated[str, Field(coerce_numbers_to_str=True)]
"""YAML reads a grade as a number."""
Split = Literal["given", "made", "transfer"]


class ProbeTask(Settings):
    """Labeled images, and what is to be told of them; a list of these is a benchmark.

    Attributes:
        images: a folder of files, or a dataset of shards that was built with labels.
        labels: CSV file, None for a folder per class (see `labelled.read_labeled`), and of a dataset.
        label_column: its column of labels; of a dataset, the label.
        classes: the only classes to use, None for all.
        are_grades: the classes are numbers whose order counts: kappa is measured too.
        modality: of a dataset: the only one to use; of files: what they are.
        transfer: judge on all of this other set, which has the same classes; learned is from the training
            part of `images` where a split is given, else from all of it.
        transfer_labels: its CSV file.
        seed: of the split, where none is given, of the folds, the training and the bootstrap.
        num_resamples: of the bootstrap.
        smoke_test: the labels are not medical; the result says so.
    """

    images: str
    labels: Path | None = None
    label_column: str = "label"
    classes: tuple[ClassName, ...] | None = None
    are_grades: bool = False
    modality: str | None = None
    transfer: str | None = None
    transfer_labels: Path | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)  # what scikit-learn takes
    num_resamples: int = Field(default=1000, ge=1)
    smoke_test: bool = False


@dataclass(frozen=True)
class Parts:
    """Labeled pictures to learn from, and others to be judged on.

    Attributes:
        train: the set to learn from; its pictures of `is_train` are.
        is_train: (n,).
        test: the set to be judged on, the same one or another.
        is_test: which of its pictures.
        split: "given", "made" by the seed, or "transfer".
    """

    train: LabeledSet
    is_train: Bool
    test: LabeledSet
    is_test: Bool
    split: Split

    @property
    def y(self) -> Int64:
        """Classes of the training part."""
        return self.train.y[self.is_train]

    @property
    def groups(self) -> Int64 | None:
        """Groups of the training part."""
        return None if self.train.groups is None else self.train.groups[self.is_train]

    @property
    def test_y(self) -> Int64:
        """Classes of the test part."""
        return self.test.y[self.is_test]

    @property
    def test_groups(self) -> Int64 | None:
        """Groups of the test part."""
        return None if self.test.groups is None else self.test.groups[self.is_test]


def read_parts(task: ProbeTask) -> Parts:
    """Read one set and split it, or read two.

    Raises:
        ConfigError, DataError: what is wrong with them.
    """
    data = _read(task, task.images, task.labels)
    if task.transfer is None:
        if task.transfer_labels is not None:
            raise ConfigError("labels without images", where="--transfer-labels", fix="name the --transfer")
        is_test = _split(data, task.seed)
        return Parts(data, ~is_test, data, is_test, "made" if data.splits is None else "given")
    other = _read(task, task.transfer, task.transfer_labels)
    check_alike(data, other)
    is_train = np.ones(len(data.y), bool)
    if data.splits is not None:
        is_train = ~_split(data, task.seed)
    return Parts(data, is_train, other, np.ones(len(other.y), bool), "transfer")


def _split(data: LabeledSet, seed: int) -> Bool:
    check_apart(data)
    return split_parts(data, data.y, data.groups, seed, where=data.where)


def _read(task: ProbeTask, images: str, labels: Path | None) -> LabeledSet:
    return read_labeled_set(
        images,
        labels,
        label_column=task.label_column,
        classes=task.classes,
        are_grades=task.are_grades,
        modality=task.modality,
    )
