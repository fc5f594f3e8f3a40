"""The tables of a dataset, as a part of a source's plan changes them: what is no sample, and why.

Rows are Arrow columns throughout: a dataset may have millions of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shards.builder.plan import Plan, keys_of, units_of
from shards.builder.repeats import SampleNumbers, find_repeats
from shards.builder.state import Salt
from shards.builder.writer import ShardResult
from shards.dataset import read_index, read_table
from shards.schema import DUPLICATES_SCHEMA, QUARANTINE_SCHEMA, ShardInfo, Snapshot, SourceBuild
from shards.stores.store import Store

Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Tables:
    """The tables of a dataset, sorted: sources in the order in which they came, then object and unit."""

    quarantine: pa.Table
    duplicates: pa.Table


@dataclass(frozen=True)
class PartFacts:
    """The part of a plan that is being published.

    Attributes:
        modality: of the source.
        source: its name.
        salt: of the state folder.
        parts: of the plan up to this one, which is the last.
        results: of all shards of this part.
    """

    modality: str
    source: str
    salt: Salt
    parts: Sequence[Plan]
    results: Sequence[ShardResult]

    @property
    def part(self) -> Plan:
        """The part itself."""
        return self.parts[-1]

    def keys(self, rows: pa.Table, places: Any, units: Any) -> list[str]:
        """Keys of units of some rows."""
        return keys_of(rows, places, units, self.salt, self.modality, self.source)


def account(
    store: Store,
    before: Snapshot | None,
    facts: PartFacts,
    shards: Sequence[ShardInfo],
    builds: Sequence[tuple[str, str]],
) -> Tables:
    """Make the tables of a dataset to which a part has come.

    Args:
        store: the dataset.
        before: its snapshot before the part.
        facts: the part.
        shards: of the dataset with the part, the oldest source first.
        builds: modality and source of all sources, in the order in which they came.
    """
    quarantine = read_table(store, before, "quarantine") if before else QUARANTINE_SCHEMA.empty_table()
    duplicates = read_table(store, before, "duplicates") if before else DUPLICATES_SCHEMA.empty_table()
    quarantine, duplicates = _drop_retried(facts, quarantine, duplicates)
    quarantine, duplicates, released = _supersede(store, facts, shards, quarantine, duplicates)
    planned_out, planned_duplicates = _left_out_by_plan(facts)
    quarantine = pa.concat_tables([quarantine, planned_out, _bad_units(facts)])
    duplicates = pa.concat_tables([duplicates, planned_duplicates])

    numbers = SampleNumbers(shards)
    in_shard = duplicates.filter(pc.is_valid(duplicates["shard"]))
    fresh = {result.info.path for result in facts.results if result.info is not None}
    candidates = [
        np.arange(numbers.starts[place], numbers.starts[place + 1])
        for place, shard in enumerate(shards)
        if shard.path in fresh
    ]
    candidates.append(_sample_numbers(numbers, released))
    repeats = _repeat_rows(store, numbers, _sample_numbers(numbers, in_shard), np.concatenate(candidates))
    return Tables(_sort(quarantine, builds), _sort(pa.concat_tables([duplicates, repeats]), builds))


def count_rows(table: pa.Table, builds: Sequence[SourceBuild | tuple[str, str]]) -> list[int]:
    """Rows of each source."""
    names = [(item.modality, item.source) if isinstance(item, SourceBuild) else item for item in builds]
    return [int(number) for number in np.bincount(_build_of(table, names), minlength=len(names))]


def _drop_retried(facts: PartFacts, quarantine: pa.Table, duplicates: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Without the rows of units that were tried again: what became of them now will be told anew."""
    rows = facts.part.objects.filter(facts.part.objects["is_retry"])
    places, units = units_of(rows)
    tried = _pairs(rows["object"].to_numpy()[places], units)

    def is_kept(table: pa.Table) -> pa.Array:
        pairs = _pairs(table["object"].to_numpy(), table["unit"].to_numpy())
        return pa.array(~(_is_mine(table, facts) & np.isin(pairs, tried)))

    not_in_shard = duplicates.filter(is_kept(duplicates))
    return quarantine.filter(is_kept(quarantine)), not_in_shard


def _supersede(
    store: Store, facts: PartFacts, shards: Sequence[ShardInfo], quarantine: pa.Table, duplicates: pa.Table
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Replace every row and sample of objects that have changed by a row of kind "superseded".

    Returns:
        The tables, and the rows of samples that repeated a superseded one: they count again.
    """
    rows = facts.part.objects
    rows = rows.filter(pc.greater_equal(rows["supersedes"], 0))
    old = rows["supersedes"].to_numpy()
    if not len(old):
        return quarantine, duplicates, duplicates.slice(0, 0)

    def is_old(table: pa.Table) -> Bool:
        return _is_mine(table, facts) & np.isin(table["object"].to_numpy(), old)

    is_out = is_old(quarantine)
    is_pixels = np.asarray(pc.equal(duplicates["kind"], "pixels").to_numpy(), bool)
    is_repeat = is_old(duplicates) & is_pixels
    moved = [
        quarantine.filter(pa.array(is_out)).select(["key", "object", "unit"]),
        duplicates.filter(pa.array(is_repeat)).select(["key", "object", "unit", "shard", "row"]),
        _samples_of(store, facts, shards, old),
    ]
    stale = pa.concat_tables(moved, promote_options="default")
    _, first = np.unique(
        _pairs(stale["object"].to_numpy(), stale["unit"].to_numpy())[::-1], return_index=True
    )
    stale = stale.take(pa.array(np.sort(stale.num_rows - 1 - first)))  # a repeated sample is there twice
    order = np.argsort(old)
    place = order[np.searchsorted(old[order], stale["object"].to_numpy())]
    units = np.minimum(stale["unit"].to_numpy(), rows["num_units"].to_numpy()[place] - 1)
    columns = {
        **{name: stale[name] for name in ("key", "object", "unit", "shard", "row")},
        "duplicate_of": facts.keys(rows, place, units),
        **_constant(facts, stale.num_rows, kind="superseded"),
    }
    gone = pa.table(columns, schema=DUPLICATES_SCHEMA)
    kept = duplicates.filter(pa.array(~is_repeat))
    is_released = pc.and_(
        pc.equal(kept["kind"], "pixels"), pc.is_in(kept["duplicate_of"], gone["key"].combine_chunks())
    )
    released = kept.filter(is_released)
    kept = pa.concat_tables([kept.filter(pc.invert(is_released)), gone])
    return quarantine.filter(pa.array(~is_out)), kept, released


def _samples_of(store: Store, facts: PartFacts, shards: Sequence[ShardInfo], objects: Int) -> pa.Table:
    """Samples of some objects in the shards of earlier parts: key, object, unit, shard, row."""
    numbers = {number for part in facts.parts[:-1] for number in part.shards_of(objects)}
    paths = {f"{facts.modality}/{facts.source}-{number:06d}.tar" for number in numbers}
    schema = pa.schema([DUPLICATES_SCHEMA.field(name) for name in ("key", "object", "unit", "shard", "row")])
    tables = [schema.empty_table()]
    for shard in shards:
        if shard.path in paths:
            index = read_index(store, shard, ["key", "object", "unit"]).replace_schema_metadata(None)
            rows = np.flatnonzero(np.isin(index["object"].to_numpy(), objects))
            found = index.take(pa.array(rows))
            columns = {name: found[name] for name in ("key", "object", "unit")}
            columns |= {"shard": [shard.path] * len(rows), "row": rows.astype(np.int32)}
            tables.append(pa.table(columns, schema=schema))
    return pa.concat_tables(tables)


def _left_out_by_plan(facts: PartFacts) -> tuple[pa.Table, pa.Table]:
    """Rows for the units that the plan put into no shard: quarantine, duplicates."""
    objects = facts.part.objects
    out = objects.filter(pc.is_in(objects["status"], pa.array(["quarantined", "excluded"])))
    places, units = units_of(out)
    columns = {
        "key": facts.keys(out, places, units),
        "object": out["object"].to_numpy()[places],
        "unit": units,
        "status": out["status"].take(pa.array(places)),
        "reason": out["reason"].take(pa.array(places)),
        **_constant(facts, len(units)),
    }
    quarantine = pa.table(columns, schema=QUARANTINE_SCHEMA)

    again = objects.filter(pc.equal(objects["status"], "duplicate"))
    places, units = units_of(again)
    known = pa.concat_tables(
        part.objects.select(["object", "name", "revision", "is_retry"]) for part in facts.parts
    )
    known = known.filter(pc.invert(known["is_retry"]))  # one row for each object
    order = np.argsort(known["object"].to_numpy())
    originals = known.take(pa.array(order[again["duplicate_of"].to_numpy()]))
    columns = {
        "key": facts.keys(again, places, units),
        "duplicate_of": facts.keys(originals, places, units),
        "object": again["object"].to_numpy()[places],
        "unit": units,
        "shard": pa.nulls(len(units), pa.string()),
        "row": pa.nulls(len(units), pa.int32()),
        **_constant(facts, len(units), kind="bytes"),
    }
    return quarantine, pa.table(columns, schema=DUPLICATES_SCHEMA)


def _bad_units(facts: PartFacts) -> pa.Table:
    bad = [item for result in facts.results for item in result.bad]
    columns = {
        "key": [item.key for item in bad],
        "object": [item.object for item in bad],
        "unit": [item.unit for item in bad],
        "status": [item.status for item in bad],
        "reason": [item.reason for item in bad],
        **_constant(facts, len(bad)),
    }
    return pa.table(columns, schema=QUARANTINE_SCHEMA)


def _repeat_rows(store: Store, numbers: SampleNumbers, excluded: Int, candidates: Int) -> pa.Table:
    repeats = find_repeats(store, numbers, excluded, candidates)
    of_path = {shard.path: shard for shard in numbers.shards}
    columns = {
        "key": repeats.key,
        "duplicate_of": repeats.original_key,
        "kind": ["pixels"] * len(repeats.key),
        "modality": [of_path[path].modality for path in repeats.shard],
        "source": [of_path[path].source for path in repeats.shard],
        "object": repeats.object,
        "unit": repeats.unit,
        "shard": repeats.shard,
        "row": repeats.row.astype(np.int32),
    }
    return pa.table(columns, schema=DUPLICATES_SCHEMA)


def _sample_numbers(numbers: SampleNumbers, rows: pa.Table) -> Int:
    found = numbers.number(rows["shard"].to_pylist(), rows["row"].to_numpy().astype(np.int64))
    return found[found >= 0]


def _constant(facts: PartFacts, num_rows: int, **more: str) -> Mapping[str, Any]:
    values = {"modality": facts.modality, "source": facts.source, **more}
    return {name: pa.repeat(pa.scalar(value), num_rows) for name, value in values.items()}


def _is_mine(table: pa.Table, facts: PartFacts) -> Bool:
    mine = pc.and_(pc.equal(table["modality"], facts.modality), pc.equal(table["source"], facts.source))
    return np.asarray(mine.to_numpy(), bool)


def _pairs(objects: npt.NDArray[Any], units: npt.NDArray[Any]) -> Int:
    """One number for an object and a unit."""
    return (objects.astype(np.int64) << 31) | units.astype(np.int64)


def _build_of(table: pa.Table, builds: Sequence[tuple[str, str]]) -> Int:
    names = pc.binary_join_element_wise(table["modality"], table["source"], "/")
    found = pc.index_in(names, value_set=pa.array(["/".join(build) for build in builds], pa.string()))
    return np.asarray(found.to_numpy().astype(np.int64))


def _sort(table: pa.Table, builds: Sequence[tuple[str, str]]) -> pa.Table:
    keys = (table["unit"].to_numpy(), table["object"].to_numpy(), _build_of(table, builds))
    return table.take(pa.array(np.lexsort(keys))).combine_chunks()
