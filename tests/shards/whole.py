"""A small dataset that is whole in every respect, for what audits, joins and extends datasets."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from PIL import Image

from shards.builder.canonical import dhash64, pixel_hash
from shards.builder.members import decode_stored, encode_hf_members, encode_npy
from shards.builder.tar import append_members, finish_tar
from shards.dataset import encode_table, load_snapshot, write_snapshot, write_table
from shards.hf.tokens import HFParams
from shards.schema import (
    INDEX_SCHEMA,
    TABLES,
    Counts,
    ShardInfo,
    Snapshot,
    SourceBuild,
    canonical_json,
    index_path,
)
from shards.stores.store import Store, open_store
from tests.shards.images import draw

HF = HFParams(fov="none")
PATCH_SIZE, MAP_CELL = 16, 4

Rows = list[dict[str, Any]]


def draw_sample(modality: str, number: int) -> tuple[str, bytes]:
    """Extension and bytes of an image: int16 for CT; else every third a JPEG, every third grey."""
    pixels = draw(number, 48 + 16 * (number % 2), 64, channels=1 if number % 3 == 1 else 3)
    if modality == "ct":
        hounsfield = pixels.reshape(*pixels.shape[:2], -1)[:, :, 0].astype(np.int16) * 12 - 1024
        return "npy.zst", zstandard.compress(encode_npy(hounsfield))
    buffer = io.BytesIO()
    kind = "JPEG" if number % 3 == 2 else "PNG"
    Image.fromarray(pixels).save(buffer, kind)
    return {"JPEG": "jpg", "PNG": "png"}[kind], buffer.getvalue()


def make_key(salt: str, number: int | str) -> str:
    return hashlib.sha256(f"{salt}/{number}".encode()).hexdigest()[:24]


def write_shard(
    store: Store, path: str, numbers: Sequence[int], images: Sequence[int], salt: str, hf: HFParams = HF
) -> ShardInfo:
    """Write samples `numbers` with the pictures `images`."""
    modality, source = path.split("/")[0], path.split("/")[1].rsplit("-", 1)[0]
    rows, tar = [], io.BytesIO()
    for number, image in zip(numbers, images, strict=True):
        extension, data = draw_sample(modality, image)
        pixels = decode_stored(data, extension, "int16" if modality == "ct" else "uint8")
        labels = {"class": "ab"[number % 2]} if modality == "fundus" else {}
        facts = {
            "height": pixels.shape[0],
            "width": pixels.shape[1],
            "channels": 1 if pixels.ndim == 2 else 3,
            "source_height": 100,
            "source_width": 120,
            "object": number,
            "unit": 0,
            "patient": make_key(salt, f"p{number}"),
            "slice": None,
        }
        about = {"modality": modality, "source": source, "labels": labels, **facts}
        shown = pixels if pixels.dtype == np.uint8 else ((pixels + 1024) // 16).astype(np.uint8)
        places = append_members(
            tar,
            make_key(salt, number),
            [
                ("image", extension, data),
                *encode_hf_members(pixels, hf, PATCH_SIZE, MAP_CELL),
                ("json", "json", canonical_json(about)),
            ],
        )
        rows.append(
            {"key": make_key(salt, number), "image_ext": extension, "dtype": str(pixels.dtype), **places}
            | {"pixel_hash": pixel_hash(pixels), "dhash64": dhash64(shown), "labels": json.dumps(labels)}
            | facts
        )
    num_bytes = finish_tar(tar)
    index = encode_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))
    store.write(path, tar.getvalue())
    store.write(index_path(path), index)
    return ShardInfo(
        path=path,
        modality=modality,
        source=source,
        num_samples=len(rows),
        num_bytes=num_bytes,
        crc32c=google_crc32c.value(tar.getvalue()),
        index_crc32c=google_crc32c.value(index),
    )


def write_whole(
    place: Path | str,
    *,
    modalities: Sequence[str] = ("ct", "fundus"),
    source: str = "tiny",
    num_shards: int = 2,
    num_samples: int = 3,
    first: int = 0,
    salt: str = "salt",
    hf: HFParams = HF,
) -> Snapshot:
    """Write a dataset: each modality has one sample that repeats pixels, and one unit of each other fate.

    Args:
        place: folder or URI.
        modalities: in the order in which they are added.
        source: name of the source of each.
        num_shards: of a modality.
        num_samples: of a shard, two or more.
        first: number of the first picture; pictures of equal number are equal.
        salt: of the keys.
        hf: of all modalities.
    """
    store = open_store(place)
    shards, builds, tables, number = [], [], {name: [] for name in TABLES}, 0
    for modality in modalities:
        named = {"modality": modality, "source": source, "unit": 0}
        start = number
        for shard in range(num_shards):
            numbers = list(range(number, number + num_samples))
            images = [first + n for n in numbers]
            if shard == num_shards - 1:
                images[-1] = first + start  # the last one repeats the first one
            path = f"{modality}/{source}-{shard:06d}.tar"
            shards.append(write_shard(store, path, numbers, images, salt, hf))
            number += num_samples
        last = {"key": make_key(salt, number - 1), "object": number - 1, "kind": "pixels"}
        last |= {"shard": shards[-1].path, "row": num_samples - 1}
        original = make_key(salt, start)
        for kind, row in (
            ("duplicates", last | {"duplicate_of": original}),
            ("duplicates", {"key": make_key(salt, number), "object": number, "kind": "bytes"}),
            ("quarantine", {"key": make_key(salt, number + 1), "object": number + 1, "reason": "truncated"}),
            ("quarantine", {"key": make_key(salt, number + 2), "object": number + 2, "reason": "no_pixels"}),
        ):
            status = "excluded" if row.get("reason") == "no_pixels" else "quarantined"
            tables[kind].append({"duplicate_of": original, "status": status} | named | row)
        number += 3
        total = num_shards * num_samples
        counts = Counts(
            objects=total + 3, units=total + 3, samples=total - 1, quarantined=1, excluded=1, duplicates=2
        )
        builds.append(
            SourceBuild(
                modality=modality,
                source=source,
                counts=counts,
                plan_digests=[make_key(salt, f"{first}{modality}")],
                settings={"source": source},
            )
        )
    snapshot = Snapshot(
        created_by="test",
        modalities=sorted(modalities),
        shards=sorted(shards, key=lambda shard: shard.path),
        hf={modality: hf.model_dump(mode="json") for modality in modalities},
        hf_digests={modality: hf.digest() for modality in modalities},
        size=48,
        patch_size=PATCH_SIZE,
        map_cell=MAP_CELL,
        counts=sum((build.counts for build in builds), Counts()),
        builds=builds,
        tables={name: write_table(store, name, _table(rows, TABLES[name])) for name, rows in tables.items()},
    )
    write_snapshot(store, snapshot, None)
    return snapshot


def _table(rows: Rows, schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([{n: row.get(n) for n in schema.names} for row in rows], schema=schema)


def change_snapshot(place: Path | str, **changes: Any) -> Snapshot:
    """Make a snapshot with other content the current one."""
    store, before = open_store(place), load_snapshot(place)
    after = before.model_copy(update=changes)
    write_snapshot(store, after, before)
    return after


def change_tar(root: Path, path: str, change: Callable[[bytearray], bytes | bytearray]) -> None:
    """Damage the bytes of a tar."""
    (root / path).write_bytes(bytes(change(bytearray((root / path).read_bytes()))))


def change_index(root: Path, path: str, change: Callable[[Rows], Rows]) -> None:
    """Change the rows of a shard's index; `reseal` makes the snapshot believe it."""
    rows = change(pq.read_table(root / index_path(path)).to_pylist())
    (root / index_path(path)).write_bytes(encode_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)))


def change_table(root: Path, name: str, change: Callable[[Rows], Rows]) -> None:
    """Replace a table of the snapshot."""
    snapshot = load_snapshot(root)
    rows = change(pq.read_table(root / snapshot.tables[name].path).to_pylist())
    info = write_table(open_store(root), name, _table(rows, TABLES[name]))
    change_snapshot(root, tables={**snapshot.tables, name: info})


def reseal(root: Path) -> Snapshot:
    """Write a snapshot that believes the tars and indices as they are now: what a faulty builder leaves."""
    shards = []
    for shard in load_snapshot(root).shards:
        tar, index = (root / shard.path).read_bytes(), (root / index_path(shard.path)).read_bytes()
        changes = {"num_bytes": len(tar), "crc32c": google_crc32c.value(tar)}
        changes |= {"index_crc32c": google_crc32c.value(index)}
        changes |= {"num_samples": pq.read_table(pa.BufferReader(index)).num_rows}
        shards.append(shard.model_copy(update=changes))
    return change_snapshot(root, shards=shards)
