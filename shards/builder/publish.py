"""The last step of a build: the tables of the dataset, the accounting, the snapshot."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.builder.accounting import PartFacts, Tables, account, count_rows
from shards.builder.plan import Plan, units_of
from shards.dataset import write_snapshot, write_table
from shards.hf.tokens import HFParams
from shards.schema import Counts, ShardInfo, Snapshot, SourceBuild, TableInfo
from shards.stores.atomic import replace_file
from shards.stores.store import Store
from shards.support.errors import ConfigError, DataError

KEYS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("object", pa.int64(), nullable=False),
        pa.field("unit", pa.int32(), nullable=False),
        pa.field("uri", pa.large_binary(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),  # why it is no sample, "" for a sample
    ]
)

_KEY_ROWS = 1 << 18


@dataclass(frozen=True)
class SourceFacts:
    """What is being published, whatever part of it.

    Attributes:
        modality: of the source.
        source: its name.
        settings: those that determine the bytes.
        hf: the HF version of its shards.
        map_cell: of its response maps.
    """

    modality: str
    source: str
    settings: Mapping[str, Any]
    hf: HFParams
    map_cell: int

    def is_of(self, item: ShardInfo | SourceBuild) -> bool:
        """Whether a shard or a build is of this source."""
        return (item.modality, item.source) == (self.modality, self.source)


def check_extends(snapshot: Snapshot | None, facts: SourceFacts) -> SourceBuild | None:
    """Check that a source fits into a dataset; return how it came into it, None where it is new.

    Raises:
        ConfigError: the settings differ from the dataset's, or from those the source was built with.
    """
    if snapshot is None:
        return None
    where = f"{facts.modality}/{facts.source}"
    for name, known in (
        ("size", snapshot.size),
        ("patch_size", snapshot.patch_size),
        ("hf", snapshot.hf.get(facts.modality, facts.settings["hf"])),
    ):
        if facts.settings[name] != known:
            fix = "build with the dataset's value, or into another destination"
            raise ConfigError(
                f"{name} is {facts.settings[name]}, the dataset's is {known}", where=where, fix=fix
            )
    build = next((item for item in snapshot.builds if facts.is_of(item)), None)
    if build is None:
        return None
    changed = [name for name, value in facts.settings.items() if build.settings.get(name) != value]
    if changed:
        raise ConfigError(
            f"the dataset holds this source, built with another {', '.join(changed)}",
            where=where,
            fix="build under another source name, or into another destination",
        )
    return build


def check_same_plan(build: SourceBuild, digests: Sequence[str]) -> None:
    """Check that the parts that a dataset holds are those of the state folder.

    Raises:
        DataError: they are not.
    """
    if list(digests[: len(build.plan_digests)]) != build.plan_digests:
        raise DataError(
            "the dataset holds a source of this name, built with another state folder",
            where=f"{build.modality}/{build.source}",
            fix="build with the state folder it was built with, or under another source name",
        )


def publish_part(
    store: Store,
    before: Snapshot | None,
    source: SourceFacts,
    part: PartFacts,
    digests: Sequence[str],
    keys: Path,
) -> tuple[Snapshot, Tables]:
    """Write the tables, then the snapshot that makes a part of a source current.

    Args:
        store: the dataset.
        before: its current snapshot, None when it is new.
        source: what is published.
        part: the part, and what became of its units.
        digests: of the parts up to this one.
        keys: private file for the part's table of keys.
    """
    builds = list(before.builds) if before else []
    place = next((i for i, build in enumerate(builds) if source.is_of(build)), len(builds))
    new = SourceBuild(
        modality=source.modality,
        source=source.source,
        counts=Counts(),
        plan_digests=list(digests),
        settings=dict(source.settings),
    )
    builds[place : place + 1] = [new]
    names = [(build.modality, build.source) for build in builds]
    order = {name: number for number, name in enumerate(names)}
    shards = list(before.shards) if before else []
    shards += [result.info for result in part.results if result.info is not None]
    shards.sort(key=lambda shard: (order[shard.modality, shard.source], shard.path))
    tables = account(store, before, part, shards, names)
    builds = _count(builds, place, shards, tables, part.parts)
    written = {
        "quarantine": write_table(store, "quarantine", tables.quarantine),
        "duplicates": write_table(store, "duplicates", tables.duplicates),
    }
    write_keys(keys, part, tables)
    snapshot = _make_snapshot(before, source, builds, shards, written)
    write_snapshot(store, snapshot, before)
    return snapshot, tables


def _count(
    builds: Sequence[SourceBuild],
    place: int,
    shards: Sequence[ShardInfo],
    tables: Tables,
    parts: Sequence[Plan],
) -> list[SourceBuild]:
    """The accounting of every source: one that grew may have changed what repeats what in the others."""
    is_quarantined = pc.equal(tables.quarantine["status"], "quarantined")
    quarantined = count_rows(tables.quarantine.filter(is_quarantined), builds)
    excluded = count_rows(tables.quarantine.filter(pc.invert(is_quarantined)), builds)
    duplicates = count_rows(tables.duplicates, builds)
    in_shards = count_rows(tables.duplicates.filter(pc.is_valid(tables.duplicates["shard"])), builds)
    objects, units = count_objects(parts)
    counted = []
    for number, build in enumerate(builds):
        stored = sum(
            shard.num_samples
            for shard in shards
            if (shard.modality, shard.source) == (build.modality, build.source)
        )
        counts = Counts(
            objects=objects if number == place else build.counts.objects,
            units=units if number == place else build.counts.units,
            samples=stored - in_shards[number],
            quarantined=quarantined[number],
            excluded=excluded[number],
            duplicates=duplicates[number],
        )
        assert counts.is_closed, counts
        counted.append(build.model_copy(update={"counts": counts}))
    return counted


def count_objects(parts: Sequence[Plan]) -> tuple[int, int]:
    """Objects and units of a source; of an object that was tried again, the last row counts."""
    num_objects = 1 + max(int(pc.max(part.objects["object"]).as_py()) for part in parts)
    units = np.zeros(num_objects, np.int64)
    for part in parts:
        units[part.objects["object"].to_numpy()] = part.objects["num_units"].to_numpy()
    return num_objects, int(units.sum())


def write_keys(path: Path, part: PartFacts, tables: Tables) -> None:
    """Write the private table that says which key is which unit of which object of a part."""
    reasons = _reasons(part, tables)
    objects = part.part.objects
    with (
        replace_file(path, mode=0o600) as file,
        pq.ParquetWriter(file, KEYS_SCHEMA, compression="zstd") as out,
    ):
        for start in range(0, objects.num_rows, _KEY_ROWS):
            rows = objects.slice(start, _KEY_ROWS)
            places, units = units_of(rows)
            keys = pa.array(part.keys(rows, places, units), pa.string())
            found = pc.index_in(keys, value_set=reasons["key"].combine_chunks())
            columns = {
                "key": keys,
                "object": rows["object"].to_numpy()[places],
                "unit": units,
                "uri": rows["uri"].take(pa.array(places)),
                "reason": pc.fill_null(reasons["reason"].take(found), ""),
            }
            out.write_table(pa.table(columns, schema=KEYS_SCHEMA))


def _reasons(part: PartFacts, tables: Tables) -> pa.Table:
    """Keys of units that are no samples, and why."""
    duplicates = tables.duplicates
    names = {"bytes": "same_bytes", "pixels": "same_pixels", "superseded": "superseded"}
    kinds = pa.array(list(names))
    why = pa.array(list(names.values())).take(
        pc.index_in(duplicates["kind"].combine_chunks(), value_set=kinds)
    )
    return pa.concat_tables(
        [
            tables.quarantine.select(["key", "reason"]).cast(
                pa.schema({"key": "string", "reason": "string"})
            ),
            pa.table({"key": duplicates["key"], "reason": why}),
        ],
        promote_options="permissive",
    )


def _make_snapshot(
    before: Snapshot | None,
    source: SourceFacts,
    builds: list[SourceBuild],
    shards: Sequence[ShardInfo],
    tables: dict[str, TableInfo],
) -> Snapshot:
    hf = {**(before.hf if before else {}), source.modality: source.hf.model_dump(mode="json")}
    digests = {**(before.hf_digests if before else {}), source.modality: source.hf.digest()}
    return Snapshot(
        created_by=f"frepa {importlib.metadata.version('frepa')}",
        modalities=sorted({build.modality for build in builds}),
        shards=sorted(shards, key=lambda shard: shard.path),
        hf=hf,
        hf_digests=digests,
        hf_versions=before.hf_versions if before else {},
        size=source.settings["size"],
        patch_size=source.settings["patch_size"],
        map_cell=source.map_cell,
        counts=sum((build.counts for build in builds), Counts()),
        builds=builds,
        tables=tables,
    )
