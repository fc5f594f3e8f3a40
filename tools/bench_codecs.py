"""Codecs of stored images and maps: bytes, and encode and decode time, all in one run on one thread.

    python tools/bench_codecs.py [IMAGES] [--rounds 5] [--only ct16|grey8|rgb8|jpeg|maps]

IMAGES is the folder of real images (the one that FREPA_TEST_DATA points to); without it synthetic ones are
used alone. Time is that of the thread, so that a busy machine disturbs little; the codecs take turns image by
image, and figures are medians over rounds. Every lossless codec is checked to give the pixels back.
"views/s" is what a training view takes: decode, a random crop resized to 224 pixels, its HF tokens ranked.

`npy` is a .npy file, `zst-L` the Zstandard level. Filters before it: `split` keeps low and high bytes apart,
`left` and `up` store differences to the neighbor, `plane` to left + up - upper left. JPEG XL, JPEG-LS and
other JPEG decoders are not measured: none of this project's packages writes them.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import zstandard
from bench_hf import load_images, synthetic_fundus
from bench_images import WINDOW, Array, grey_files, real_ct, synthetic_ct, synthetic_mri
from PIL import Image

from shards.builder.canonical import encode_png
from shards.hf import maps as hf_maps
from shards.hf import tokens as hf_tokens
from shards.read.crops import apply_crop, crop_shares, random_crop


class Codec(NamedTuple):
    """A way to store an array; `decode` is given the shape and the type."""

    name: str
    encode: Callable[[Array], bytes]
    decode: Callable[[bytes, tuple[int, ...], np.dtype[Any]], Array]
    lossless: bool = True


def zst_codec(level: int, filters: str = "") -> Codec:
    """A .npy file in Zstandard; the filter replaces the pixels, so the file is no longer plain .npy."""
    packer, unpacker = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()

    def encode(array: Array) -> bytes:
        return packer.compress(_header(array) + _filtered(array, filters).tobytes())

    def decode(data: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        raw = np.frombuffer(unpacker.decompress(data), np.uint8, offset=128)
        return _restored(raw, shape, dtype, filters)

    return Codec(f"npy.{filters + '.' if filters else ''}zst-{level}", encode, decode)


def lz4_codec(filters: str = "") -> Codec:
    """The same with LZ4, which pyarrow holds."""
    codec = pa.Codec("lz4_raw")

    def encode(array: Array) -> bytes:
        raw = _header(array) + _filtered(array, filters).tobytes()
        return bytes(codec.compress(raw, asbytes=True))

    def decode(data: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        size = 128 + int(np.prod(shape)) * dtype.itemsize
        raw = np.frombuffer(codec.decompress(data, size), np.uint8, offset=128)
        return _restored(raw, shape, dtype, filters)

    return Codec(f"npy.{filters + '.' if filters else ''}lz4", encode, decode)


def _header(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, array[:0])
    return file.getvalue()  # 128 bytes, as of the whole array


def _filtered(array: Array, filters: str) -> Array:
    out = array
    if "left" in filters:
        out = np.diff(array, axis=1, prepend=array.dtype.type(0))
    elif "up" in filters:
        out = np.diff(array, axis=0, prepend=array.dtype.type(0))
    elif "plane" in filters:
        up = np.diff(array, axis=0, prepend=array.dtype.type(0))
        out = np.diff(up, axis=1, prepend=array.dtype.type(0))
    if "split" in filters:
        out = np.stack(cv2.split(np.ascontiguousarray(out).view(np.uint8).reshape(*array.shape, 2)))
    return np.ascontiguousarray(out)


def _restored(raw: Array, shape: tuple[int, ...], dtype: np.dtype[Any], filters: str) -> Array:
    if "split" in filters:
        raw = cv2.merge([np.ascontiguousarray(half) for half in raw.reshape(2, *shape)])
    out = np.ascontiguousarray(raw).view(dtype).reshape(shape)
    if "left" in filters:
        return np.asarray(np.add.accumulate(out, axis=1, dtype=dtype))
    if "up" in filters:
        return np.asarray(np.add.accumulate(out, axis=0, dtype=dtype))
    if "plane" in filters:
        if dtype == np.uint8 and out.ndim == 2:
            return cv2.integral(out)[1:, 1:].astype(np.uint8)  # int32, and the rest modulo 256
        out = np.add.accumulate(out, axis=0, dtype=dtype)
        return np.asarray(np.add.accumulate(out, axis=1, dtype=dtype))
    return out


def cv2_codec(name: str, ext: str, settings: Sequence[int], *, lossless: bool = True) -> Codec:
    """An OpenCV codec; int16 is moved to uint16 and back."""

    def encode(array: Array) -> bytes:
        if array.dtype == np.int16:
            array = (array - WINDOW[0]).astype(np.uint16)
        ok, buffer = cv2.imencode(ext, array[..., ::-1] if array.ndim == 3 else array, list(settings))
        assert ok
        return bytes(buffer)

    def decode(data: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        buffer = np.frombuffer(data, np.uint8)
        if dtype == np.int16:
            return cv2.imdecode(buffer, cv2.IMREAD_UNCHANGED).view(np.int16) + np.int16(WINDOW[0])
        return cv2.imdecode(buffer, cv2.IMREAD_GRAYSCALE if len(shape) == 2 else cv2.IMREAD_COLOR_RGB)

    return Codec(name, encode, decode, lossless)


def pillow_codec(name: str, form: str, **settings: Any) -> Codec:
    """A Pillow codec of 8-bit images."""

    def encode(array: Array) -> bytes:
        file = io.BytesIO()
        Image.fromarray(array).save(file, form, **settings)
        return file.getvalue()

    def decode(data: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return np.asarray(Image.open(io.BytesIO(data)).convert("L" if len(shape) == 2 else "RGB"))

    return Codec(name, encode, decode)


def png(name: str, strategy: int, filtering: int | None = None, level: int | None = None) -> Codec:
    """A PNG of OpenCV."""
    settings = [cv2.IMWRITE_PNG_STRATEGY, strategy]
    settings += [cv2.IMWRITE_PNG_FILTER, filtering] if filtering is not None else []
    settings += [cv2.IMWRITE_PNG_COMPRESSION, level] if level is not None else []
    return cv2_codec(name, ".png", settings)


RLE = cv2.IMWRITE_PNG_STRATEGY_RLE
UP, AVG = cv2.IMWRITE_PNG_FILTER_UP, cv2.IMWRITE_PNG_FILTER_AVG
PNGS = [
    cv2_codec("png OpenCV's defaults", ".png", []),
    Codec("png of shards/canonical", encode_png, cv2_codec("", ".png", []).decode),
    png("png rle, avg", RLE, AVG),
    png("png rle, up", RLE, UP),
    png("png zlib level 6, avg", cv2.IMWRITE_PNG_STRATEGY_DEFAULT, AVG, 6),
]
ARRAYS = [zst_codec(level, filters) for filters in ("", "left", "up") for level in (1, 3)]
SPLIT = [zst_codec(level, filters) for filters in ("split", "up.split") for level in (1, 3, 9)]
DEEP_PNGS = [codec for codec in PNGS if codec.encode is not encode_png]
CODECS = {
    "ct16": [*ARRAYS, *SPLIT, lz4_codec(), *DEEP_PNGS],
    "grey8": [*ARRAYS, zst_codec(1, "plane"), zst_codec(3, "plane"), lz4_codec(), *PNGS,
              pillow_codec("webp lossless, method 0", "webp", lossless=True, method=0),
              pillow_codec("webp lossless, method 4", "webp", lossless=True, method=4),
              cv2_codec("jpeg 95 (lossy)", ".jpg", [cv2.IMWRITE_JPEG_QUALITY, 95], lossless=False)],
    "rgb8": [zst_codec(3), zst_codec(3, "up"), *PNGS,
             pillow_codec("webp lossless, method 0", "webp", lossless=True, method=0),
             cv2_codec("jpeg 95 (lossy)", ".jpg", [cv2.IMWRITE_JPEG_QUALITY, 95], lossless=False)],
}  # fmt: skip


def measure(title: str, images: Sequence[Array], codecs: Sequence[Codec], rounds: int) -> None:
    """Print a table: the codecs on the images, in turn."""
    coded = [[codec.encode(image) for image in images] for codec in codecs]
    times = np.zeros((len(codecs), 2, rounds))
    maps, view_times = [map_of(image) for image in images], np.zeros(rounds)
    for r in range(rounds):
        for i, image in enumerate(images):
            cut(image, maps[i], i)  # a decoder would have left the pixels in the processor's cache
            begin = time.thread_time()
            cut(image, maps[i], i)
            view_times[r] += time.thread_time() - begin
            for c, codec in enumerate(codecs):
                begin = time.thread_time()
                codec.encode(image)
                middle = time.thread_time()
                back = codec.decode(coded[c][i], image.shape, image.dtype)
                times[c, :, r] += middle - begin, time.thread_time() - middle
                assert not codec.lossless or np.array_equal(back, image), (title, codec.name)
    shapes = ", ".join(sorted({"x".join(map(str, image.shape)) for image in images})[:3])
    print(f"\n{title}: {len(images)} images of {shapes}, {images[0].dtype}")
    print("| codec | bytes/image | of raw | encode/s | decode/s | views/s |\n|---|---:|---:|---:|---:|---:|")
    raw = sum(image.nbytes for image in images) / len(images)
    for c, codec in enumerate(codecs):
        size = statistics.fmean(map(len, coded[c]))
        encode, decode = np.median(times[c], axis=1) / len(images)
        view = decode + np.median(view_times) / len(images)
        print(
            f"| {codec.name:32} | {size:9,.0f} | {size / raw:.3f} | {1 / encode:7.0f} | {1 / decode:7.0f} "
            f"| {1 / view:6.0f} |"
        )


def map_of(image: Array) -> Array:
    """The response map of an image."""
    pixels = np.float32(image) if image.dtype == np.int16 else image
    return hf_maps.hf_map(hf_tokens.hf_response(pixels), 4)


def cut(image: Array, hf_map: Array, number: int) -> None:
    """What a training view takes beside decoding."""
    rng = np.random.default_rng(number)
    height, width = image.shape[:2]
    crop = random_crop(rng, height, width, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=True)
    apply_crop(image, crop, 224)
    shares = crop_shares(crop, height, width)
    hf_maps.indices_from_map(hf_map, shares, 16, 0.25, output_size=224, flip=crop.flip)


def measure_scaled_jpeg(rounds: int) -> None:
    """Print what decoding at a share of the size saves, and how much the pixels differ."""
    print("\nJPEG 92 to 512 px (area), by decoding at a share of the size (cv2.IMREAD_REDUCED_*)")
    print("| source px | share | images/s | x whole | mean gap | largest |\n|---:|---:|---:|---:|---:|---:|")
    flags = {1: cv2.IMREAD_COLOR_RGB, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4}
    for size in (1024, 2048):
        image = synthetic_fundus(size, np.random.default_rng(size))
        data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        seconds: dict[int, list[float]] = {share: [] for share in flags if size // share >= 512}
        out: dict[int, Array] = {}
        for _ in range(rounds):
            for share in seconds:
                begin = time.thread_time()
                decoded = cv2.imdecode(data, flags[share] | cv2.IMREAD_IGNORE_ORIENTATION)
                small = cv2.resize(decoded, (512, 512), interpolation=cv2.INTER_AREA)
                seconds[share].append(time.thread_time() - begin)
                out[share] = (small if share == 1 else small[..., ::-1]).astype(np.float32)
        for share, spent in seconds.items():
            median, gap = statistics.median(spent), np.abs(out[share] - out[1])
            ratio = statistics.median(seconds[1]) / median
            row = (
                size,
                f"1/{share}",
                f"{1 / median:.0f}",
                f"{ratio:.2f}",
                f"{gap.mean():.2f}",
                int(gap.max()),
            )
            print("|", " | ".join(map(str, row)), "|")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["ct16", "grey8", "rgb8", "jpeg", "maps"])
    args = parser.parse_args()
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    wanted = [args.only] if args.only else ["ct16", "grey8", "rgb8", "jpeg", "maps"]
    if "ct16" in wanted:
        for noise in (8, 25, 60):
            measure(f"CT, synthetic, noise {noise} HU", [synthetic_ct(noise, rng) for _ in range(3)],
                    CODECS["ct16"], args.rounds)  # fmt: skip
        measure("CT, real (pydicom's)", real_ct(), CODECS["ct16"], args.rounds)
    if "grey8" in wanted:
        for noise in (2, 6):
            measure(f"MRI, synthetic, noise {noise} of 255", [synthetic_mri(noise, rng) for _ in range(3)],
                    CODECS["grey8"], args.rounds)  # fmt: skip
        for name in ("mri", "xray", "ct") if args.images else ():
            measure(
                f"{name}, real (from JPEG)", grey_files(args.images / name, 12), CODECS["grey8"], args.rounds
            )
    colour = [synthetic_fundus(512, rng) for _ in range(3)]
    if "rgb8" in wanted:
        measure("fundus, synthetic", colour, CODECS["rgb8"], args.rounds)
        for name in ("drive", "histopathology") if args.images else ():
            folder = next(args.images.rglob(name))
            measure(f"{name}, real", load_images(folder, 512, 8), CODECS["rgb8"], args.rounds)
    if "jpeg" in wanted:
        measure_scaled_jpeg(max(15, args.rounds))
    if "maps" in wanted:
        maps = [map_of(image) for image in colour]
        tokens = [hf_tokens.hf_token_indices(image, 16, 1.0)[None] for image in colour]
        levels = [zst_codec(level) for level in (1, 3, 9, 19)]
        measure("response maps", maps, levels, args.rounds)
        measure("HF token indices", tokens, levels, args.rounds)


if __name__ == "__main__":
    main()
