"""What is new of a source since it was last planned, as a further part of its plan.

Everything is done on columns: a source of 17 million objects is compared with its plan in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shards.builder.arrange import arrange_rows, number_slices, resolve_duplicates
from shards.builder.columns import Bool, Int, equal, equal_to, places_among, replace_columns, take_or_null
from shards.builder.objects import UNKNOWN_IDENTITY
from shards.builder.plan import PLAN_SCHEMA, Plan
from shards.builder.state import Salt

Scan = Callable[[pa.Table], pa.Table]
"""From rows of `OBJECTS_SCHEMA` to `SCAN_SCHEMA`."""


@dataclass(frozen=True)
class PlanContext:
    """What a plan depends on besides the objects.

    Attributes:
        scan: looks at objects.
        salt: of the state folder.
        modality: of the source.
        source: its name.
        splits: objects of another split are excluded by rule; empty for all.
        shard_bytes: about how large a shard becomes.
    """

    scan: Scan
    salt: Salt
    modality: str
    source: str
    splits: Sequence[str]
    shard_bytes: int


@dataclass(frozen=True)
class Outcomes:
    """What became of planned units that are no samples, as far as a plan that goes on must know.

    Attributes:
        retry: whether what is quarantined is tried again.
        quarantined: units that were to be samples and are quarantined, by object.
        lost: objects that could not be read as planned: their byte duplicates must step in.
    """

    retry: bool = False
    quarantined: Mapping[int, Sequence[int]] = field(default_factory=dict)
    lost: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Growth:
    """A comparison of the objects of a source with its plan.

    Attributes:
        part: what must be added, None where there is nothing.
        num_new: objects of new names.
        num_known: objects that are as they were.
        num_changed: objects of known names and other content.
        num_vanished: planned objects that are there no more.
        num_relabeled: known objects whose labels or patient are others now.
        current: rows of the objects that are as they were, to refresh the parts from; None where they need
            it not.
    """

    part: Plan | None
    num_new: int
    num_known: int
    num_changed: int
    num_vanished: int
    num_relabeled: int
    current: pa.Table | None


def compare(objects: pa.Table, parts: Sequence[Plan], outcomes: Outcomes, context: PlanContext) -> Growth:
    """Compare objects with the parts of a plan, look at those that are new, and plan them.

    Args:
        objects: `OBJECTS_SCHEMA`, sorted by name.
        parts: in their order.
        outcomes: of the parts that are built.
        context: what else the plan depends on.
    """
    known = latest_rows(parts)
    place = places_among(objects["name"], known["name"])
    is_known = place >= 0
    is_same = is_known.copy()
    rows = known.select(["num_bytes", "version"]).take(pa.array(place[is_known]))
    is_same[is_known] = equal(objects["num_bytes"].filter(pa.array(is_known)), rows["num_bytes"]) & equal(
        objects["version"].filter(pa.array(is_known)), rows["version"]
    )
    # what could not be read as planned is looked at again, even if its size and time are the same
    is_same[is_known] &= ~np.isin(known["object"].to_numpy()[place[is_known]], list(outcomes.lost))
    is_retried = is_known & outcomes.retry
    is_retried[is_known] &= equal_to(known["status"].take(pa.array(place[is_known])), "quarantined")

    seen = np.flatnonzero(~is_same | is_retried)
    found = context.scan(objects.take(pa.array(seen)))
    verdict = _Verdict(known, place[seen], is_retried[seen], found)
    is_same[seen[verdict.is_same]] = True
    fresh = _fresh_rows(objects.take(pa.array(seen)), found, known, place[seen], verdict, context)

    superseded = known["object"].to_numpy()[place[seen[verdict.is_changed]]]
    again = _rows_again(objects, known, place, is_same, outcomes, superseded)
    number = max((int(pc.max(part.objects["object"]).as_py() or 0) + 1 for part in parts), default=0)
    table = _finish(fresh, again, known, number, np.union1d(superseded, list(outcomes.lost)), context)
    kept = np.flatnonzero(is_same)
    current = objects.take(pa.array(kept)) if _is_moved(objects, known, place, kept) else None
    end_shard = parts[-1].end_shard if parts else 0
    return Growth(
        part=Plan(table, end_shard, context.shard_bytes) if table.num_rows else None,
        num_new=int((~is_known).sum()),
        num_known=len(kept),
        num_changed=len(superseded),
        num_vanished=known.num_rows - int(is_known.sum()),
        num_relabeled=_count_relabeled(objects.take(pa.array(kept)), known, place[kept], context.salt),
        current=current,
    )


def latest_rows(parts: Sequence[Plan]) -> pa.Table:
    """The last row of each name."""
    tables: list[pa.Table] = []
    for part in reversed(parts):
        rows = part.objects
        for later in tables:
            rows = rows.filter(pc.invert(pc.is_in(rows["name"], later["name"].combine_chunks())))
        tables.append(rows)
    return pa.concat_tables([PLAN_SCHEMA.empty_table(), *reversed(tables)]).combine_chunks()


def refresh(part: Plan, current: pa.Table) -> Plan:
    """Take over where the objects are now, and the times of change of those whose content is the same."""
    place = places_among(part.objects["name"], current["name"])
    is_there = pa.array(place >= 0)
    there = pa.array(np.maximum(place, 0))
    table = part.objects
    columns = {
        name: pc.if_else(is_there, current[name].take(there), table[name]) for name in ("uri", "version")
    }
    return Plan(replace_columns(table, **columns), part.first_shard, part.shard_bytes)


def share_left(part: Plan, objects: pa.Table) -> float:
    """Share of a part's objects that are still listed, of the size that they had."""
    place = places_among(part.objects["name"], objects["name"])
    is_there = place >= 0
    sizes = objects["num_bytes"].take(pa.array(place[is_there]))
    is_there[is_there] = equal(sizes, part.objects["num_bytes"].filter(pa.array(is_there)))
    return float(is_there.mean())


class _Verdict:
    """What each object is that was looked at: known after all, changed, tried again with success, or new."""

    def __init__(self, known: pa.Table, place: Int, is_retried: Bool, found: pa.Table) -> None:
        is_known = place >= 0
        before = take_or_null(known.select(["identity", "reason"]), place)
        is_equal = is_known & equal(before["identity"], found["identity"])
        is_unread = equal_to(found["identity"], UNKNOWN_IDENTITY)
        has_same_reason = equal(before["reason"], found["reason"])
        is_equal &= ~is_unread | has_same_reason  # two that could not be read need not be the same
        is_still_bad = equal_to(found["status"], "quarantined") & has_same_reason
        self.is_same = is_equal
        self.is_retried = is_equal & is_retried & ~is_still_bad
        self.is_changed = is_known & ~is_equal
        self.is_planned = ~is_known | self.is_changed | self.is_retried


def _fresh_rows(
    objects: pa.Table, found: pa.Table, known: pa.Table, place: Int, verdict: _Verdict, context: PlanContext
) -> pa.Table:
    """Rows for objects that were looked at, with a column `place` to order a series by."""
    planned = pa.array(np.flatnonzero(verdict.is_planned))
    objects, found, place = objects.take(planned), found.take(planned), place[verdict.is_planned]
    is_changed, is_retry = verdict.is_changed[verdict.is_planned], verdict.is_retried[verdict.is_planned]
    before = take_or_null(known.select(["object", "revision"]), place)
    number = pc.fill_null(before["object"], -1).to_numpy()
    revision = pc.fill_null(before["revision"], 0).to_numpy() + is_changed
    in_series = pc.is_valid(found["series"])
    status, reason = _apply_splits(found, objects["labels"], context.splits)
    salt = context.salt
    columns = {
        **{name: objects[name] for name in ("name", "uri", "num_bytes", "version", "labels")},
        **{name: found[name] for name in ("identity", "format", "num_units", "stored_bytes", "facts")},
        "object": np.where(is_retry, number, -1),
        "status": status,
        "reason": reason,
        "units": pa.nulls(len(place), pa.list_(pa.int32())),
        "duplicate_of": np.full(len(place), -1),
        "supersedes": np.where(is_changed, number, -1),
        "is_retry": is_retry,
        "revision": revision.astype(np.int32),
        "patient": _digest_each(pc.coalesce(objects["patient"], found["patient"]), salt.patient),
        "volume": _name_volumes(objects["name"], found, revision, context),
        "slice": np.zeros(len(place), np.int32),
        "in_series": in_series,
    }
    table = pa.table(columns, schema=PLAN_SCHEMA)
    return table.append_column("place", found["place"])


def _apply_splits(found: pa.Table, labels: pa.ChunkedArray, splits: Sequence[str]) -> tuple[Any, Any]:
    """Exclude images of splits that were not asked for; status and reason of all."""
    if not splits:
        return found["status"], found["reason"]
    encoded = labels.combine_chunks().dictionary_encode()
    is_asked = [json.loads(text).get("split") in splits for text in encoded.dictionary.to_pylist()]
    is_out = pc.and_(
        pc.equal(found["status"], "image"), pc.invert(pa.array(is_asked, pa.bool_()).take(encoded.indices))
    )
    return (
        pc.if_else(is_out, "excluded", found["status"]),
        pc.if_else(is_out, "other_split", found["reason"]),
    )


def _digest_each(values: pa.ChunkedArray, digest: Callable[[str], str]) -> pa.Array:
    encoded = values.combine_chunks().dictionary_encode()
    digests = pa.array([digest(value) for value in encoded.dictionary.to_pylist()], pa.string())
    return digests.take(encoded.indices)


def _name_volumes(
    names: pa.ChunkedArray, found: pa.Table, revisions: npt.NDArray[Any], context: PlanContext
) -> pa.Array:
    """The salted volume of each row, null for single images."""
    salt, modality, source = context.salt, context.modality, context.source
    volumes = _digest_each(found["series"], lambda series: salt.series(modality, source, series))
    own = pc.and_(pc.is_null(found["series"]), pc.or_(found["is_volume"], pc.greater(found["num_units"], 1)))
    places = np.flatnonzero(own.to_numpy())
    if not len(places):
        return volumes
    digests = [
        salt.volume(modality, source, names[int(place)].as_py(), int(revisions[place])) for place in places
    ]
    return pc.replace_with_mask(volumes, own.combine_chunks(), pa.array(digests, pa.string()))


def _rows_again(
    objects: pa.Table, known: pa.Table, place: Int, is_same: Bool, outcomes: Outcomes, superseded: Int
) -> pa.Table:
    """Known rows whose units are tried again, and byte duplicates of what is lost, which step in."""
    numbers, original = known["object"].to_numpy(), known["duplicate_of"].to_numpy()
    is_gone = ~np.isin(original, numbers)  # replaced by an earlier part, when the duplicate was not there
    is_gone |= np.isin(original, np.union1d(superseded, list(outcomes.lost)))
    steps_in = equal_to(known["status"], "duplicate") & is_gone
    tried = np.zeros(known.num_rows, bool)
    if outcomes.retry:
        tried = equal_to(known["status"], "image") & np.isin(numbers, list(outcomes.quarantined))
    listed = np.full(known.num_rows, -1)
    listed[place[is_same]] = np.flatnonzero(is_same)
    rows = np.flatnonzero((steps_in | tried) & (listed >= 0))
    table = known.take(pa.array(rows))
    units = [
        list(outcomes.quarantined[number]) if is_tried else None
        for number, is_tried in zip(numbers[rows].tolist(), tried[rows].tolist(), strict=True)
    ]
    here = objects.take(pa.array(listed[rows]))
    num_rows = table.num_rows
    table = replace_columns(
        table,
        uri=here["uri"],
        version=here["version"],
        status=pa.array(["image"] * num_rows, pa.string()),
        reason=pa.array([""] * num_rows, pa.string()),
        units=pa.array(units, pa.list_(pa.int32())),
        duplicate_of=pa.array(np.full(num_rows, -1)),
        supersedes=pa.array(np.full(num_rows, -1)),
        is_retry=pa.array(np.ones(num_rows, bool)),
    )
    share = pc.divide(
        pc.coalesce(pc.list_value_length(table["units"]), table["num_units"]).cast(pa.float64()),
        table["num_units"].cast(pa.float64()),
    )
    estimate = pc.multiply(table["stored_bytes"], share).cast(pa.int64(), safe=False)
    table = replace_columns(table, stored_bytes=estimate)
    return table.append_column("place", table["slice"].cast(pa.float64()))


def _finish(
    fresh: pa.Table, again: pa.Table, known: pa.Table, number: int, gone: Int, context: PlanContext
) -> pa.Table:
    """Order the rows, number the new objects from `number` on, and resolve what repeats other objects."""
    table = arrange_rows(pa.concat_tables([fresh, again]))
    is_fresh = table["object"].to_numpy() < 0
    numbers = np.where(is_fresh, number + np.cumsum(is_fresh) - 1, table["object"].to_numpy())
    table = replace_columns(table, object=pa.array(numbers))
    is_original = equal_to(known["status"], "image") & ~np.isin(known["object"].to_numpy(), gone)
    table = resolve_duplicates(table, known.filter(pa.array(is_original)))
    return number_slices(table, known)


def _is_moved(objects: pa.Table, known: pa.Table, place: Int, kept: Int) -> bool:
    """Whether known objects are elsewhere or were touched."""
    if not len(kept):
        return False
    before = known.select(["uri", "version"]).take(pa.array(place[kept]))
    now = objects.select(["uri", "version"]).take(pa.array(kept))
    return not all(equal(before[name], now[name]).all() for name in ("uri", "version"))


def _count_relabeled(objects: pa.Table, known: pa.Table, place: Int, salt: Salt) -> int:
    before = known.select(["labels", "patient"]).take(pa.array(place))
    differs = ~equal(objects["labels"], before["labels"])
    patients = _digest_each(objects["patient"], salt.patient)
    is_told = pc.is_valid(patients).to_numpy(zero_copy_only=False)
    differs |= is_told & ~equal(patients, before["patient"])
    return int(differs.sum())
