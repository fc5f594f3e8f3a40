"""Tables that name objects: a `.csv` or `.parquet` file with a column `uri` or `filename`."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from shards.stores.store import is_remote, open_store
from shards.support.errors import ConfigError, FrepaError

SUFFIXES = (".csv", ".parquet")
NAME_COLUMNS = ("uri", "filename")


class ListedObject(NamedTuple):
    """A row of a listing.

    Attributes:
        name: as it is written there.
        uri: the same, made absolute.
        values: the other columns, as text; empty cells are left out.
    """

    name: str
    uri: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class ListingFile:
    """A listing; its rows are read as they are needed, once."""

    columns: tuple[str, ...]
    rows: Iterator[ListedObject]


def is_listing(place: Path | str) -> bool:
    """Whether a source is a listing, by its suffix."""
    return str(place).lower().endswith(SUFFIXES)


def read_listing(place: Path | str, *, what: str = "listing") -> ListingFile:
    """Read a listing.

    Args:
        place: a file here or in S3; names in it are relative to its folder.
        what: what errors call it.

    Raises:
        ConfigError: it cannot be read, or names no objects.
    """
    folder, _, name = str(place).rpartition("/") if is_remote(place) else ("", "", "")
    try:
        data = open_store(folder).read(name) if folder else Path(place).read_bytes()
        columns, rows = _read_parquet(data) if str(place).lower().endswith(".parquet") else _read_csv(data)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException, FrepaError) as error:
        raise ConfigError(
            f"the {what} cannot be read: {error}", where=place, allowed="a CSV or parquet file"
        ) from error
    key = next((column for column in NAME_COLUMNS if column in columns), None)
    if key is None:
        raise ConfigError(
            f"the table has the columns {', '.join(columns) or '(none)'}",
            where=place,
            allowed=f"a column {' or '.join(NAME_COLUMNS)}",
            fix="add the column",
        )
    return ListingFile(tuple(columns), _resolve(rows, key, place, folder))


def _resolve(
    rows: Iterator[Mapping[str, str]], key: str, place: Path | str, folder: str
) -> Iterator[ListedObject]:
    here = os.path.dirname(os.path.abspath(place)) if not folder else ""
    for number, row in enumerate(rows):
        name = row.get(key, "")
        if not name:
            raise ConfigError(f"row {number + 1} names no object ({key} is empty)", where=place)
        if is_remote(name):
            uri = name
        else:
            uri = f"{folder}/{name}" if folder else os.path.abspath(os.path.join(here, name))
        yield ListedObject(name, uri, {column: text for column, text in row.items() if column != key})


def _read_csv(data: bytes) -> tuple[list[str], Iterator[Mapping[str, str]]]:
    def open_rows() -> csv.DictReader[str]:
        return csv.DictReader(io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline=""))

    reader = open_rows()
    for (
        _
    ) in reader:  # so that a malformed table is found before anything is done; millions of rows are not held
        pass
    return list(reader.fieldnames or []), (
        {column: text for column, text in row.items() if isinstance(column, str) and text}
        for row in open_rows()
    )


def _read_parquet(data: bytes) -> tuple[list[str], Iterator[Mapping[str, str]]]:
    file = pq.ParquetFile(pa.BufferReader(data))
    rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
    return list(file.schema_arrow.names), (
        {column: str(value) for column, value in row.items() if value not in (None, "")} for row in rows
    )
