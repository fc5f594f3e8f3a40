"""What is known of objects besides their pixels: labels, and which patient they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from shards.builder.listing import read_listing
from shards.support.errors import ConfigError

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
"""First-level folders that are read as a split, not as a class."""


@dataclass(frozen=True)
class Labels:
    """Labels, which enter the dataset, and the patient, which enters salted."""

    values: Mapping[str, str] = field(default_factory=dict)
    patient: str | None = None


Labeler = Callable[[str, str], Labels]
"""From an object's name within its source and its uri."""


def select_labels(row: Mapping[str, str], columns: Sequence[str], patient_column: str) -> Labels:
    """Take the allowed columns of a row of a listing; others may hold names."""
    return Labels({name: row[name] for name in columns if row.get(name)}, row.get(patient_column) or None)


def create_labeler(kind: str, columns: Sequence[str], patient_column: str) -> Labeler:
    """Make the function that labels objects.

    Args:
        kind: "none"; "folder": the first folder below the source is the label, or the second where the first
            is named like a split ("train", "test"); else a table (`.csv` or `.parquet`) whose column
            `filename` holds paths relative to the table, or whose column `uri` holds whole ones.
        columns: the columns of the table that enter the dataset: an allow-list.
        patient_column: the column that tells patients apart; it may be absent.

    Raises:
        ConfigError: the table cannot be read, or lacks the columns.
    """
    if kind == "none":
        return lambda name, uri: Labels()
    if kind == "folder":
        return _folder_labels
    listing = read_listing(kind, what="labels")
    if not set(columns) & set(listing.columns):
        raise ConfigError(
            f"the table has the columns {', '.join(listing.columns) or '(none)'}",
            where=kind,
            allowed=f"filename or uri, and one or more of {', '.join(columns)}",
            fix="add the column, or name the label columns",
        )
    known = {row.uri: select_labels(row.values, columns, patient_column) for row in listing.rows}
    return lambda name, uri: known.get(uri, Labels())


def _folder_labels(name: str, uri: str) -> Labels:
    folders, values = name.split("/")[1:-1], {}
    if folders and folders[0].lower() in SPLIT_NAMES:
        values["split"] = folders.pop(0)
    if folders:
        values["label"] = folders[0]
    return Labels(values)
