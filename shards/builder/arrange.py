"""The order of a plan's rows: series together, byte duplicates told, slices numbered."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.builder.columns import replace_columns


def arrange_rows(table: pa.Table) -> pa.Table:
    """Sort rows by name, the objects of a series where its first name is, by their place in it.

    Args:
        table: `PLAN_SCHEMA` and a column `place`, which is dropped.
    """
    table = table.take(pc.sort_indices(table["name"]))
    in_series = table["in_series"].to_numpy()
    if in_series.any():
        own = np.arange(table.num_rows)
        codes = table["volume"].combine_chunks().dictionary_encode().indices
        series = pc.fill_null(codes, 0).to_numpy()[in_series]
        first = np.full(int(series.max()) + 1, table.num_rows)
        np.minimum.at(first, series, own[in_series])
        lead = own.copy()
        lead[in_series] = first[series]
        table = table.take(pa.array(np.lexsort((own, table["place"].to_numpy(), lead))))
    return table.drop_columns("place")


def resolve_duplicates(table: pa.Table, originals: pa.Table) -> pa.Table:
    """Mark objects that repeat the bytes of another one: of an earlier part, or of a row before.

    Args:
        table: rows of a new part, in order, objects numbered.
        originals: rows of earlier parts that have samples.
    """
    is_whole = pc.and_(pc.equal(table["status"], "image"), pc.is_null(table["units"]))
    rows = np.flatnonzero(is_whole.to_numpy())
    identities = table["identity"].take(pa.array(rows)).combine_chunks()
    numbers = table["object"].to_numpy()
    known = pc.index_in(identities, value_set=originals["identity"].combine_chunks())
    of_known = originals["object"].take(known).fill_null(-1).to_numpy()
    codes = identities.dictionary_encode().indices.to_numpy()
    _, first, group = np.unique(codes, return_index=True, return_inverse=True)
    of_row = numbers[rows[first[group]]] if len(rows) else numbers[:0]
    of_row = np.where(of_row == numbers[rows], -1, of_row)
    duplicate_of = np.full(table.num_rows, -1)
    duplicate_of[rows] = np.where(of_known >= 0, of_known, of_row)
    is_duplicate = pa.array(duplicate_of >= 0)
    return replace_columns(
        table,
        duplicate_of=pa.array(duplicate_of),
        status=pc.if_else(is_duplicate, "duplicate", table["status"]),
        reason=pc.if_else(is_duplicate, "same_bytes", table["reason"]),
    )


def number_slices(table: pa.Table, known: pa.Table) -> pa.Table:
    """Number the slices of series, in the order of the rows, on from those of earlier parts.

    What is tried again in parts keeps its number.
    """
    counted = pc.and_(
        pc.and_(pc.equal(table["status"], "image"), table["in_series"]), pc.is_null(table["units"])
    )
    rows = np.flatnonzero(counted.to_numpy())
    if not len(rows):
        return table
    encoded = table["volume"].take(pa.array(rows)).combine_chunks().dictionary_encode()
    codes, units = encoded.indices.to_numpy(), table["num_units"].to_numpy()[rows].astype(np.int64)
    before = known.filter(pc.and_(known["in_series"], pc.equal(known["status"], "image")))
    ends = before.append_column("end", pc.add(before["slice"], before["num_units"]))
    ends = ends.group_by("volume").aggregate([("end", "max")])
    starts = ends["end_max"].take(pc.index_in(encoded.dictionary, value_set=ends["volume"].combine_chunks()))
    starts = starts.fill_null(0).to_numpy()
    order = np.argsort(codes, kind="stable")
    total = np.cumsum(units[order]) - units[order]
    is_first = np.diff(codes[order], prepend=-1) != 0
    base = np.maximum.accumulate(np.where(is_first, total, 0))
    slices = table["slice"].to_numpy().copy()
    slices[rows[order]] = total - base + starts[codes[order]]
    return replace_columns(table, slice=pa.array(slices.astype(np.int32)))
