"""One shard: from planned objects to a tar and its index. Runs in a worker; idempotent, same bytes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

from shards.builder.objects import PlannedObject, open_planned, read_ahead, reading_object
from shards.builder.samples import SampleSpec, make_sample
from shards.builder.series import VolumeWindows
from shards.builder.tar import append_members, finish_tar
from shards.dataset import encode_table, file_crc32c
from shards.formats.common import RULES, Decoded, Opened, Unreadable
from shards.schema import INDEX_SCHEMA, ShardInfo, canonical_json, index_path
from shards.stores.blobs import Blob
from shards.stores.store import MissingFile, Store
from shards.support.errors import DataError, EnvironmentFault


@dataclass(frozen=True)
class ShardTask:
    """All a worker needs to write one shard.

    Attributes:
        store: the destination.
        path: of the tar.
        spec: how units become samples.
        plan_digest: of the part of the plan that the shard belongs to.
        objects: with the units to be written, in order.
        series: all objects of each volume that has several and lies in the shard.
        roots: local folders that the sources lie in.
        expected: what a dataset says the shard is: another one must not take its place.
    """

    store: Store
    path: str
    spec: SampleSpec
    plan_digest: str
    objects: Sequence[PlannedObject]
    series: Mapping[str, Sequence[PlannedObject]] = field(default_factory=dict)
    roots: Sequence[str] = ()
    expected: ShardInfo | None = None

    @property
    def num_units(self) -> int:
        """Units to be written."""
        return sum(len(item.units) for item in self.objects)


@dataclass(frozen=True)
class BadUnit:
    """A unit that became no sample."""

    key: str
    object: int
    unit: int
    reason: str

    @property
    def status(self) -> str:
        """Whether something is wrong with it, or a rule excludes it."""
        return "excluded" if self.reason in RULES else "quarantined"


@dataclass(frozen=True)
class ShardResult:
    """A committed shard; `info` is None when none of its units became a sample."""

    info: ShardInfo | None
    bad: Sequence[BadUnit]


@dataclass(frozen=True)
class WrittenShard:
    """A shard that was just written."""

    path: str
    num_units: int
    result: ShardResult


def write_shard(task: ShardTask) -> WrittenShard:
    """Write tar, then index: the index commits both.

    Raises:
        DataError: the shard is in a dataset, and its objects are not what they were.
        EnvironmentFault: the destination cannot be written, or a source cannot be reached.
    """
    rows: list[dict[str, Any]] = []
    bad: list[BadUnit] = []
    store = task.store
    with warnings.catch_warnings(), store.writing(task.path) as file:
        warnings.simplefilter("ignore")  # decoders' remarks on odd files; what matters becomes a reason
        for item, unit, key, made in _make_samples(task):
            if isinstance(made, Unreadable):
                bad.append(BadUnit(key, item.number, unit, made.reason))
            else:
                members, row = made
                rows.append({"key": key, **row, **append_members(file, key, members)})
        num_bytes = finish_tar(file)
        file.flush()
        crc32c = file_crc32c(file)
        index = _encode_index(task, rows, bad, num_bytes, crc32c)
        _check_expected(task, crc32c, index)
    store.write(index_path(task.path), index)
    result = read_committed(store, task.path, task.plan_digest, task.num_units)
    if result is None:
        raise EnvironmentFault(
            "the shard changed while it was written", where=store.where(task.path), fix="build again"
        )
    return WrittenShard(task.path, task.num_units, result)


def _encode_index(
    task: ShardTask, rows: list[dict[str, Any]], bad: Sequence[BadUnit], num_bytes: int, crc32c: int
) -> bytes:
    facts = {
        "plan": task.plan_digest,
        "num_bytes": num_bytes,
        "crc32c": crc32c,
        "bad": [[item.key, item.object, item.unit, item.reason] for item in bad],
    }
    table = pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)
    return encode_table(table.replace_schema_metadata({b"frepa": canonical_json(facts)}))


def _check_expected(task: ShardTask, crc32c: int, index: bytes) -> None:
    expected = task.expected
    if expected is not None and (expected.crc32c, expected.index_crc32c) != (
        crc32c,
        google_crc32c.value(index),
    ):
        raise DataError(
            "the shard is damaged and cannot be built again: its objects are not what they were",
            where=task.store.where(task.path),
            fix="restore the file from a copy, or the objects; or build into another destination",
        )


def read_committed(
    store: Store, path: str, plan_digest: str, num_units: int, num_bytes: int | None = None
) -> ShardResult | None:
    """What was committed of a shard; None when nothing was, or by another plan.

    Args:
        store: the destination.
        path: of the tar.
        plan_digest: of the part of the plan that the shard belongs to.
        num_units: planned for it.
        num_bytes: of the tar, where that is known already.
    """
    try:
        data = store.read(index_path(path))
        table = pq.read_table(pa.BufferReader(data), columns=["key"])
        facts = json.loads((table.schema.metadata or {}).get(b"frepa", b"{}"))
    except (MissingFile, OSError, ValueError, pa.ArrowException):  # Arrow has no list of what damage raises
        return None
    num_bytes = store.num_bytes(path) if num_bytes is None else num_bytes
    if facts.get("plan") != plan_digest or facts.get("num_bytes") != num_bytes:
        return None
    bad = [BadUnit(*item) for item in facts["bad"]]
    assert table.num_rows + len(bad) == num_units, "a committed shard accounts for each of its units"
    if table.num_rows == 0:
        return ShardResult(None, bad)
    info = ShardInfo(
        path=path,
        modality=path.split("/")[0],
        source=path.split("/")[1].rsplit("-", 1)[0],
        num_samples=table.num_rows,
        num_bytes=facts["num_bytes"],
        crc32c=facts["crc32c"],
        index_crc32c=google_crc32c.value(data),
    )
    return ShardResult(info, bad)


Made = tuple[Any, dict[str, Any]] | Unreadable


def _make_samples(task: ShardTask) -> Iterator[tuple[PlannedObject, int, str, Made]]:
    """Every unit of a shard with its sample, or the reason why it is none; one object is open at a time."""
    spec = task.spec
    windows = VolumeWindows(task.series, spec.intensity, spec.read, task.roots)
    for item, fetched in read_ahead(task.objects, windows.will_hold):
        windows.prepare(item)
        with ExitStack() as stack:
            blob: Blob | None = None
            opened: Opened | None = None
            fault: Unreadable | None = None
            if not windows.holds(item):
                try:
                    blob, opened = stack.enter_context(open_planned(item, spec.read, task.roots, fetched))
                except Unreadable as error:
                    fault = error
            for unit, key in item.units:
                if fault is not None:
                    yield item, unit, key, fault
                    continue
                try:
                    decoded = windows.take(item, unit) or _decode(item, unit, opened, task)
                    window = windows.window(item, opened, decoded)
                    with reading_object(item.uri, task.roots):  # a JPEG file is read once more, as it is
                        made: Made = make_sample(decoded, window, blob, item, unit, spec)
                except Unreadable as error:
                    made = error
                yield item, unit, key, made


def _decode(item: PlannedObject, unit: int, opened: Opened | None, task: ShardTask) -> Decoded:
    assert opened is not None
    with reading_object(item.uri, task.roots):
        return opened.decode(unit)
