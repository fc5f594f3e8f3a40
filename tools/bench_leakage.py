"""How fast and how well leakage is found: the search of near hashes at size, and error rates on real images.

python tools/bench_leakage.py                    17 M synthetic hashes against 10,000 images
FREPA_TEST_DATA=... python tools/bench_leakage.py --real     copies and different images of fundus
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import google_crc32c
import numpy as np
import pyarrow as pa

from shards.audit.evaluated import EvaluatedTask, Reading, read_evaluated
from shards.audit.hamming import NearHashes
from shards.audit.leakage_index import NEAR_BITS, Wanted, scan_index
from shards.audit.patterns import SAME, cut_frames, find_matches, make_patterns
from shards.builder.canonical import dhash64, resize_to_canonical
from shards.dataset import encode_table
from shards.formats.common import ReadOptions
from shards.formats.intensity import IntensityRule
from shards.formats.pictures import decode_image
from shards.schema import INDEX_SCHEMA, ShardInfo, index_path
from shards.stores.store import LocalStore

HASHES_PER_IMAGE = 28  # frames and mirrors
SHARES = (0.57, 0.37, 0.034, 0.005, 0.007, 0.009, 0.005)  # of Frepa's modalities; the next to last is fundus
FUNDUS = 5
BASES, FLIPPED = 1000, 8  # a modality's images are so many looks, with so many bits changed
BLOCK = 1 << 20
SHARD = 2500  # samples
SETS = ("odir5k", "drive", "chasedb1", "hrf")


def draw_hashes(rng: np.random.Generator, modality: int, num: int) -> np.ndarray:
    """Hashes of images that look alike: those of a modality crowd around some looks."""
    looks = np.random.default_rng(modality).integers(0, 2**64, BASES, dtype=np.uint64)
    hashes = looks[rng.integers(BASES, size=num)]
    for _ in range(FLIPPED):
        hashes ^= np.uint64(1) << rng.integers(64, size=num).astype(np.uint64)
    return hashes


def bench_search(num_rows: int, num_images: int) -> None:
    """CPU time and memory of the search."""
    rng = np.random.default_rng(0)
    start = time.process_time()
    near = NearHashes(draw_hashes(rng, FUNDUS, num_images * HASHES_PER_IMAGE), NEAR_BITS)
    print(
        f"{num_images} images, {HASHES_PER_IMAGE} hashes each: tables {time.process_time() - start:.1f} CPU s"
    )
    spent = found = done = 0.0
    while done < num_rows:
        num = int(min(BLOCK, num_rows - done))
        counts = rng.multinomial(num, np.array(SHARES) / sum(SHARES))
        rows = np.concatenate([draw_hashes(rng, modality, count) for modality, count in enumerate(counts)])
        start = time.process_time()
        found += int(near.is_near(rows).sum())
        spent += time.process_time() - start
        done += num
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{num_rows / 1e6:.1f} M hashes: {spent:.0f} CPU s, {found / num_rows:.2%} near, {memory:.2f} GiB")


def bench_index(num_images: int) -> None:
    """CPU time of looking through one index but for its hashes: reading it, bytes, pixels, patients."""
    rng = np.random.default_rng(1)
    numbers = {field.name: np.arange(SHARD) for field in INDEX_SCHEMA if pa.types.is_integer(field.type)}
    texts = {name: [rng.bytes(8).hex() for _ in range(SHARD)] for name in ("key", "patient")}
    texts |= {"pixel_hash": [rng.bytes(16).hex() for _ in range(SHARD)], "labels": ["{}"] * SHARD}
    others = {name: ["png"] * SHARD for name in ("image_ext", "dtype", "volume")}
    hashes = rng.integers(2**64, size=SHARD, dtype=np.uint64)
    columns = {**numbers, **texts, **others, "dhash64": hashes}
    columns = {field.name: pa.array(columns[field.name], field.type) for field in INDEX_SCHEMA}
    data = encode_table(pa.table(columns, schema=INDEX_SCHEMA))
    shard = ShardInfo(
        path="fundus/bench-000000.tar",
        modality="fundus",
        source="bench",
        num_samples=SHARD,
        num_bytes=1,
        crc32c=0,
        index_crc32c=google_crc32c.value(data),
    )
    wanted = Wanted(
        pixels={rng.bytes(16).hex(): [i] for i in range(num_images)},
        jpegs={i << 32: [i] for i in range(num_images)},
        objects={},
        patients={rng.bytes(8).hex(): [i] for i in range(num_images)},
        near=NearHashes(np.zeros(0, np.uint64), NEAR_BITS),
    )
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder))
        store.write(index_path(shard.path), data)
        start = time.process_time()
        for _ in range(5):
            scan_index(store, shard, np.zeros(0, np.int64), wanted)
        spent = (time.process_time() - start) / 5 / SHARD
    print(f"the rest of an index: {1e6 * spent:.1f} CPU us a sample, {17e6 * spent:.0f} CPU s for 17 M")


def changes() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """What is done to copies."""

    def jpeg(quality: int) -> Callable[[np.ndarray], np.ndarray]:
        flags = [cv2.IMWRITE_JPEG_QUALITY, quality]
        return lambda p: cv2.imdecode(cv2.imencode(".jpg", p, flags)[1], cv2.IMREAD_COLOR)

    def size(scale: float) -> Callable[[np.ndarray], np.ndarray]:
        way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        return lambda p: cv2.resize(p, None, fx=scale, fy=scale, interpolation=way)

    def crop(share: float, shift: float = 0.0) -> Callable[[np.ndarray], np.ndarray]:
        def cut(p: np.ndarray) -> np.ndarray:
            height, width = (round(side * share) for side in p.shape[:2])
            top, left = (
                round((side - kept) * (0.5 + shift))
                for side, kept in zip(p.shape, (height, width), strict=False)
            )
            return p[top : top + height, left : left + width]

        return cut

    def tone(gain: float, offset: float = 0.0, gamma: float = 1.0) -> Callable[[np.ndarray], np.ndarray]:
        return lambda p: np.clip(255 * (p / 255.0) ** gamma * gain + offset, 0, 255).astype(np.uint8)

    def border(p: np.ndarray) -> np.ndarray:
        return cv2.copyMakeBorder(p, 0, 0, p.shape[1] // 4, p.shape[1] // 4, cv2.BORDER_CONSTANT)

    return {
        "PNG again": lambda p: p,
        "JPEG 90": jpeg(90),
        "JPEG 50": jpeg(50),
        "JPEG 20": jpeg(20),
        "half size": size(0.5),
        "a third": size(1 / 3),
        "1.5 times": size(1.5),
        "squeezed to a square of 224": lambda p: cv2.resize(p, (224, 224), interpolation=cv2.INTER_AREA),
        "mirrored": lambda p: p[:, ::-1],
        "turned by 180 degrees": lambda p: p[::-1, ::-1],
        "turned by 90 degrees": lambda p: np.rot90(p),
        "brighter by .3": tone(1.3),
        "darker by .3": tone(0.7),
        "gamma .7": tone(1, gamma=0.7),
        "grey": lambda p: cv2.cvtColor(p, cv2.COLOR_BGR2GRAY),
        "mirrored, JPEG 70, half size": lambda p: size(0.5)(jpeg(70)(np.ascontiguousarray(p[:, ::-1]))),
        "center 95 %": crop(0.95),
        "center 90 %": crop(0.9),
        "center 87 %": crop(0.87),
        "center 80 %": crop(0.8),
        "center 70 %": crop(0.7),
        "90 %, off center": crop(0.9, 0.4),
        "black border added": border,
    }


def bench_real(folder: Path, num: int) -> None:
    """Share of copies found by kind, and of pairs of different images that are taken for copies."""
    files = [path for name in SETS for path in sorted((folder / "fundus" / name / "images").iterdir())]
    rng = np.random.default_rng(0)
    files = [files[i] for i in np.sort(rng.choice(len(files), min(num, len(files)), replace=False))]
    reading = Reading(512, IntensityRule(kind="as_is"), ReadOptions())
    start = time.process_time()
    images = [read_evaluated(EvaluatedTask([(str(path), 0)], [reading])).images[0] for path in files]
    print(f"{len(files)} images: {1000 * (time.process_time() - start) / len(files):.0f} CPU ms each to read")
    given = np.stack([image.patterns for image in images])
    plain = sum(not pattern[0].any() for pattern in given)
    start = time.process_time()
    pairs = [match for match in find_matches(given, given, 0.5) if match.stored < match.given]
    seconds = time.process_time() - start
    print(f"{seconds / len(given) ** 2 * 1e6:.1f} CPU us a pair; {plain} images too plain to be told apart")
    num_pairs = len(given) * (len(given) - 1) // 2
    for least in (0.6, 0.65, 0.7, SAME, 0.75, 0.8):
        above = sum(match.correlation >= least for match in pairs)
        print(f"different, correlation >= {least:.2f}: {above} of {num_pairs} pairs, {above / num_pairs:.1e}")
    for match in sorted(pairs, key=lambda match: -match.correlation)[:10]:
        print(f"  {match.correlation:.3f} {files[match.stored].name} {files[match.given].name} {match.how}")
    own = [np.array(sorted(image.dhashes), np.uint64) for image in images]
    stored = (resize_to_canonical(decode_image(path.read_bytes()), 512) for path in files)
    whole = np.array([dhash64(pixels) for pixels in stored], np.uint64)
    alike = np.bitwise_count(whole[:, None] ^ whole[None]) <= NEAR_BITS
    print(f"different images with near hashes: {(alike.sum() - len(files)) / 2 / num_pairs:.1%} of the pairs")
    chosen = range(0, len(files), max(1, len(files) // 200))
    print(f"{'copy':<30} {'pixels':>7} {'hash':>6} {'found':>6}   of {len(chosen)} copies")
    for name, change in changes().items():
        counts = np.zeros(3)
        for i in chosen:
            source = cv2.imread(str(files[i]), cv2.IMREAD_COLOR)
            copy = np.ascontiguousarray(change(source))
            kept: Any = resize_to_canonical(
                copy if copy.ndim == 2 else np.ascontiguousarray(copy[..., ::-1]), 512
            )
            is_near = int(np.bitwise_count(own[i] ^ np.uint64(dhash64(kept))).min()) <= NEAR_BITS
            fits = bool(find_matches(make_patterns(cut_frames(kept))[None], given[i : i + 1]))
            original = resize_to_canonical(np.ascontiguousarray(source[..., ::-1]), 512)
            same = kept.shape == original.shape and bool((kept == original).all())
            counts += (same, is_near, same or (is_near and fits))
        pixels, near, found = counts / len(chosen)
        print(f"{name:<30} {pixels:>7.2f} {near:>6.2f} {found:>6.2f}")


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=17_000_000)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--num", type=int, default=2000, help="real images")
    arguments = parser.parse_args()
    if arguments.real:
        bench_real(Path(os.environ["FREPA_TEST_DATA"]), arguments.num)
    else:
        bench_search(arguments.rows, arguments.images)
        bench_index(arguments.images)


if __name__ == "__main__":
    main()
