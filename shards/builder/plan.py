"""The plan of a build: every object with its units, and which unit goes into which shard.

A source has one plan, or several parts of it where it has grown. A part is made once, kept in the private
state folder, and a function of the source and the settings alone, so that an interrupted build goes on where
it was, with the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shards.builder.objects import IDENTITY_BYTES, PlannedObject
from shards.builder.state import Salt
from shards.schema import canonical_json

PLAN_SCHEMA = pa.schema(
    [
        pa.field("object", pa.int64(), nullable=False),  # its number within the source, over all parts
        pa.field("name", pa.large_binary(), nullable=False),
        pa.field("uri", pa.large_binary(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("identity", pa.binary(IDENTITY_BYTES), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # image, duplicate, quarantined, excluded
        pa.field("reason", pa.string(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("num_units", pa.int32(), nullable=False),
        pa.field("units", pa.list_(pa.int32())),  # those to be made, null for all
        pa.field("stored_bytes", pa.int64(), nullable=False),  # of the units to be made, an estimate
        pa.field("duplicate_of", pa.int64(), nullable=False),  # an object, -1 for none
        pa.field("supersedes", pa.int64(), nullable=False),  # the object that had this name, -1 for none
        pa.field("is_retry", pa.bool_(), nullable=False),  # the object was in an earlier part
        pa.field("revision", pa.int32(), nullable=False),  # how many objects had this name before
        pa.field("labels", pa.string(), nullable=False),
        pa.field("patient", pa.string()),
        pa.field("volume", pa.string()),
        pa.field("slice", pa.int32(), nullable=False),  # of the first unit in the volume
        pa.field("in_series", pa.bool_(), nullable=False),
        pa.field("facts", pa.string(), nullable=False),
    ]
)

MIN_SHARD_UNITS, MIN_SHARDS = 32, 16
"""A small dataset is cut into up to 16 shards of 32 units or more: work for a pool, streams for a loader."""

_PRIVATE = ("uri", "version")
"""Columns that may change without another byte in the dataset."""

_DIGEST_ROWS = 1 << 16


class Plan:
    """A part of the plan of a source (`PLAN_SCHEMA`, a row per object) and how its units are cut into shards.

    Units of status "image" are numbered in the order of the rows; the part's shard i holds `shard_units` of
    them from i * shard_units on, and is number `first_shard` + i of the source.

    Attributes:
        objects: the rows.
        first_shard: number of shards of the earlier parts.
        shard_bytes: about how large a shard becomes.
        shard_units: units of a shard; the last one may have fewer.
    """

    def __init__(self, objects: pa.Table, first_shard: int, shard_bytes: int) -> None:
        self.objects, self.first_shard, self.shard_bytes = objects, first_shard, shard_bytes
        images = np.flatnonzero(pc.equal(objects["status"], "image").to_numpy())
        places, self._units = units_of(objects.select(["num_units", "units"]).take(pa.array(images)))
        self._rows = images.astype(np.int32)[places]
        stored_bytes = int(objects["stored_bytes"].to_numpy()[images].sum())
        by_bytes = max(1, shard_bytes * self.num_units // max(1, stored_bytes))
        by_number = max(MIN_SHARD_UNITS, -(-self.num_units // MIN_SHARDS))
        self.shard_units = min(by_bytes, by_number)

    @property
    def num_units(self) -> int:
        """Units that go into shards."""
        return len(self._units)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_units // self.shard_units)

    @property
    def end_shard(self) -> int:
        """Number of the first shard of the next part."""
        return self.first_shard + self.num_shards

    @property
    def stored_bytes(self) -> int:
        """Estimated size of all shards."""
        is_image = pc.equal(self.objects["status"], "image")
        return int(pc.sum(pc.if_else(is_image, self.objects["stored_bytes"], 0)).as_py() or 0)

    def num_units_of(self, shard: int) -> int:
        """Units of one shard."""
        start = (shard - self.first_shard) * self.shard_units
        return min(self.shard_units, self.num_units - start)

    def shards_of(self, objects: npt.NDArray[np.int64]) -> list[int]:
        """Numbers of the shards that hold units of some objects."""
        places = np.flatnonzero(np.isin(self._rows, self.rows_of(objects)))
        return [int(number) for number in np.unique(places // self.shard_units) + self.first_shard]

    def reasons(self, *statuses: str) -> Counter[str]:
        """Units that go into no shard, by reason; byte duplicates are not among them."""
        wanted = pa.array(statuses or ("quarantined", "excluded"))
        out = self.objects.filter(pc.is_in(self.objects["status"], wanted))
        sums = out.group_by("reason").aggregate([("num_units", "sum")]).to_pylist()
        return Counter({row["reason"]: row["num_units_sum"] for row in sums})

    def units_by_format(self) -> Counter[str]:
        """Units that go into shards."""
        formats = self.objects["format"].combine_chunks().dictionary_encode()
        counts = np.bincount(formats.indices.to_numpy()[self._rows], minlength=len(formats.dictionary))
        return +Counter(dict(zip(formats.dictionary.to_pylist(), counts.tolist(), strict=True)))

    def count_units(self, status: str) -> int:
        """Units of the objects of one status."""
        return len(units_of(self.objects.filter(pc.equal(self.objects["status"], status)))[1])

    def digest(self, salt: Salt, settings: Mapping[str, Any]) -> str:
        """Say whether two builds give the same bytes, and nothing else: keyed with the salt."""
        content = hashlib.sha256(canonical_json([self.first_shard, dict(settings)]))
        for start in range(0, self.objects.num_rows, _DIGEST_ROWS):
            rows = self.objects.slice(start, _DIGEST_ROWS)
            for name in rows.column_names:
                if name not in _PRIVATE:
                    _hash_column(content, rows[name].combine_chunks())
        return salt.digest("plan", content.digest())[:32]

    def planned_objects(self, shard: int, salt: Salt, modality: str, source: str) -> list[PlannedObject]:
        """The objects of a shard with their units, in order."""
        start = (shard - self.first_shard) * self.shard_units
        numbers = self._rows[start : start + self.shard_units]
        units = self._units[start : start + self.shard_units]
        first = int(numbers[0])
        rows = self.objects.slice(first, int(numbers[-1]) - first + 1).to_pylist()
        bounds = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1))
        planned = []
        for begin, end in itertools.pairwise(bounds):
            row = rows[int(numbers[begin]) - first]
            name, revision = row["name"], row["revision"]
            keyed = [
                (int(unit), salt.key(modality, source, name, int(unit), revision))
                for unit in units[begin:end]
            ]
            planned.append(as_planned(row, keyed))
        return planned

    def rows_of(self, objects: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows of some objects."""
        return np.flatnonzero(np.isin(self.objects["object"].to_numpy(), objects))


def units_of(rows: pa.Table) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The units that rows account for, all of an object or those that are tried again.

    Returns:
        Place among the rows and number in the object, of each unit, in order.
    """
    chosen = pc.list_value_length(rows["units"])
    counts = pc.coalesce(chosen, rows["num_units"]).to_numpy().astype(np.int64)
    starts = np.cumsum(counts) - counts
    places = np.repeat(np.arange(rows.num_rows, dtype=np.int32), counts)
    units = (np.arange(len(places)) - np.repeat(starts, counts)).astype(np.int32)
    for row in np.flatnonzero(pc.is_valid(chosen).to_numpy()):
        units[starts[row] : starts[row] + counts[row]] = rows["units"][int(row)].as_py()
    return places, units


def keys_of(
    rows: pa.Table,
    places: npt.NDArray[np.int32],
    units: npt.NDArray[np.int32],
    salt: Salt,
    modality: str,
    source: str,
) -> list[str]:
    """Keys of units, as `units_of` numbers them."""
    names, revisions = rows["name"].to_pylist(), rows["revision"].to_pylist()
    return [
        salt.key(modality, source, names[place], unit, revisions[place])
        for place, unit in zip(places.tolist(), units.tolist(), strict=True)
    ]


def as_planned(row: Mapping[str, Any], units: Sequence[tuple[int, str]] = ()) -> PlannedObject:
    """Make the worker's view of a row."""
    return PlannedObject(
        number=row["object"],
        name=row["name"],
        uri=os.fsdecode(row["uri"]),
        num_bytes=row["num_bytes"],
        version=row["version"],
        identity=row["identity"],
        labels=row["labels"],
        facts=row["facts"],
        patient=row["patient"],
        volume=row["volume"],
        first_slice=row["slice"],
        in_series=row["in_series"],
        units=tuple(units),
    )


def _hash_column(digest: Any, array: pa.Array) -> None:
    """Feed the values of a column to a digest, whatever buffers hold them."""
    digest.update(pc.is_valid(array).cast(pa.uint8()).to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_list(array.type):
        _hash_column(digest, pc.list_value_length(array))
        array = array.flatten()
    if pa.types.is_integer(array.type) or pa.types.is_boolean(array.type):
        digest.update(pc.fill_null(array.cast(pa.int64()), 0).to_numpy().tobytes())
        return
    filled = pc.fill_null(array.cast(pa.large_binary()), b"")
    digest.update(pc.binary_length(filled).cast(pa.int64()).to_numpy().tobytes())
    _, offsets, data = filled.buffers()
    bounds = np.frombuffer(offsets, np.int64)[filled.offset : filled.offset + len(filled) + 1]
    if data is not None:
        digest.update(memoryview(data)[bounds[0] : bounds[-1]])
