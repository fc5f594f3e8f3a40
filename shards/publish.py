"""The last step of a build: pixel duplicates, the tables of the dataset, the accounting, the snapshot."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards.hf_tokens import HFParams
from shards.plan import Plan, Salt
from shards.schema import (
    DUPLICATES_SCHEMA,
    QUARANTINE_SCHEMA,
    Counts,
    ShardInfo,
    Snapshot,
    SourceBuild,
    read_index,
    read_table,
    write_snapshot,
    write_table,
)
from shards.support.errors import ConfigError, DataError
from shards.writer import ShardResult

_KEYS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("object", pa.int64(), nullable=False),
        pa.field("unit", pa.int32(), nullable=False),
        pa.field("path", pa.binary(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),  # why it is no sample, "" for a sample
    ]
)

Row = dict[str, Any]


@dataclass(frozen=True)
class BuildReport:
    """What became of a source.

    Attributes:
        snapshot: hash of the dataset's snapshot.
        counts: the accounting of this source.
        quarantined: units by reason.
        excluded: units by reason.
        num_shards: shards written for this source; an earlier build had committed `num_reused` of them.
        num_bytes: of these shards.
    """

    snapshot: str
    counts: Counts
    quarantined: dict[str, int]
    excluded: dict[str, int]
    num_shards: int
    num_reused: int
    num_bytes: int


@dataclass(frozen=True)
class SourceFacts:
    """What is being published."""

    modality: str
    source: str
    settings: Mapping[str, Any]
    hf: HFParams
    map_cell: int
    plan_digest: str

    def is_of(self, item: ShardInfo | SourceBuild) -> bool:
        """Whether a shard or a build is of this source."""
        return (item.modality, item.source) == (self.modality, self.source)


def check_extends(snapshot: Snapshot | None, facts: SourceFacts) -> bool:
    """Check that a source fits into a dataset; return whether it is in it already.

    Raises:
        ConfigError: the settings differ from the dataset's, or from those the source was built with.
        DataError: the source is not what it was when it was built.
    """
    if snapshot is None:
        return False
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
        return False
    changed = [name for name, value in facts.settings.items() if build.settings.get(name) != value]
    if changed:
        raise ConfigError(
            f"the dataset holds this source, built with another {', '.join(changed)}",
            where=where,
            fix="build under another source name, or into another destination",
        )
    if build.plan_digest != facts.plan_digest:
        raise DataError(
            "the dataset holds a source of this name, of other files or of another state folder",
            where=where,
            fix="build new files under another source name, and the old ones with their state folder",
        )
    return True


def publish(
    root: Path,
    private: Path,
    snapshot: Snapshot | None,
    facts: SourceFacts,
    plan: Plan,
    salt: Salt,
    results: Sequence[ShardResult],
    num_reused: int,
) -> BuildReport:
    """Write the tables, then the snapshot that makes them current.

    Args:
        root: the dataset.
        private: where the table of keys and files goes.
        snapshot: the dataset as it was, None when it is new.
        facts: what is published.
        plan: of the source.
        salt: of the state folder.
        results: of all shards of the plan, in order.
        num_reused: how many of them had been committed before.
    """
    shards = [result.info for result in results if result.info is not None]
    builds = list(snapshot.builds) if snapshot else []
    place = next((i for i, build in enumerate(builds) if facts.is_of(build)), len(builds))
    earlier = [
        shard
        for build in builds[:place]
        for shard in (snapshot.shards if snapshot else [])
        if (shard.modality, shard.source) == (build.modality, build.source)
    ]
    left_out = _list_left_out(plan, salt, facts, results)
    left_out += _find_pixel_duplicates(root, earlier, shards, facts)
    left_out.sort(key=lambda row: (row["object"], row["unit"]))
    status = Counter(row["status"] for row in left_out)
    counts = Counts(
        objects=plan.objects.num_rows,
        units=int(plan.objects["num_units"].to_numpy().sum()),
        samples=sum(shard.num_samples for shard in shards)
        - sum(row["status"] == "duplicate" and row["kind"] == "pixels" for row in left_out),
        quarantined=status["quarantined"],
        excluded=status["excluded"],
        duplicates=status["duplicate"],
    )
    assert counts.is_closed, counts

    bad = [row for row in left_out if row["status"] != "duplicate"]
    duplicates = [row for row in left_out if row["status"] == "duplicate"]
    _write_rows(root / "quarantine.parquet", QUARANTINE_SCHEMA, bad, facts, builds)
    _write_rows(root / "duplicates.parquet", DUPLICATES_SCHEMA, duplicates, facts, builds)
    _write_keys(private, plan, salt, facts, left_out)
    build = SourceBuild(
        modality=facts.modality,
        source=facts.source,
        counts=counts,
        plan_digest=facts.plan_digest,
        settings=dict(facts.settings),
    )
    builds[place : place + 1] = [build]
    others = [shard for shard in snapshot.shards if not facts.is_of(shard)] if snapshot else []
    return BuildReport(
        snapshot=write_snapshot(root, _make_snapshot(snapshot, facts, builds, [*others, *shards])),
        counts=counts,
        quarantined=_count_reasons(bad, "quarantined"),
        excluded=_count_reasons(bad, "excluded"),
        num_shards=len(results),
        num_reused=num_reused,
        num_bytes=sum(shard.num_bytes for shard in shards),
    )


def _list_left_out(plan: Plan, salt: Salt, facts: SourceFacts, results: Sequence[ShardResult]) -> list[Row]:
    """A row for each unit that is in no shard."""
    rows: list[Row] = []
    names = plan.objects["name"]
    for number, item in plan.left_out():
        for unit in range(item["num_units"]):
            key = salt.key(facts.modality, facts.source, item["name"], unit)
            row = {"key": key, "object": number, "unit": unit, **_named(facts)}
            row |= {"status": item["status"], "reason": item["reason"]}
            if item["status"] == "duplicate":
                first = names[item["duplicate_of"]].as_py()
                row["duplicate_of"] = salt.key(facts.modality, facts.source, first, unit)
                row["kind"] = "bytes"
            rows.append(row)
    for result in results:
        for bad in result.bad:
            known = {"key": bad.key, "object": bad.object, "unit": bad.unit, **_named(facts)}
            rows.append({**known, "status": "quarantined", "reason": bad.reason})
    return rows


def _find_pixel_duplicates(
    root: Path, earlier: Sequence[ShardInfo], shards: Sequence[ShardInfo], facts: SourceFacts
) -> list[Row]:
    """A row for each sample of `shards` that repeats the pixels of one before it or of an earlier source."""
    columns = ["key", "pixel_hash", "object", "unit"]
    tables = [read_index(root, shard, columns) for shard in (*earlier, *shards)]
    if not tables:
        return []
    table = pa.concat_tables(table.replace_schema_metadata(None) for table in tables)
    hashes = table["pixel_hash"].to_numpy().astype("S32")
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    original = first[group]
    num_earlier = sum(shard.num_samples for shard in earlier)
    repeated = np.flatnonzero(original != np.arange(len(original)))
    rows = []
    for number in repeated[repeated >= num_earlier]:
        item = table.slice(int(number), 1).to_pylist()[0]
        same = {"duplicate_of": table["key"][int(original[number])].as_py(), "kind": "pixels"}
        known = {"key": item["key"], "object": item["object"], "unit": item["unit"], **_named(facts)}
        rows.append({**known, **same, "status": "duplicate", "reason": "same_pixels"})
    return rows


def _named(facts: SourceFacts) -> dict[str, str]:
    return {"modality": facts.modality, "source": facts.source}


def _write_rows(
    path: Path, schema: pa.Schema, rows: Sequence[Row], facts: SourceFacts, builds: Sequence[SourceBuild]
) -> None:
    """Replace the rows of this source in a table of the dataset; keep those of the other published sources.

    The rows are in the order in which the sources were added, so that equal histories give equal bytes.
    """
    kept = read_table(path, schema).to_pylist() if path.exists() else []
    by_source: dict[tuple[str, str], list[Row]] = {(item.modality, item.source): [] for item in builds}
    for row in kept:
        if (row["modality"], row["source"]) in by_source:
            by_source[row["modality"], row["source"]].append(row)
    by_source[facts.modality, facts.source] = [{name: row[name] for name in schema.names} for row in rows]
    merged = [row for group in by_source.values() for row in group]
    write_table(path, pa.Table.from_pylist(merged, schema=schema))


def _write_keys(path: Path, plan: Plan, salt: Salt, facts: SourceFacts, left_out: Sequence[Row]) -> None:
    """Write the private table that says which key is which file."""
    reasons = {row["key"]: row["reason"] for row in left_out}
    rows = []
    for number, item in enumerate(plan.objects.select(["name", "path", "num_units"]).to_pylist()):
        for unit in range(item["num_units"]):
            key = salt.key(facts.modality, facts.source, item["name"], unit)
            row = {"key": key, "object": number, "unit": unit, "path": item["path"]}
            rows.append(row | {"reason": reasons.get(key, "")})
    write_table(path, pa.Table.from_pylist(rows, schema=_KEYS_SCHEMA), mode=0o600)


def _make_snapshot(
    before: Snapshot | None, facts: SourceFacts, builds: list[SourceBuild], shards: Sequence[ShardInfo]
) -> Snapshot:
    hf = {**(before.hf if before else {}), facts.modality: facts.hf.model_dump(mode="json")}
    digests = {**(before.hf_digests if before else {}), facts.modality: facts.hf.digest()}
    return Snapshot(
        created_by=f"frepa {importlib.metadata.version('frepa')}",
        modalities=sorted({build.modality for build in builds}),
        shards=sorted(shards, key=lambda shard: shard.path),
        hf=hf,
        hf_digests=digests,
        size=facts.settings["size"],
        patch_size=facts.settings["patch_size"],
        map_cell=facts.map_cell,
        counts=sum((build.counts for build in builds), Counts()),
        builds=builds,
    )


def _count_reasons(rows: Sequence[Row], status: str) -> dict[str, int]:
    return dict(Counter(row["reason"] for row in rows if row["status"] == status).most_common())
