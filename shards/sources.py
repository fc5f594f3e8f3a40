"""Where objects come from: folder trees and single files, listed in one order whatever the file system's."""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.support.errors import ConfigError, DataError

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
"""First-level folders that are read as a split, not as a class."""


@dataclass(frozen=True)
class SourceObject:
    """One file of a source.

    Attributes:
        name: number of its source and path below it, "0/sub/file.png"; it does not depend on where the
            source lies, and identifies the object.
        path: where it is, private.
        num_bytes: its size; -1 where it could not be examined (a broken link).
        modified_ns: time of its last change.
        is_file: whether it is a regular file.
    """

    name: str
    path: str
    num_bytes: int
    modified_ns: int
    is_file: bool

    @property
    def folders(self) -> tuple[str, ...]:
        """Names of the folders between the source and the object."""
        return tuple(self.name.split("/")[1:-1])


def list_objects(sources: Sequence[Path]) -> list[SourceObject]:
    """List every object of the sources, hidden ones included, sorted by the bytes of their names.

    Links are followed; a folder that a link makes its own descendant is listed once.

    Raises:
        DataError: a source does not exist, cannot be listed, or all of them together hold no object.
    """
    objects: list[SourceObject] = []
    for number, source in enumerate(sources):
        if source.is_dir():
            prefix = f"{number}/"
            objects.extend(_examine(p, prefix + p.relative_to(source).as_posix()) for p in _walk(source))
        elif source.exists():
            objects.append(_examine(source, f"{number}/{source.name}"))
        else:
            raise DataError("no such file or folder", where=source, fix="correct the path of the source")
    if not objects:
        where = ", ".join(map(str, sources))
        raise DataError("the source is empty", where=where, fix="give a folder that holds images")
    return sorted(objects, key=lambda item: os.fsencode(item.name))


def _walk(source: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(
            f"cannot be listed: {error.strerror}", where=error.filename, fix="allow reading of the folder"
        ) from error

    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(source, followlinks=True, onerror=refuse):
        facts = Path(folder).stat()
        if (facts.st_dev, facts.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        subfolders.sort()
        for file in files:
            yield Path(folder, file)


def _examine(path: Path, name: str) -> SourceObject:
    try:
        facts = path.stat()
    except OSError:
        return SourceObject(name, str(path), -1, 0, is_file=False)
    is_file = stat.S_ISREG(facts.st_mode)
    return SourceObject(name, str(path), facts.st_size if is_file else 0, facts.st_mtime_ns, is_file)


def check_places(sources: Sequence[Path], root: Path, state: Path) -> None:
    """Refuse places that would read what is being written, or publish what is private.

    Raises:
        ConfigError: the destination or the state folder lies in a source, or the state in the destination.
    """
    for source in sources:
        for what, place in (("destination", root), ("state folder", state)):
            if place.resolve().is_relative_to(source.resolve()):
                raise ConfigError(
                    f"the {what} lies inside the source {source}", where=place, fix="move it out"
                )
    if state.resolve().is_relative_to(root.resolve()):
        fix = "choose a state folder outside: it is private, the dataset may be handed on"
        raise ConfigError("the state folder lies inside the destination", where=state, fix=fix)


@dataclass(frozen=True)
class Labels:
    """What is known of an object: labels that enter the dataset, and the patient, which enters salted."""

    values: dict[str, str]
    patient: str | None = None


def create_labeler(
    kind: str, columns: Sequence[str], patient_column: str
) -> Callable[[SourceObject], Labels]:
    """Make the function that labels objects.

    Args:
        kind: "none"; "folder": the first folder below the source is the label, or the second where the first
            is named like a split ("train", "test"); else the path of a CSV file with a header, whose column
            `filename` holds paths relative to the CSV file.
        columns: the columns of the CSV file that enter the dataset: an allow-list, others may hold names.
        patient_column: the column that tells patients apart; it may be absent.

    Raises:
        ConfigError: the CSV file cannot be read, or lacks the columns.
    """
    if kind == "none":
        return lambda item: Labels({})
    if kind == "folder":
        return _folder_labels
    rows = _read_csv(Path(kind), columns)

    def from_csv(item: SourceObject) -> Labels:
        row = rows.get(os.path.abspath(item.path), {})
        values = {name: row[name] for name in columns if row.get(name)}
        return Labels(values, row.get(patient_column) or None)

    return from_csv


def _folder_labels(item: SourceObject) -> Labels:
    folders, values = list(item.folders), {}
    if folders and folders[0].lower() in SPLIT_NAMES:
        values["split"] = folders.pop(0)
    if folders:
        values["label"] = folders[0]
    return Labels(values)


def _read_csv(path: Path, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"the labels cannot be read: {error}", where=path, allowed="none, folder, or a CSV file"
        ) from error
    if "filename" not in header or not set(columns) & set(header):
        raise ConfigError(
            f"the CSV file has the columns {', '.join(header) or '(none)'}",
            where=path,
            allowed=f"filename, and one or more of {', '.join(columns)}",
            fix="add the column, or name the label columns",
        )
    return {os.path.abspath(path.parent / (row["filename"] or "")): row for row in rows}
