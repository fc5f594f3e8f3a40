"""Labeled images for the probes: a folder per class, or a CSV file with `filename,label[,split]`."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from frepa_dist.evaluate.views import list_images
from shards.builder.labels import SPLIT_NAMES
from shards.support.errors import ConfigError, DataError

SPLITS = {
    **dict.fromkeys(("train", "training", "val", "valid", "validation"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What a split may be called. Validation images join the training ones: a probe's settings are chosen by
cross-validation inside them."""

FILENAME, SPLIT, PATIENT = "filename", "split", "patient"


@dataclass(frozen=True)
class LabeledImages:
    """Images with their labels, in the order of the file or of the paths.

    Attributes:
        paths: n files, all of them there.
        labels: n class names.
        splits: n times "train" or "test", None when the split is not given.
        patients: n names that must stay on one side of a split, None when they are not known.
        num_left_out: rows without a label, or of a class that was not asked for.
    """

    paths: list[Path]
    labels: list[str]
    splits: list[str] | None
    patients: list[str] | None
    num_left_out: int


def read_labeled(
    images: Path,
    labels: Path | None = None,
    *,
    label_column: str = "label",
    classes: Collection[str] | None = None,
) -> LabeledImages:
    """Read a labeled set.

    Args:
        images: a folder. Without `labels`, its subfolders are the classes, or `train` and `test` folders that
            hold them.
        labels: a CSV file with the column `filename`, relative to `images`, a column of labels, and maybe
            `split` and `patient`. Rows without a label are left out and counted.
        label_column: the column of labels.
        classes: the only classes to use, None for all.

    Raises:
        ConfigError: a column is missing, a split has an unknown name, or its folders lie beside others.
        DataError: there are fewer than two classes, or files are missing.
    """
    found = _from_folders(images) if labels is None else _from_csv(images, labels, label_column)
    wanted = [bool(label) and (classes is None or label in classes) for label in found.labels]
    chosen = LabeledImages(
        paths=[path for path, keep in zip(found.paths, wanted, strict=True) if keep],
        labels=[label for label, keep in zip(found.labels, wanted, strict=True) if keep],
        splits=None if found.splits is None else _pick(found.splits, wanted),
        patients=None if found.patients is None else _pick(found.patients, wanted),
        num_left_out=len(wanted) - sum(wanted),
    )
    names = sorted(set(chosen.labels))
    if len(names) < 2:
        raise DataError(
            f"a probe needs two classes or more, found {', '.join(names) or 'none'}",
            where=labels or images,
            fix=_hint_at_labels(images, labels, found.labels),
        )
    missing = [path for path in chosen.paths if not path.is_file()]
    if missing:
        shown = ", ".join(str(path) for path in missing[:3])
        raise DataError(
            f"{len(missing)} of {len(chosen.paths)} images are missing: {shown}",
            where=labels,
            fix="file names are relative to the folder of images; correct that folder or the names",
        )
    return chosen


def _pick(values: list[str], wanted: list[bool]) -> list[str]:
    return [value for value, keep in zip(values, wanted, strict=True) if keep]


def _hint_at_labels(images: Path, labels: Path | None, given: list[str]) -> str:
    if labels is not None:
        names = ", ".join(sorted(set(filter(None, given)))[:20])
        return f"choose among the labels in the file: {names or 'none'}"
    tables = sorted(images.glob("*.csv"))
    return (
        f"name the labels with --labels {tables[0]}"
        if tables
        else "give a subfolder per class, or a CSV file"
    )


def _from_folders(images: Path) -> LabeledImages:
    paths = list_images(images)
    folders = [path.relative_to(images).parts[:-1] for path in paths]
    first = {parts[0] for parts in folders if parts}  # of images beside the folders nothing can be learned
    others = sorted(name for name in first if name.lower() not in SPLIT_NAMES)
    is_split = len(others) < len(first)
    if is_split and others:
        raise ConfigError(
            f"the folders {', '.join(sorted(first - set(others)))} are parts of a split, and beside them "
            f"lies {', '.join(others[:3])}",
            where=images,
            allowed="folders train and test that hold the classes, or a folder per class",
            fix="move the other folders away, or name classes and split in a CSV file",
        )
    depth = 1 if is_split else 0
    labels = [parts[depth] if len(parts) > depth else "" for parts in folders]
    splits = [SPLITS[parts[0].lower()] if parts else "" for parts in folders] if is_split else None
    return LabeledImages(paths, labels, splits, None, 0)


def read_rows(table: Path, required: Collection[str]) -> tuple[list[str], list[dict[str, str]]]:
    """Read a table of images: its header, and its rows with empty text where a cell is missing.

    Args:
        table: a CSV file in UTF-8.
        required: columns that have to be there.

    Raises:
        ConfigError: a column is missing.
        DataError: the file cannot be read, or lists a file twice.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            rows = [{name: row[name] or "" for name in header} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"the table cannot be read: {error}", where=table, allowed="a CSV file in UTF-8"
        ) from error
    for column in required:
        if column not in header:
            raise ConfigError(
                f"there is no column '{column}'",
                where=table,
                allowed=f"the columns of the file: {', '.join(header) or '(none)'}",
                fix=_hint(header, column),
            )
    repeated = [name for name, count in Counter(row[FILENAME] for row in rows).items() if count > 1]
    if repeated:
        raise DataError(f"{len(repeated)} files are listed twice, such as {repeated[0]}", where=table)
    return header, rows


def _hint(header: Sequence[str], column: str) -> str:
    """What is probably wrong with a header that lacks a column."""
    separators = [mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]]
    if separators:
        return f"separate the columns by commas, not by {separators[0]!r}"
    alike = [name for name in header if name.strip().lower() == column.lower()]
    if alike:
        return f"rename '{alike[0]}': spaces and capitals count"
    return "name the column (--label-column, --mask-column); that of files is called 'filename'"


def _from_csv(images: Path, table: Path, label_column: str) -> LabeledImages:
    header, rows = read_rows(table, (FILENAME, label_column))
    return LabeledImages(
        paths=[images / row[FILENAME] for row in rows],
        labels=[row[label_column].strip() for row in rows],
        splits=[split_of(row[SPLIT], table) for row in rows] if SPLIT in header else None,
        patients=_patients([row[PATIENT] for row in rows]) if PATIENT in header else None,
        num_left_out=0,
    )


def split_of(name: str, table: Path) -> str:
    """Find out whether a row is of the `train` or the `test` part.

    Raises:
        ConfigError: the name is unknown.
    """
    try:
        return SPLITS[name.strip().lower()]
    except KeyError:
        allowed = f"{', '.join(sorted(SPLITS))}; or no column 'split' at all, to have one made"
        raise ConfigError(f"unknown split '{name}'", where=table, allowed=allowed) from None


def _patients(names: list[str]) -> list[str]:
    """Give an image without a patient one of its own."""
    return [name.strip() or f"(row {number})" for number, name in enumerate(names)]
