"""The canonical image: size, bytes without metadata, fingerprints."""

from __future__ import annotations

import io

import numpy as np
import pytest
import zstandard
from PIL import Image

from shards.builder.canonical import (
    dhash64,
    encode_npy_zst,
    encode_png,
    pixel_hash,
    resize_to_canonical,
    strip_jpeg,
)
from tests.shards.images import draw, encode

SECRET = b"Jane Doe 1970"


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [(100, 200, 50, (50, 100)), (200, 100, 50, (100, 50)), (40, 60, 50, (40, 60)), (50, 50, 50, (50, 50))],
)
def test_short_side_is_brought_down_and_never_up(height, width, size, expected):
    assert resize_to_canonical(draw(0, height, width), size).shape == (*expected, 3)


def test_resizing_averages_areas():
    pixels = draw(0, 64, 64, channels=1)
    means = pixels.reshape(32, 2, 32, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(resize_to_canonical(pixels, 32), means, atol=0.51)


def test_deep_pixels_are_averaged_then_rounded():
    pixels = np.arange(64 * 64, dtype=np.int16).reshape(64, 64) % 801 - 1000
    small = resize_to_canonical(pixels, 32)
    assert small.dtype == np.int16
    np.testing.assert_array_equal(small, np.rint(pixels.reshape(32, 2, 32, 2).mean(axis=(1, 3))))
    assert resize_to_canonical(pixels, 64) is pixels


def test_npy_in_zstd_holds_deep_pixels():
    pixels = (draw(0, channels=1).astype(np.int16) - 128) * 20
    data = encode_npy_zst(pixels)
    np.testing.assert_array_equal(np.load(io.BytesIO(zstandard.decompress(data))), pixels)
    assert data == encode_npy_zst(pixels.copy())


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_pixels(channels):
    pixels = draw(0, channels=channels)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(pixels)))), pixels)


def jpeg_with_secrets(**options: object) -> bytes:
    exif = Image.Exif()
    exif[0x010E] = SECRET.decode()
    metadata = {"exif": exif, "comment": SECRET, "icc_profile": SECRET, "xmp": SECRET}
    return encode(draw(0), "JPEG", **metadata, **options) + b"trailer " + SECRET


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"restart_marker_blocks": 4}, {"keep_rgb": True}, {"subsampling": 2}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_stripped_jpeg_has_the_same_pixels_and_no_metadata(options):
    data = jpeg_with_secrets(**options)
    assert data.count(SECRET) == 5
    stripped = strip_jpeg(data)
    assert stripped is not None
    assert SECRET not in stripped
    assert stripped.endswith(b"\xff\xd9")
    before, after = (np.asarray(Image.open(io.BytesIO(item))) for item in (data, stripped))
    np.testing.assert_array_equal(before, after)
    assert not Image.open(io.BytesIO(stripped)).getexif()
    assert strip_jpeg(stripped) == stripped


def test_what_is_not_well_formed_is_not_stripped():
    data = encode(draw(0), "JPEG")
    assert strip_jpeg(encode(draw(0))) is None
    for length in (2, 3, 20, 200, len(data) - 1):
        assert strip_jpeg(data[:length]) is None


def test_pixel_hash_sees_values_and_shape():
    pixels = draw(0, 8, 8, channels=1)
    assert pixel_hash(pixels) == pixel_hash(pixels.copy())
    assert pixel_hash(pixels) != pixel_hash(pixels.reshape(4, 16))
    other = pixels.copy()
    other[0, 0] ^= 1
    assert pixel_hash(pixels) != pixel_hash(other)
    assert len(pixel_hash(pixels)) == 32


def test_dhash_is_near_for_alike_images_and_far_for_others():
    def distance(a: np.ndarray, b: np.ndarray) -> int:
        return (dhash64(a) ^ dhash64(b)).bit_count()

    image = draw(0, 200, 240)
    brighter = np.clip(image.astype(int) + 9, 0, 255).astype(np.uint8)
    assert distance(image, brighter) <= 4
    assert distance(image, resize_to_canonical(image, 90)) <= 4
    assert distance(image, draw(1, 200, 240)) > 15
    ramp = np.tile(np.arange(90, dtype=np.uint8), (80, 1))
    assert dhash64(ramp) == 2**64 - 1
    assert dhash64(ramp[:, ::-1].copy()) == 0
