"""Which samples of the shards count: all but those that repeat others, or were replaced by newer ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.dataset import read_table
from shards.read.order import skip_excluded
from shards.schema import Snapshot
from shards.stores.store import Store, open_store
from shards.support.errors import DataError

EXCLUDED_KINDS = pa.array(["pixels", "superseded"])
"""Of the duplicates, those that lie in shards: the order leaves them out."""

Place = tuple[int, int]
"""Shard, as numbered in `Snapshot.shards`, and row of its index."""


class KeptSamples:
    """Numbers the samples of some shards that are not excluded.

    Args:
        snapshot: the dataset.
        exclusions: as of `exclusion_rows`.
        modality: number the samples of this one only; None: all.
    """

    def __init__(
        self, snapshot: Snapshot, exclusions: Mapping[int, NDArray[np.int64]], modality: str | None = None
    ) -> None:
        self._exclusions = exclusions
        shards = [(i, s) for i, s in enumerate(snapshot.shards) if modality in (None, s.modality)]
        self._shards = [i for i, _ in shards]
        self._ends = np.cumsum([s.num_samples - len(exclusions.get(i, ())) for i, s in shards])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._shards else 0

    def locate(self, number: int) -> Place:
        """Return shard and row of a sample, `number` in [0, len)."""
        i = int(np.searchsorted(self._ends, number, side="right"))
        shard = self._shards[i]
        row = np.array([number - (self._ends[i - 1] if i else 0)])
        if shard in self._exclusions:
            row = skip_excluded(row, self._exclusions[shard])
        return shard, int(row[0])


def exclusion_rows(place: Store | Path | str, snapshot: Snapshot) -> dict[int, NDArray[np.int64]]:
    """Rows that the order leaves out, since they repeat others or newer ones took their place.

    Reads the table of duplicates and no index.

    Returns:
        Shard, as numbered in `snapshot.shards` -> its rows, sorted and unique.

    Raises:
        DataError: the table is missing or damaged, or names rows that the dataset does not have.
        EnvironmentFault: the place cannot be reached.
    """
    table = read_table(place, snapshot, "duplicates")
    table = table.filter(pc.and_(pc.is_in(table["kind"], EXCLUDED_KINDS), pc.is_valid(table["shard"])))
    paths = pa.array([info.path for info in snapshot.shards], pa.string())
    shards = pc.fill_null(pc.index_in(table["shard"], paths), -1).to_numpy().astype(np.int64)
    rows = pc.fill_null(table["row"], -1).to_numpy().astype(np.int64)
    sizes = np.array([*(info.num_samples for info in snapshot.shards), 0])  # the last for unknown shards
    if not ((rows >= 0) & (rows < sizes[shards])).all():
        path = snapshot.tables["duplicates"].path
        raise DataError(
            "names samples that are not there", where=open_store(place).where(path), fix="build again"
        )
    if not rows.size:
        return {}
    order = np.lexsort((rows, shards))
    found, starts = np.unique(shards[order], return_index=True)
    parts = np.split(rows[order], starts[1:])
    return {shard: np.unique(part) for shard, part in zip(found.tolist(), parts, strict=True)}
