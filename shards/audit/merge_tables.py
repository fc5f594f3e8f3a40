"""What joining datasets does with their tables: repeated pixels, new names, the accounting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shards.audit.merge_shards import ShardScan
from shards.dataset import read_index, read_table, write_table
from shards.schema import DUPLICATES_SCHEMA, TABLES, ShardInfo, Snapshot, SourceBuild, TableInfo
from shards.stores.store import Store

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """One source of one of the datasets that are joined.

    Attributes:
        store: the dataset.
        snapshot: its state.
        build: the source in it.
        source: its name in the result.
        is_new: whether it comes into the destination; else it is there.
    """

    store: Store
    snapshot: Snapshot
    build: SourceBuild
    source: str
    is_new: bool

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.store}:{self.build.modality}/{self.build.source}"

    @cached_property
    def shards(self) -> list[ShardInfo]:
        """Of the source, by path."""
        own = (self.build.modality, self.build.source)
        return [shard for shard in self.snapshot.shards if (shard.modality, shard.source) == own]

    @property
    def content(self) -> list[tuple[int, int, int]]:
        """Says whether two parts hold the same samples in the same shards."""
        return [(shard.num_samples, shard.crc32c, shard.index_crc32c) for shard in self.shards]

    def path_of(self, shard: ShardInfo) -> str:
        """Path of a shard in the result."""
        number = shard.path.removesuffix(".tar").rsplit("-", 1)[1]
        return f"{shard.modality}/{self.source}-{number}.tar"

    def read_rows(self, name: str) -> pa.Table:
        """The rows of the source in a table of its dataset, under its new name."""
        table = read_table(self.store, self.snapshot, name)
        own = pc.and_(
            pc.equal(table["modality"], self.build.modality), pc.equal(table["source"], self.build.source)
        )
        table = table.filter(own)
        renamed = pa.array([self.source] * table.num_rows, pa.string())
        table = table.set_column(
            table.schema.get_field_index("source"), TABLES[name].field("source"), renamed
        )
        if name == "duplicates":
            paths = {shard.path: self.path_of(shard) for shard in self.shards}
            column = pa.array([paths.get(path) for path in table["shard"].to_pylist()], pa.string())
            table = table.set_column(table.schema.get_field_index("shard"), "shard", column)
        return table.cast(TABLES[name])


def find_repeated_pixels(parts: Sequence[Part], scans: Sequence[ShardScan]) -> pa.Table:
    """Find samples that repeat the pixels of an earlier one and that no dataset excludes yet.

    Args:
        parts: in order; of equal samples the first one stays.
        scans: of their shards, part by part.

    Returns:
        Rows for the table of duplicates, in the names of the result.
    """
    shards = [(part, shard) for part in parts for shard in part.shards]
    starts = np.cumsum([0, *(shard.num_samples for _, shard in shards)])
    pixels = np.concatenate([np.zeros((0, 2), np.uint64), *(scan.pixels for scan in scans)])
    is_kept = np.ones(len(pixels), bool)
    places = {(id(part), shard.path): start for (part, shard), start in zip(shards, starts, strict=False)}
    for part in parts:
        skipped = read_table(part.store, part.snapshot, "duplicates").select(["shard", "row"])
        for path, row in zip(*(skipped[name].to_pylist() for name in ("shard", "row")), strict=True):
            if (id(part), path) in places:
                is_kept[places[id(part), path] + row] = False
    repeated, originals = _repeats(np.flatnonzero(is_kept), pixels)
    return _describe(shards, starts, repeated, originals)


def _repeats(kept: Numbers, pixels: npt.NDArray[np.uint64]) -> tuple[Numbers, Numbers]:
    """Which of the kept samples repeat the pixels of an earlier one, in order, and of which.

    Args:
        kept: (K,) samples in order.
        pixels: (samples, 2) hashes.
    """
    # one half of the hash leaves few candidates: sorting all by both halves takes five times as long
    halves = pixels[kept, 0]
    order = np.argsort(halves, kind="stable")
    is_same = halves[order[1:]] == halves[order[:-1]]
    is_candidate = np.append(is_same, False) | np.append(False, is_same)
    kept = np.sort(kept[order[is_candidate]])
    order = kept[np.lexsort((pixels[kept, 1], pixels[kept, 0]))]  # stable: of equals, the first comes first
    is_first = np.ones(len(order), bool)
    is_first[1:] = (pixels[order[1:]] != pixels[order[:-1]]).any(axis=1)
    originals = order[is_first][np.cumsum(is_first) - 1]
    by_place = np.argsort(order[~is_first])
    return order[~is_first][by_place], originals[~is_first][by_place]


def _describe(
    shards: Sequence[tuple[Part, ShardInfo]],
    starts: Numbers,
    repeated: Numbers,
    originals: Numbers,
) -> pa.Table:
    """Look the samples up in the indices of their shards."""
    wanted: dict[int, set[int]] = defaultdict(set)
    for number in np.concatenate([repeated, originals]).tolist():
        wanted[int(np.searchsorted(starts, number, side="right")) - 1].add(number)
    facts = {}
    for place, numbers in wanted.items():
        part, shard = shards[place]
        rows = [number - int(starts[place]) for number in sorted(numbers)]
        found = read_index(part.store, shard, ["key", "object", "unit"]).take(pa.array(rows)).to_pylist()
        for number, row, item in zip(sorted(numbers), rows, found, strict=True):
            path = part.path_of(shard)
            facts[number] = {**item, "row": row, "shard": path, "modality": shard.modality}
            facts[number] |= {"source": part.source, "kind": "pixels"}
    described = [
        {**facts[number], "duplicate_of": facts[original]["key"]}
        for number, original in zip(repeated.tolist(), originals.tolist(), strict=True)
    ]
    return pa.Table.from_pylist(described, schema=DUPLICATES_SCHEMA)


def merge_tables(target: Store, parts: Sequence[Part], repeated: pa.Table) -> dict[str, TableInfo]:
    """Write the tables of the result, source by source, each in the order of its objects.

    Raises:
        DataError: a table is missing or damaged.
        EnvironmentFault: a place cannot be reached or written.
    """
    infos = {}
    for name, schema in TABLES.items():
        tables = []
        for part in parts:
            table = part.read_rows(name)
            if name == "duplicates":
                table = pa.concat_tables([table, _rows_of(part, repeated)])
            tables.append(table.sort_by([("object", "ascending"), ("unit", "ascending")]))
        table = pa.concat_tables(tables).replace_schema_metadata(None)
        if name == "duplicates":
            table = _resolve(table, repeated)
        infos[name] = write_table(target, name, table.cast(schema).combine_chunks())
    return infos


def with_more_duplicates(part: Part, repeated: pa.Table) -> SourceBuild:
    """The accounting of a source after more of its samples were found to be duplicates."""
    counts, number = part.build.counts, _rows_of(part, repeated).num_rows
    changed = counts.model_copy(
        update={"samples": counts.samples - number, "duplicates": counts.duplicates + number}
    )
    return part.build.model_copy(update={"source": part.source, "counts": changed})


def _rows_of(part: Part, repeated: pa.Table) -> pa.Table:
    """The rows of a source, by its name in the result."""
    own = pc.and_(
        pc.equal(repeated["modality"], part.build.modality), pc.equal(repeated["source"], part.source)
    )
    return repeated.filter(own)


def _resolve(table: pa.Table, repeated: pa.Table) -> pa.Table:
    """Let what repeats the pixels of a sample that is itself left out now name the one that stays."""
    place = pc.index_in(table["duplicate_of"], value_set=repeated["key"].combine_chunks())
    place = pc.if_else(pc.equal(table["kind"], "pixels"), place, None)
    resolved = pc.coalesce(repeated["duplicate_of"].combine_chunks().take(place), table["duplicate_of"])
    field = DUPLICATES_SCHEMA.field("duplicate_of")
    return table.set_column(table.schema.get_field_index("duplicate_of"), field, resolved)
