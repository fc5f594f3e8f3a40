"""One shard: from units to a tar and its index. Runs in a worker process; idempotent, same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from shards.atomic import replace_file
from shards.canonical import dhash64, encode_png, pixel_hash, resize_to_canonical, strip_jpeg
from shards.formats import Unreadable, check_pixels, decode_page, sniff
from shards.hf_tokens import HFParams, hf_map, hf_response, hf_scores, rank_tokens
from shards.plan import Unit
from shards.schema import INDEX_SCHEMA, MEMBERS, ShardInfo, canonical_json, index_path, write_table
from shards.support.errors import DataError, EnvironmentFault

_TAR_BLOCK = 512
_ZSTD_LEVEL = 3
_MAX_PATCHES = 1 << 16


@dataclass(frozen=True)
class SampleSpec:
    """How a unit becomes a sample; lengths in pixels."""

    modality: str
    source: str
    size: int
    patch_size: int
    map_cell: int
    hf: HFParams
    max_pixels: int
    min_side: int
    min_std: float
    keep_names: bool


@dataclass(frozen=True)
class ShardTask:
    """All a worker needs to write one shard."""

    root: Path
    path: str
    spec: SampleSpec
    plan_digest: str
    units: Sequence[Unit]


@dataclass(frozen=True)
class BadUnit:
    """A unit that became no sample."""

    key: str
    object: int
    unit: int
    reason: str


@dataclass(frozen=True)
class ShardResult:
    """A committed shard; `info` is None when none of its units became a sample."""

    info: ShardInfo | None
    bad: Sequence[BadUnit]


def write_shard(task: ShardTask) -> ShardResult:
    """Write tar, then index: the index commits both.

    Raises:
        DataError: an object is not what it was when the plan was made.
        EnvironmentFault: the destination cannot be written.
    """
    rows: list[dict[str, Any]] = []
    bad: list[BadUnit] = []
    objects = _ObjectReader()
    tar_path = task.root / task.path
    with warnings.catch_warnings(), replace_file(tar_path) as file:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files; what matters becomes a reason
        for unit in task.units:
            data = objects.read(unit)
            try:
                members, facts = make_sample(data, unit, task.spec)
            except Unreadable as error:
                bad.append(BadUnit(unit.key, unit.object, unit.unit, error.reason))
            else:
                rows.append(facts | _append_members(file, unit.key, members))
        file.write(bytes(2 * _TAR_BLOCK))
        num_bytes = file.tell()
    facts = {
        "plan": task.plan_digest,
        "num_bytes": num_bytes,
        "bad": [[item.key, item.object, item.unit, item.reason] for item in bad],
    }
    table = pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)
    write_table(
        index_path(task.root, task.path), table.replace_schema_metadata({b"frepa": canonical_json(facts)})
    )
    result = read_committed(task)
    if result is None:
        raise EnvironmentFault("the shard changed while it was written", where=tar_path, fix="build again")
    return result


def read_committed(task: ShardTask) -> ShardResult | None:
    """What an earlier build committed for this task; None when it did not, or by another plan."""
    path = index_path(task.root, task.path)
    try:
        data = path.read_bytes()
        num_bytes = (task.root / task.path).stat().st_size
        table = pq.read_table(pa.BufferReader(data), columns=["key"])
    except (OSError, pa.ArrowException):
        return None
    facts = json.loads((table.schema.metadata or {}).get(b"frepa", b"{}"))
    if facts.get("plan") != task.plan_digest or facts.get("num_bytes") != num_bytes:
        return None
    bad = [BadUnit(*item) for item in facts["bad"]]
    assert table.num_rows + len(bad) == len(task.units), "a committed shard accounts for each of its units"
    if table.num_rows == 0:
        return ShardResult(None, bad)
    info = ShardInfo(
        path=task.path,
        modality=task.spec.modality,
        source=task.spec.source,
        num_samples=table.num_rows,
        num_bytes=num_bytes,
        index_crc32c=google_crc32c.value(data),
    )
    return ShardResult(info, bad)


class _ObjectReader:
    """Reads the objects of units; the last one is kept, since its pages follow each other."""

    def __init__(self) -> None:
        self._object, self._data = -1, b""

    def read(self, unit: Unit) -> bytes:
        if unit.object != self._object:
            path = os.fsdecode(unit.path)
            fix = "leave the source alone while it is built, then run the same command again"
            try:
                data = Path(path).read_bytes()
            except OSError as error:
                raise DataError(
                    f"could be read for the plan, now not: {error.strerror}", where=path, fix=fix
                ) from error
            if hashlib.sha256(data).digest() != unit.sha256:
                raise DataError("changed since the plan was made", where=path, fix=fix)
            self._object, self._data = unit.object, data
        return self._data


def make_sample(data: bytes, unit: Unit, spec: SampleSpec) -> tuple[list[tuple[str, bytes]], dict[str, Any]]:
    """Turn an object's bytes into the members (extension, bytes) and the index row of one sample.

    Raises:
        Unreadable: it cannot become a sample, with the reason.
    """
    decoded = decode_page(data, max_pixels=spec.max_pixels, page=unit.unit)
    check_pixels(decoded.pixels, min_side=spec.min_side, min_std=spec.min_std)
    pixels = resize_to_canonical(decoded.pixels, spec.size)
    height, width = pixels.shape[:2]
    if (height // spec.patch_size) * (width // spec.patch_size) > _MAX_PATCHES:
        raise Unreadable("too_many_patches", f"{width} x {height} at patch size {spec.patch_size}")
    is_untouched = decoded.is_verbatim and pixels is decoded.pixels
    jpeg = strip_jpeg(data) if is_untouched and sniff(data) == "jpeg" else None
    extension, image = ("png", encode_png(pixels)) if jpeg is None else ("jpg", jpeg)

    response = hf_response(pixels, spec.hf)
    tokens = rank_tokens(hf_scores(response, spec.patch_size), 1.0)
    compressed_map = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(
        _npy_bytes(hf_map(response, spec.map_cell))
    )
    facts: dict[str, Any] = {
        "height": height,
        "width": width,
        "channels": 1 if pixels.ndim == 2 else pixels.shape[2],
        "source_height": decoded.pixels.shape[0],
        "source_width": decoded.pixels.shape[1],
        "object": unit.object,
        "unit": unit.unit,
        "patient": unit.patient,
        "volume": unit.volume,
        "slice": None if unit.volume is None else unit.unit,
    }
    about = {"modality": spec.modality, "source": spec.source, "labels": json.loads(unit.labels), **facts}
    if spec.keep_names:
        about["name"] = os.fsdecode(unit.name).encode(errors="replace").decode()
    members = [
        (extension, image),
        ("hf.npy", _npy_bytes(tokens)),
        ("hfmap.npy.zst", compressed_map),
        ("json", canonical_json(about)),
    ]
    facts |= {
        "key": unit.key,
        "image_ext": extension,
        "pixel_hash": pixel_hash(pixels),
        "dhash64": dhash64(pixels),
        "labels": unit.labels,
    }
    return members, facts


def _npy_bytes(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _append_members(file: BinaryIO, key: str, members: Sequence[tuple[str, bytes]]) -> dict[str, int]:
    """Append the members of a sample to a tar; return offset, size and crc32c of each."""
    columns: dict[str, int] = {}
    for name, (extension, data) in zip(MEMBERS, members, strict=True):
        header = tarfile.TarInfo(f"{key}.{extension}")  # owner 0, time 0, mode 0644: no trace of the machine
        header.size = len(data)
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        columns[f"{name}_offset"] = file.tell()
        columns[f"{name}_size"] = len(data)
        columns[f"{name}_crc32c"] = google_crc32c.value(data)
        file.write(data)
        file.write(bytes(-len(data) % _TAR_BLOCK))
    return columns
