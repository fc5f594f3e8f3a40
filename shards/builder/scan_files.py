"""What was found out about objects before their plan was whole, kept in the private state folder.

To look at millions of objects takes hours; when that is interrupted, it goes on where it was.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from shards.builder.state import read_private
from shards.schema import canonical_json
from shards.support.errors import DataError
from shards.support.settings import Settings

MEAN_ROWS, MAX_ROWS = 1024, 4096


def cut_groups(names: pa.ChunkedArray) -> Iterator[tuple[int, int]]:
    """First row and end of groups of rows.

    Where a group ends depends on the name there, so that objects that come or go move few of the ends.
    """
    start = row = 0
    for row, name in enumerate(names, 1):  # one by one: as a list, 17 million names take 2 GB
        if zlib.crc32(name.as_py()) % MEAN_ROWS == 0 or row - start == MAX_ROWS:
            yield start, row
            start = row
    if start < row:
        yield start, row


def group_path(folder: Path, rows: pa.Table, options: Settings) -> Path:
    """Where the findings about some objects are kept; it depends on all that these depend on."""
    digest = hashlib.sha256(canonical_json(options.model_dump(mode="json")))
    for name in ("name", "uri", "num_bytes", "version"):
        digest.update(repr(rows[name].to_pylist()).encode())
    return folder / f"{digest.hexdigest()[:32]}.parquet"


def read_group(path: Path, schema: pa.Schema, num_rows: int) -> pa.Table | None:
    """Findings about so many objects; None where there are none."""
    if not path.exists():
        return None
    try:
        table = read_private(path, schema)
    except DataError:  # damaged, or of another version: looked at again
        return None
    return table if table.num_rows == num_rows else None


def forget_groups(folder: Path) -> None:
    """Delete all findings, and what killed writers left of them: the plan has them now."""
    for path in folder.glob("*.parquet*"):
        path.unlink(missing_ok=True)
