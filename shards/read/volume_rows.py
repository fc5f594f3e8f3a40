"""The rows of indices that are slices of volumes, and which volumes belong together."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.dataset import read_index, read_table
from shards.schema import Snapshot
from shards.stores.store import Store
from shards.support.errors import DataError

Int = NDArray[np.int64]

SLICES_SCHEMA = pa.schema(
    [
        pa.field("volume", pa.dictionary(pa.int32(), pa.string())),
        pa.field("slice", pa.int32()),
        pa.field("patient", pa.dictionary(pa.int32(), pa.string())),
        pa.field("labels", pa.dictionary(pa.int32(), pa.string())),
        pa.field("shard", pa.int64()),  # as numbered in the snapshot
        pa.field("row", pa.int64()),
        # the key of the first of several samples that have the same pixels; null where there is but one
        pa.field("link", pa.string()),
    ]
)


def read_slice_rows(store: Store, snapshot: Snapshot, modality: str | None) -> pa.Table:
    """Read the rows of all slices of volumes (`SLICES_SCHEMA`), but for those that newer objects replaced.

    Raises:
        DataError: an index or the table of duplicates is missing or damaged.
        EnvironmentFault: the place cannot be reached.
    """
    replaced, repeats = read_duplicates(store, snapshot)
    originals = pa.array(sorted({key for keys in repeats.values() for key in keys.values()}), pa.string())
    parts = [SLICES_SCHEMA.empty_table()]
    for number, info in enumerate(snapshot.shards):
        if modality not in (None, info.modality):
            continue
        table = read_index(store, info, ["key", "volume", "slice", "patient", "labels"])
        link = pc.if_else(pc.is_in(table["key"], value_set=originals), table["key"], None).to_pylist()
        for row, original in repeats[number].items():
            link[row] = original
        is_in = pc.is_valid(table["volume"]).to_numpy(zero_copy_only=False)
        is_in[replaced[number]] = False
        columns = {
            **{name: pc.dictionary_encode(table[name]) for name in ("volume", "patient", "labels")},
            "slice": table["slice"],
            "shard": pa.array(np.full(table.num_rows, number)),
            "row": pa.array(np.arange(table.num_rows)),
            "link": pa.array(link, pa.string()),
        }
        parts.append(pa.table(columns, schema=SLICES_SCHEMA).filter(pa.array(is_in)))
    return pa.concat_tables(parts).unify_dictionaries().combine_chunks()


def split_by_volume(table: pa.Table) -> list[Int]:
    """Rows of each volume, by the numbers of the slices.

    Raises:
        DataError: a number is given twice in a volume.
    """
    if not table.num_rows:
        return []
    volumes = table["volume"].combine_chunks()
    codes, numbers = volumes.indices.to_numpy(), table["slice"].to_numpy()
    order = np.lexsort((numbers, codes))
    again = np.flatnonzero((np.diff(codes[order]) == 0) & (np.diff(numbers[order]) == 0))
    if len(again):
        row = int(order[again[0]])
        raise DataError(
            f"two samples are slice {numbers[row]} of volume {volumes[row].as_py()}",
            fix="build the dataset again",
        )
    bounds = np.flatnonzero(np.diff(codes[order], prepend=-1, append=-1))
    return [order[start:end] for start, end in itertools.pairwise(bounds)]


def shared_labels(labels: pa.ChunkedArray) -> tuple[dict[str, Any], frozenset[str]]:
    """Labels that are the same for all slices, and the names of the others."""
    found: list[dict[str, Any]] = [json.loads(text) for text in labels.unique().to_pylist()]
    names = sorted({name for one in found for name in one})
    first = found[0]
    same = {n: first[n] for n in names if all(n in one and one[n] == first[n] for one in found)}
    return same, frozenset(names) - set(same)


def group_volumes(table: pa.Table, parts: list[Int]) -> list[int]:
    """Number the groups of volumes that have a patient or the pixels of a slice in common, over any others.

    Raises:
        DataError: the slices of a volume name several patients.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    patients = _codes(table["patient"].combine_chunks())
    links = _codes(table["link"].combine_chunks().dictionary_encode())
    first_patient = len(parts) + int(links.max(initial=-1)) + 1
    num_nodes = first_patient + int(patients.max(initial=-1)) + 1
    ends: list[tuple[int, int]] = []
    for volume, part in enumerate(parts):
        mine = np.unique(patients[part][patients[part] >= 0])
        if len(mine) > 1:
            raise DataError(
                f"the slices of volume {table['volume'][int(part[0])].as_py()} name {len(mine)} patients",
                fix="correct the column of patients, and build again",
            )
        shared = np.unique(links[part][links[part] >= 0])
        ends += [(volume, len(parts) + int(link)) for link in shared]
        ends += [(volume, first_patient + int(patient)) for patient in mine]
    a, b = np.array(ends, np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(a)), (a, b)), shape=(num_nodes, num_nodes))
    _, groups = connected_components(graph, directed=False)
    return [int(group) for group in np.unique(groups[: len(parts)], return_inverse=True)[1]]


def _codes(values: pa.DictionaryArray) -> Int:
    """Number of each value in the dictionary, -1 for null."""
    codes: Int = pc.fill_null(values.indices, -1).to_numpy().astype(np.int64)
    return codes


def read_duplicates(
    place: Store | Path | str, snapshot: Snapshot
) -> tuple[defaultdict[int, list[int]], defaultdict[int, dict[int, str]]]:
    """By shard: the rows that newer ones replaced; the rows that repeat pixels, with the original's key.

    Raises:
        DataError: the table of duplicates is missing or damaged.
        EnvironmentFault: the place cannot be reached.
    """
    table = read_table(place, snapshot, "duplicates")
    table = table.filter(pc.is_valid(table["shard"]))
    numbers = {info.path: i for i, info in enumerate(snapshot.shards)}
    replaced: defaultdict[int, list[int]] = defaultdict(list)
    repeats: defaultdict[int, dict[int, str]] = defaultdict(dict)
    names = ("kind", "shard", "row", "duplicate_of")
    for kind, shard, row, original in zip(*(table[name].to_pylist() for name in names), strict=True):
        if kind == "superseded":
            replaced[numbers[shard]].append(row)
        elif kind == "pixels":
            repeats[numbers[shard]][row] = original
    return replaced, repeats
