"""A small dataset written by hand, so that the reading side is tested without the building side."""

from __future__ import annotations

import io
import json
from pathlib import Path

import cv2
import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
import zstandard

from shards.builder.tar import append_members, finish_tar
from shards.dataset import encode_table, file_crc32c, load_snapshot, write_snapshot, write_table
from shards.hf.maps import hf_map
from shards.hf.tokens import HFParams, hf_response, hf_token_indices
from shards.schema import (
    HF_INDEX_SCHEMA,
    INDEX_SCHEMA,
    TABLES,
    Counts,
    HFTar,
    ShardInfo,
    Snapshot,
    hf_tar_path,
    index_path,
)
from shards.stores.store import LocalStore

HF = HFParams(fov="none")


def draw_image(number: int, modality: str = "fundus") -> np.ndarray:
    """An image with detail, of its own size: every fifth grey, the others in color; of CT, int16."""
    rng = np.random.default_rng(number)
    height, width = 48 + 8 * (number % 4), 48 + 8 * (number % 3)
    if modality == "ct":
        return rng.integers(-1024, 3072, (height, width), dtype=np.int16)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image[:, :, 0].copy() if number % 5 == 0 else image


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def encode_image(number: int, image: np.ndarray) -> tuple[str, bytes]:
    if image.dtype == np.int16:
        return "npy.zst", zstandard.compress(npy(image))
    ext = "jpg" if number % 2 else "png"
    ok, pixels = cv2.imencode(f".{ext}", image if image.ndim == 2 else image[:, :, ::-1])
    assert ok
    return ext, pixels.tobytes()


def encode_hf(image: np.ndarray, params: HFParams = HF) -> list[tuple[str, str, bytes]]:
    shown = image if image.dtype == np.uint8 else ((image.astype(int) + 1024) >> 4).astype(np.uint8)
    return [
        ("hf", "hf.npy", npy(hf_token_indices(shown, 16, 1.0, params))),
        ("hfmap", "hfmap.npy.zst", zstandard.compress(npy(hf_map(hf_response(shown, params), 4)))),
    ]


def write_shard(root: Path, path: str, images: dict[int, np.ndarray]) -> ShardInfo:
    rows = []
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    with (root / path).open("w+b") as tar:
        for number, image in images.items():
            key, (ext, data) = f"sample{number:05d}", encode_image(number, image)
            members = [("image", ext, data), *encode_hf(image)]
            members.append(("json", "json", json.dumps({"number": number}).encode()))
            row = append_members(tar, key, members)
            height, width = image.shape[:2]
            rows.append(
                row
                | {"key": key, "image_ext": ext, "dtype": str(image.dtype)}
                | {"channels": 1 if image.ndim == 2 else 3}
                | {"height": height, "width": width, "source_height": height, "source_width": width}
                | {"pixel_hash": "", "dhash64": 0, "object": number, "unit": 0}
                | {"labels": json.dumps({"class": number % 3})}
            )
        num_bytes = finish_tar(tar)
        crc = file_crc32c(tar)
    index = encode_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))
    (root / index_path(path)).write_bytes(index)
    return ShardInfo(
        path=path,
        modality=path.split("/")[0],
        source=path.split("/")[1].rsplit("-", 1)[0],
        num_samples=len(rows),
        num_bytes=num_bytes,
        crc32c=crc,
        index_crc32c=google_crc32c.value(index),
    )


def write_tables(root: Path, infos: list[ShardInfo], duplicates: tuple[int, ...]) -> dict:
    """The tables of a snapshot; sample numbers run through the shards."""
    starts = np.cumsum([0] + [info.num_samples for info in infos])
    rows = []
    for n in duplicates:
        i = int(np.searchsorted(starts, n, side="right")) - 1
        rows.append(
            {"key": f"sample{n:05d}", "duplicate_of": "sample00000", "object": n, "unit": 0}
            | {"kind": "superseded" if n % 2 else "pixels", "modality": infos[i].modality, "source": "tiny"}
            | {"shard": infos[i].path, "row": n - int(starts[i])}
        )
    if rows:  # one that is in no shard is no exclusion
        rows.append(rows[0] | {"key": "sample99999", "kind": "bytes", "shard": None, "row": None})
    tables = {"quarantine": [], "duplicates": rows}
    store = LocalStore(root)
    return {
        name: write_table(store, name, pa.Table.from_pylist(tables[name], schema=schema))
        for name, schema in TABLES.items()
    }


@pytest.fixture(scope="session")
def write_dataset():
    """A function that writes a dataset and returns its snapshot.

    Its arguments: the folder; samples of each shard by modality; numbers of samples that repeat others.
    """

    def write(root: Path, shards: dict[str, list[int]], duplicates: tuple[int, ...] = ()) -> Snapshot:
        infos, number = [], 0
        for modality in sorted(shards):
            for i, count in enumerate(shards[modality]):
                images = {n: draw_image(n, modality) for n in range(number, number + count)}
                number += count
                infos.append(write_shard(root, f"{modality}/tiny-{i:06d}.tar", images))
        snapshot = Snapshot(
            created_by="test",
            modalities=sorted(shards),
            shards=infos,
            hf={modality: HF.model_dump() for modality in shards},
            hf_digests={modality: HF.digest() for modality in shards},
            size=64,
            patch_size=16,
            map_cell=4,
            counts=Counts(objects=number, units=number, samples=number),
            builds=[],
            tables=write_tables(root, infos, duplicates),
        )
        write_snapshot(LocalStore(root), snapshot, None)
        return snapshot

    return write


@pytest.fixture(scope="session")
def write_hf_version():
    """A function that adds an HF version to shards, as `frepa shards rehf` does; returns the new snapshot.

    Its arguments: the folder, the modality, the parameters, and the shards of the modality that get it.
    """

    def write(root: Path, modality: str, params: HFParams, only: slice = slice(None)) -> Snapshot:
        before, digest, number = load_snapshot(root), params.digest(), 0
        infos = list(before.shards)
        chosen = [i for i, info in enumerate(infos) if info.modality == modality][only]
        for i, info in enumerate(infos):
            numbers = range(number, number + info.num_samples)
            number += info.num_samples
            if i not in chosen:
                continue
            path = hf_tar_path(info.path, digest)
            with (root / path).open("w+b") as tar:
                rows = [
                    {"key": f"sample{n:05d}"}
                    | append_members(tar, f"sample{n:05d}", encode_hf(draw_image(n, modality), params))
                    for n in numbers
                ]
                num_bytes, crc = finish_tar(tar), file_crc32c(tar)
            index = encode_table(pa.Table.from_pylist(rows, schema=HF_INDEX_SCHEMA))
            (root / index_path(path)).write_bytes(index)
            version = HFTar(num_bytes=num_bytes, crc32c=crc, index_crc32c=google_crc32c.value(index))
            infos[i] = info.model_copy(update={"hf": {**info.hf, digest: version}})
        versions = {modality: {digest: params.model_dump()}}
        snapshot = before.model_copy(update={"shards": infos, "hf_versions": versions})
        write_snapshot(LocalStore(root), snapshot, before)
        return snapshot

    return write


@pytest.fixture(scope="session", name="draw_image")
def _draw_image():
    """The function that draws sample `number`."""
    return draw_image
