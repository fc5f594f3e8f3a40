"""Datasets for benchmarks: ours, written without a build and some of hard links, and those of the peers."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import google_crc32c
import numpy as np
import pyarrow as pa
import zstandard
from bench_hf import synthetic_fundus
from numpy.typing import NDArray

from shards.builder.canonical import encode_png
from shards.builder.tar import append_members, finish_tar
from shards.dataset import encode_table, file_crc32c, write_snapshot, write_table
from shards.hf.maps import hf_map
from shards.hf.tokens import HFParams, hf_response, hf_scores, rank_tokens
from shards.schema import INDEX_SCHEMA, TABLES, Counts, ShardInfo, Snapshot, index_path
from shards.stores.store import LocalStore

HF = HFParams()


class Picture(NamedTuple):
    """A sample to be stored."""

    ext: str
    data: bytes
    shape: tuple[int, ...]
    hf: bytes
    hf_map: bytes


def create_picture(ext: str, data: bytes, pixels: NDArray[Any]) -> Picture:
    """Compute the HF members of an image, as the build does."""
    response = hf_response(pixels, HF)
    packed = zstandard.compress(_npy(hf_map(response, 4)), 3)
    return Picture(ext, data, pixels.shape, _npy(rank_tokens(hf_scores(response, 16), 1.0)), packed)


def write_dataset(root: Path, pictures: Sequence[Picture], *, per_shard: int, links: int = 1) -> Snapshot:
    """Write fundus shards of `per_shard` pictures, each `links` times under other names (hard links)."""
    store = LocalStore(root)
    (root / "fundus").mkdir(parents=True)
    infos: list[ShardInfo] = []
    for start in range(0, len(pictures), per_shard):
        first = _write_shard(root, f"fundus/images-{len(infos):06d}.tar", pictures[start : start + per_shard])
        infos.append(first)
        for _ in range(links - 1):
            info = first.model_copy(update={"path": f"fundus/images-{len(infos):06d}.tar"})
            os.link(root / first.path, root / info.path)
            os.link(root / index_path(first.path), root / index_path(info.path))
            infos.append(info)
    num = sum(info.num_samples for info in infos)
    empty = {name: pa.Table.from_pylist([], schema=schema) for name, schema in TABLES.items()}
    snapshot = Snapshot(
        created_by="tools/bench_dataset.py",
        modalities=["fundus"],
        shards=infos,
        hf={"fundus": HF.model_dump(mode="json")},
        hf_digests={"fundus": HF.digest()},
        size=512,
        patch_size=16,
        map_cell=4,
        counts=Counts(objects=num, units=num, samples=num),
        builds=[],
        tables={name: write_table(store, name, table) for name, table in empty.items()},
    )
    write_snapshot(store, snapshot, None)
    return snapshot


def draw_pictures(num: int, size: int, distinct: int) -> list[Picture]:
    """Draw pictures, every second as PNG, repeating after `distinct`."""
    pictures = []
    for n in range(min(num, distinct)):
        image = synthetic_fundus(size, np.random.default_rng(n))
        if n % 2:
            pictures.append(create_picture("png", encode_png(image), image))
        else:
            data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
            pictures.append(create_picture("jpg", data, image))
    return [pictures[n % len(pictures)] for n in range(num)]


def write_image_tars(folder: Path, pictures: Sequence[Picture], per_shard: int) -> None:
    """Tars of images alone."""
    folder.mkdir()
    for start in range(0, len(pictures), per_shard):
        with (folder / f"{start:06d}.tar").open("wb") as tar:
            for n, picture in enumerate(pictures[start : start + per_shard], start):
                append_members(tar, f"{n:08d}", [("image", picture.ext, picture.data)])
            finish_tar(tar)


def write_peers(folder: Path, pictures: Sequence[Picture], names: Sequence[str]) -> None:
    """The same bytes in the formats of the peers that are installed."""
    if "mosaicml-streaming" in names:
        import streaming

        columns = {"image": "bytes"}
        with streaming.MDSWriter(columns=columns, out=str(folder / "mds"), size_limit=1 << 26) as writer:
            for picture in pictures:
                writer.write({"image": picture.data})
    if "litdata" in names:
        from litdata.streaming.cache import Cache

        cache = Cache(str(folder / "lit"), chunk_bytes=1 << 26)
        for n, picture in enumerate(pictures):
            cache[n] = {"image": picture.data}
        cache.done()
        cache.merge()


def _write_shard(root: Path, path: str, pictures: Sequence[Picture]) -> ShardInfo:
    number = int(path[-10:-4])
    rows = []
    with (root / path).open("w+b") as tar:
        for i, picture in enumerate(pictures):
            key = f"{number:06d}{i:06d}"
            members = [
                ("image", picture.ext, picture.data),
                ("hf", "hf.npy", picture.hf),
                ("hfmap", "hfmap.npy.zst", picture.hf_map),
                ("json", "json", b"{}"),
            ]
            columns: dict[str, Any] = dict(append_members(tar, key, members))
            height, width = picture.shape[:2]
            columns |= {"key": key, "image_ext": picture.ext, "dtype": "uint8", "labels": "{}"}
            columns |= {"height": height, "width": width, "source_height": height, "source_width": width}
            columns |= {"channels": 1 if len(picture.shape) == 2 else 3, "object": i, "unit": 0}
            rows.append(columns | {"pixel_hash": "", "dhash64": 0})
        num_bytes, crc = finish_tar(tar), file_crc32c(tar)
    index = encode_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))
    (root / index_path(path)).write_bytes(index)
    return ShardInfo(
        path=path,
        modality="fundus",
        source="images",
        num_samples=len(rows),
        num_bytes=num_bytes,
        crc32c=crc,
        index_crc32c=google_crc32c.value(index),
    )


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
