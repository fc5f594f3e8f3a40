"""Small operations on Arrow columns that plans and tables need."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Bool = npt.NDArray[np.bool_]
Int = npt.NDArray[np.int64]


def places_among(names: pa.ChunkedArray, among: pa.ChunkedArray) -> Int:
    """Where each name is among others, -1 where it is not."""
    found = pc.index_in(names, value_set=among.combine_chunks())
    return np.asarray(pc.fill_null(found, -1).to_numpy().astype(np.int64))


def take_or_null(table: pa.Table, places: Int) -> pa.Table:
    """Rows by their places, nulls for a place of -1."""
    return table.take(pa.array(places, mask=places < 0))


def equal(a: Any, b: Any) -> Bool:
    """Whether values are equal, one by one; null is equal to nothing."""
    return np.asarray(pc.fill_null(pc.equal(a, b), False).to_numpy(zero_copy_only=False), bool)


def equal_to(values: pa.ChunkedArray, value: Any) -> Bool:
    """Whether each value is a certain one."""
    return equal(values, pa.scalar(value, values.type))


def replace_columns(table: pa.Table, **columns: Any) -> pa.Table:
    """A table with other values in some columns; names and types stay."""
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), values)
    return table
