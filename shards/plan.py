"""The plan of a build: every object with its units, and which unit goes into which shard.

It is made once, kept in the private state folder, and a function of the source and the settings alone, so
that an interrupted build goes on where it was, with the same bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.canonical import canonical_size
from shards.formats import SUFFIXES, Header, Unreadable, read_header
from shards.schema import canonical_json, read_table, write_table
from shards.sources import Labels, SourceObject
from shards.support.progress import track

PLAN_SCHEMA = pa.schema(
    [
        pa.field("name", pa.binary(), nullable=False),  # bytes, since file names need not be UTF-8
        pa.field("path", pa.binary(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("modified_ns", pa.int64(), nullable=False),
        pa.field("sha256", pa.binary(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # image, duplicate, quarantined, excluded
        pa.field("reason", pa.string(), nullable=False),
        pa.field("num_units", pa.int32(), nullable=False),
        pa.field("stored_bytes", pa.int64(), nullable=False),  # estimate
        pa.field("duplicate_of", pa.int64(), nullable=False),  # object, -1 for none
        pa.field("labels", pa.string(), nullable=False),
        pa.field("patient", pa.string()),
    ]
)

MIN_SHARD_UNITS, MIN_SHARDS = 32, 16
"""A small dataset is cut into up to 16 shards of 32 units or more: work for a pool, streams for a loader."""

_BYTES_PER_PIXEL = 1.1  # of a color PNG; measured on fundus photographs
_BYTES_PER_PATCH = 2 + 16  # an index, and 4 x 4 cells of the response map


Describe = Callable[[SourceObject], tuple[str, str | None]]


@dataclass(frozen=True)
class Unit:
    """One unit to be made a sample.

    Attributes:
        key: its name in the dataset.
        object: number of its object in the plan.
        unit: number within the object (a page).
        name: identifies the object within the source.
        path: where the object is.
        sha256: of the object's bytes when the plan was made.
        labels: a JSON object.
        patient: salted, None when unknown.
        volume: salted, equal for the units of an object that has several, None where it has one.
    """

    key: str
    object: int
    unit: int
    name: bytes
    path: bytes
    sha256: bytes
    labels: str
    patient: str | None
    volume: str | None


@dataclass(frozen=True)
class Salt:
    """Keys the names that enter the dataset, so that they do not give away file names or patients."""

    value: bytes

    def digest(self, purpose: str, *parts: bytes) -> str:
        """64 hex digits; each purpose is a space of its own."""
        framed = b"".join(len(part).to_bytes(8, "big") + part for part in (purpose.encode(), *parts))
        return hmac.new(self.value, framed, hashlib.sha256).hexdigest()

    def key(self, modality: str, source: str, name: bytes, unit: int) -> str:
        """The key of a unit: 24 hex digits; a collision among 1e8 samples has odds of 1e-13."""
        return self.digest("key", modality.encode(), source.encode(), name, str(unit).encode())[:24]

    def volume(self, modality: str, source: str, name: bytes) -> str:
        """What the units of an object have in common, 24 hex digits."""
        return self.digest("volume", modality.encode(), source.encode(), name)[:24]


class Plan:
    """The objects of a source (`PLAN_SCHEMA`, a row each) and how their units are cut into shards.

    Units of status "image" are numbered in the order of the objects; shard s holds the units from
    s * shard_units on.
    """

    def __init__(self, objects: pa.Table, shard_bytes: int) -> None:
        self.objects = objects
        images = np.flatnonzero(pc.equal(objects["status"], "image").to_numpy())
        counts = objects["num_units"].to_numpy()[images]
        self._objects = np.repeat(images, counts)
        self._units = np.arange(len(self._objects)) - np.repeat(np.cumsum(counts) - counts, counts)
        stored_bytes = int(objects["stored_bytes"].to_numpy()[images].sum())
        by_bytes = max(1, shard_bytes * self.num_units // max(1, stored_bytes))
        by_number = max(MIN_SHARD_UNITS, -(-self.num_units // MIN_SHARDS))
        self.shard_units = min(by_bytes, by_number)

    def column(self, name: str) -> list[Any]:
        """One column, as a list."""
        return self.objects[name].to_pylist()  # type: ignore[no-any-return]

    @property
    def num_units(self) -> int:
        """Units that go into shards."""
        return len(self._units)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_units // self.shard_units)

    def num_units_of(self, shard: int) -> int:
        """Units of one shard."""
        return min(self.shard_units, self.num_units - shard * self.shard_units)

    def left_out(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and row of each object that goes into no shard."""
        table = self.objects.select(["name", "status", "reason", "num_units", "duplicate_of"])
        for number in np.flatnonzero(pc.not_equal(self.objects["status"], "image").to_numpy()):
            yield int(number), table.slice(int(number), 1).to_pylist()[0]

    def digest(self, salt: Salt, settings: Mapping[str, Any]) -> str:
        """Say whether two builds give the same bytes, and nothing else: keyed with the salt."""
        rows = self.objects.drop_columns(["path", "modified_ns"]).to_pylist()
        content = hashlib.sha256(canonical_json(dict(settings)))
        for row in rows:
            content.update(repr(sorted(row.items())).encode())
        return salt.digest("plan", content.digest())[:32]

    def units(self, shard: int, salt: Salt, modality: str, source: str) -> list[Unit]:
        """The units of a shard, in order."""
        start = shard * self.shard_units
        chosen = [
            (int(number), int(unit))
            for number, unit in zip(
                self._objects[start : start + self.shard_units],
                self._units[start : start + self.shard_units],
                strict=True,
            )
        ]
        first, last = chosen[0][0], chosen[-1][0]
        rows = self.objects.slice(first, last - first + 1).to_pylist()
        units = []
        for number, unit in chosen:
            row = rows[number - first]
            volume = salt.volume(modality, source, row["name"]) if row["num_units"] > 1 else None
            known = {name: row[name] for name in ("name", "path", "sha256", "labels", "patient")}
            key = salt.key(modality, source, row["name"], unit)
            units.append(Unit(key=key, object=number, unit=unit, volume=volume, **known))
        return units


def create_describer(labeler: Callable[[SourceObject], Labels], salt: Salt) -> Describe:
    """Make the function that gives an object's labels as JSON and its patient salted, None when unknown."""

    def describe(item: SourceObject) -> tuple[str, str | None]:
        labels = labeler(item)
        patient = salt.digest("patient", labels.patient.encode())[:16] if labels.patient else None
        return canonical_json(labels.values).decode(), patient

    return describe


def make_plan(
    objects: Sequence[SourceObject],
    *,
    describe: Describe,
    size: int,
    patch_size: int,
    splits: Sequence[str],
    shard_bytes: int,
) -> Plan:
    """Read every object: its hash, its header, its labels; of byte duplicates, the first one stays.

    Args:
        objects: in the order of the plan.
        describe: gives labels and patient of an object, as `create_describer` makes it.
        size: canonical short side, for the estimate of what a unit takes.
        patch_size: likewise.
        splits: objects of another split are excluded by rule; empty for all.
        shard_bytes: about how large a shard becomes.
    """
    rows: list[dict[str, Any]] = []
    first_with: dict[bytes, int] = {}
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files; what matters becomes a reason
        scanned = _map_bounded(pool, lambda item: _scan(item, size, patch_size), objects)
        for number, (item, found) in enumerate(
            track(zip(objects, scanned, strict=True), total=len(objects), description="plan", unit="object")
        ):
            labels, patient = describe(item)
            row = {"duplicate_of": -1, **found, "labels": labels, "patient": patient}
            if row["status"] == "image":
                if splits and json.loads(labels).get("split") not in splits:
                    row.update(status="excluded", reason="other_split")
                elif row["sha256"] in first_with:
                    row.update(
                        status="duplicate", reason="same_bytes", duplicate_of=first_with[row["sha256"]]
                    )
                else:
                    first_with[row["sha256"]] = number
            rows.append(row)
    return Plan(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA), shard_bytes)


def _map_bounded(
    pool: ThreadPoolExecutor,
    function: Callable[[SourceObject], dict[str, Any]],
    items: Sequence[SourceObject],
) -> Iterator[dict[str, Any]]:
    """Map in order; unlike `pool.map`, millions of items are not submitted at once."""
    for start in range(0, len(items), 1024):
        yield from pool.map(function, items[start : start + 1024])


def _scan(item: SourceObject, size: int, patch_size: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": os.fsencode(item.name),
        "path": os.fsencode(item.path),
        "num_bytes": item.num_bytes,
        "modified_ns": item.modified_ns,
        "sha256": b"",
        "status": "image",
        "reason": "",
        "num_units": 1,
        "stored_bytes": 0,
    }
    claims_image = PurePosixPath(item.name).suffix.lower() in SUFFIXES
    try:
        if not item.is_file:
            raise Unreadable("unreadable_file" if item.num_bytes < 0 else "not_an_image")
        try:
            data = Path(item.path).read_bytes()
        except OSError as error:
            raise Unreadable("unreadable_file", error.strerror or "") from error
        row["sha256"] = hashlib.sha256(data).digest()
        header = read_header(data)
        row["num_units"] = header.num_pages
        row["stored_bytes"] = _estimate_stored_bytes(header, len(data), size, patch_size)
    except Unreadable as error:
        # a text file beside the images was never meant; a file called .png that is none is a loss to be seen
        is_rule = error.reason in ("zero_bytes", "not_an_image", "unsupported_format") and not claims_image
        row.update(status="excluded" if is_rule else "quarantined", reason=error.reason)
    return row


def _estimate_stored_bytes(header: Header, num_bytes: int, size: int, patch_size: int) -> int:
    height, width = canonical_size(header.height, header.width, size)
    stays_jpeg = header.format == "jpeg" and (height, width) == (header.height, header.width)
    image = num_bytes if stays_jpeg else int(height * width * _BYTES_PER_PIXEL)
    tokens = height * width * _BYTES_PER_PATCH // patch_size**2
    return header.num_pages * (image + tokens)


def is_current(plan: Plan, objects: Sequence[SourceObject], describe: Describe) -> bool:
    """Whether the objects look as they did when the plan was made: names, sizes, times, labels."""
    columns = ("name", "path", "num_bytes", "modified_ns", "labels", "patient")
    planned = zip(*(plan.column(name) for name in columns), strict=True)
    found = [
        (os.fsencode(item.name), os.fsencode(item.path), item.num_bytes, item.modified_ns, *describe(item))
        for item in objects
    ]
    return list(planned) == found


def save_plan(path: Path, plan: Plan, settings: Mapping[str, Any]) -> None:
    """Write a plan and the settings it was made for into the state folder."""
    facts = {b"settings": canonical_json(dict(settings))}
    write_table(path, plan.objects.replace_schema_metadata(facts), mode=0o600)


def load_plan(path: Path, settings: Mapping[str, Any]) -> Plan | None:
    """Read a plan, None when there is none for these settings."""
    if not path.exists():
        return None
    table = read_table(path, PLAN_SCHEMA)
    if (table.schema.metadata or {}).get(b"settings") != canonical_json(dict(settings)):
        return None
    return Plan(table.replace_schema_metadata(None), settings["shard_bytes"])
