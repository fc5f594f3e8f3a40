"""A small dataset written by hand, so that the reading side is tested without the building side."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import cv2
import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from shards.hf_tokens import HFParams, hf_map, hf_response, hf_token_indices
from shards.schema import (
    DUPLICATES_SCHEMA,
    INDEX_SCHEMA,
    Counts,
    ShardInfo,
    Snapshot,
    index_path,
    write_snapshot,
    write_table,
)

HF = HFParams(fov="none")


def draw_image(number: int) -> np.ndarray:
    """An image with detail, of its own size: every fifth grey, the others in color."""
    rng = np.random.default_rng(number)
    height, width = 48 + 8 * (number % 4), 48 + 8 * (number % 3)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image[:, :, 0].copy() if number % 5 == 0 else image


def encode_members(number: int, image: np.ndarray) -> dict[str, bytes]:
    grey = image.ndim == 2
    ext = ".jpg" if number % 2 else ".png"
    ok, pixels = cv2.imencode(ext, image if grey else image[:, :, ::-1])
    assert ok
    indices, array = io.BytesIO(), io.BytesIO()
    np.save(indices, hf_token_indices(image, 16, 1.0, HF))
    np.save(array, hf_map(hf_response(image, HF), 4))
    return {
        ext[1:]: pixels.tobytes(),
        "hf.npy": indices.getvalue(),
        "hfmap.npy.zst": zstandard.compress(array.getvalue()),
        "json": json.dumps({"number": number}).encode(),
    }


def write_shard(root: Path, path: str, images: dict[int, np.ndarray]) -> ShardInfo:
    rows = []
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, image in images.items():
            key, row = f"sample{number:05d}", {}
            members = encode_members(number, image)
            for member, (ext, data) in zip(("image", "hf", "hfmap", "json"), members.items(), strict=True):
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                row[f"{member}_offset"] = tar.offset + 512
                row[f"{member}_size"], row[f"{member}_crc32c"] = len(data), google_crc32c.value(data)
                tar.addfile(info, io.BytesIO(data))
            height, width = image.shape[:2]
            rows.append(
                row
                | {"key": key, "image_ext": next(iter(members)), "channels": 1 if image.ndim == 2 else 3}
                | {"height": height, "width": width, "source_height": height, "source_width": width}
                | {"pixel_hash": "", "dhash64": 0, "object": number, "unit": 0}
                | {"labels": json.dumps({"class": number % 3})}
            )
    index = index_path(root, path)
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), index)
    return ShardInfo(
        path=path,
        modality=path.split("/")[0],
        source=path.split("/")[1].rsplit("-", 1)[0],
        num_samples=len(rows),
        num_bytes=(root / path).stat().st_size,
        index_crc32c=google_crc32c.value(index.read_bytes()),
    )


@pytest.fixture(scope="session")
def write_dataset():
    """A function that writes a dataset and returns its snapshot.

    Its arguments: the folder; samples of each shard by modality; numbers of samples that repeat others.
    """

    def write(root: Path, shards: dict[str, list[int]], duplicates: tuple[int, ...] = ()) -> Snapshot:
        infos, number = [], 0
        for modality in sorted(shards):
            for i, count in enumerate(shards[modality]):
                images = {n: draw_image(n) for n in range(number, number + count)}
                number += count
                infos.append(write_shard(root, f"{modality}/tiny-{i:06d}.tar", images))
        if duplicates:
            rows = [
                {"key": f"sample{n:05d}", "duplicate_of": "sample00000", "kind": "pixels"}
                | {"modality": "fundus", "source": "tiny", "object": n, "unit": 0}
                for n in duplicates
            ]
            write_table(root / "duplicates.parquet", pa.Table.from_pylist(rows, schema=DUPLICATES_SCHEMA))
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
        )
        write_snapshot(root, snapshot)
        return snapshot

    return write


@pytest.fixture(scope="session", name="draw_image")
def _draw_image():
    """The function that draws sample `number`."""
    return draw_image
