"""Bytes to pixels: every kind of image, every kind of damage."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import shards.formats.pictures
from shards.formats.common import REASONS, Header, ReadOptions, Unreadable
from shards.formats.intensity import IntensityRule, measure_window, scale_to_8_bit
from shards.formats.pictures import check_pixels, decode_image, decode_page, open_picture, read_header
from shards.stores.blobs import BytesBlob
from tests.shards.images import draw, encode

COLOR, GREY = draw(0), draw(1, channels=1)


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def header_of(data: bytes) -> Header:
    return read_header(BytesBlob(data))


def reason_of(data: bytes, **options: int) -> str:
    with pytest.raises(Unreadable) as caught:
        decode_image(data, **options)
    assert caught.value.exit_code == 3
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
@pytest.mark.parametrize("pixels", [COLOR, GREY], ids=["color", "grey"])
def test_lossless_formats_give_the_pixels(kind, pixels):
    np.testing.assert_array_equal(decode_image(encode(pixels, kind)), pixels)


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {"quality": 95, "subsampling": 0}), ("WEBP", {"lossless": True})]
)
def test_other_formats(kind, options):
    decoded = decode_image(encode(COLOR, kind, **options))
    assert decoded.shape == COLOR.shape
    assert np.abs(decoded.astype(int) - COLOR).mean() < 3


def test_only_plain_8_bit_files_are_verbatim():
    assert decode_page(encode(COLOR, "JPEG"), max_pixels=10**6).is_verbatim
    assert decode_page(encode(GREY, "JPEG"), max_pixels=10**6).is_verbatim
    cmyk = save(Image.fromarray(COLOR).convert("CMYK"), "JPEG")
    assert not decode_page(cmyk, max_pixels=10**6).is_verbatim
    assert not decode_page(rotated("JPEG", 6), max_pixels=10**6).is_verbatim


def test_cmyk_becomes_rgb():
    image = Image.fromarray(COLOR).convert("CMYK")
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode_image(save(image, "TIFF")), expected)
    assert np.abs(decode_image(save(image, "JPEG", quality=95)).astype(int) - expected).mean() < 8


def test_palette_becomes_rgb():
    image = Image.fromarray(COLOR).quantize(64)
    np.testing.assert_array_equal(decode_image(save(image, "PNG")), np.asarray(image.convert("RGB")))


def test_one_bit_becomes_grey():
    bits = GREY > 128
    np.testing.assert_array_equal(decode_image(save(Image.fromarray(bits), "PNG")), bits * np.uint8(255))


def test_alpha_is_laid_on_black():
    alpha = np.zeros(GREY.shape, np.uint8)
    alpha[:, 40:], alpha[:, 90:] = 255, 51
    decoded = decode_image(encode(np.dstack([COLOR, alpha])))
    assert (decoded[:, :40] == 0).all()
    np.testing.assert_array_equal(decoded[:, 40:90], COLOR[:, 40:90])
    np.testing.assert_allclose(decoded[:, 90:], COLOR[:, 90:] / 5, atol=0.5)
    assert decode_image(encode(np.dstack([GREY, alpha]))).shape == GREY.shape


def test_transparent_palette_entry_is_laid_on_black():
    image = Image.fromarray(np.tile(np.arange(80, dtype=np.uint8), (80, 1)), "L").convert("P")
    decoded = decode_image(save(image, "PNG", transparency=7))
    assert (decoded[:, 7] == 0).all()
    assert (decoded[:, 8] > 0).all()


def rotated(kind: str, orientation: int, pixels: np.ndarray = COLOR) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(Image.fromarray(pixels), kind, exif=exif)


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF orientation by its definition: which edges row 0 and column 0 of the file are."""
    swapped = np.swapaxes(pixels, 0, 1)
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: swapped,
        6: swapped[:, ::-1],
        7: swapped[::-1, ::-1],
        8: swapped[::-1],
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_rotation_is_applied(kind, orientation):
    np.testing.assert_array_equal(decode_image(rotated(kind, orientation)), turn(COLOR, orientation))


def deep_tiff(pixels: np.ndarray, orientation: int) -> bytes:
    """An uncompressed TIFF of 16-bit RGB, which neither library writes with an orientation."""
    height, width, _ = pixels.shape
    tags = [
        (256, width),
        (257, height),
        (258, 8),
        (259, 1),
        (262, 2),
        (273, 14),
        (274, orientation),
        (277, 3),
    ]
    tags += [(278, height), (279, pixels.size * 2)]
    start = 14 + pixels.size * 2
    directory = struct.pack("<H", len(tags))
    for tag, value in tags:
        count = 3 if tag == 258 else 1  # the three depths lie at byte 8
        directory += struct.pack("<HHII", tag, 3 if count == 3 else 4, count, value)
    depths = struct.pack("<HHH", 16, 16, 16)
    body = pixels.astype("<u2").tobytes()
    return b"II*\0" + struct.pack("<I", start) + depths + body + directory + bytes(4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_of_16_bit_color(orientation):
    plain, turned = (decode_image(deep_tiff(COLOR.astype(int) * 5, number)) for number in (1, orientation))
    expected = scale_to_8_bit(COLOR, measure_window([COLOR], IntensityRule()))
    np.testing.assert_allclose(plain, expected, atol=1)
    np.testing.assert_array_equal(turned, turn(plain, orientation))


def _tag_values(data: bytes) -> dict[int, int]:
    """Where the value of each tag of the first directory of a little-endian TIFF lies."""
    start = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, start)[0]
    entries = [start + 2 + 12 * number for number in range(count)]
    return {struct.unpack_from("<H", data, entry)[0]: entry + 8 for entry in entries}


def test_16_bit_grey_is_scaled_by_percentiles():
    rng = np.random.default_rng(0)
    deep = rng.normal(3000, 200, (120, 100)).astype(np.uint16)
    deep[0, 0] = 65535  # one hot pixel must not darken the rest
    for kind in ("PNG", "TIFF"):
        decoded = decode_image(save(Image.fromarray(deep), kind))
        low, high = np.percentile(deep, (0.5, 99.5))
        expected = np.clip((deep - low) / (high - low), 0, 1) * 255
        np.testing.assert_allclose(decoded, expected, atol=0.51)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bit_color_keeps_its_depth(suffix):
    deep = COLOR.astype(np.uint16) + 3000  # 8 significant bits, far from the high byte
    _, buffer = cv2.imencode(suffix, deep[:, :, ::-1])
    decoded = decode_image(bytes(buffer))
    assert decoded.dtype == np.uint8
    assert len(np.unique(decoded)) > 100
    for channel in range(3):
        assert np.corrcoef(decoded[..., channel].ravel(), COLOR[..., channel].ravel())[0, 1] > 0.99


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_lowest_value_is_white_is_inverted(dtype):
    values = GREY.astype(dtype) * dtype(np.iinfo(dtype).max // 255)
    data = bytearray(save(Image.fromarray(values), "TIFF"))
    photometric = 262
    place = _tag_values(bytes(data))[photometric]
    assert struct.unpack_from("<H", data, place) == (1,)
    np.testing.assert_array_equal(decode_page(bytes(data)).pixels, values)
    struct.pack_into("<H", data, place, 0)
    np.testing.assert_array_equal(decode_page(bytes(data)).pixels, np.iinfo(dtype).max - values)


def test_floats_with_nan():
    values = np.linspace(-5, 5, 10000).reshape(100, 100).astype(np.float32)
    values[3, 3], values[4, 4] = np.nan, np.inf
    decoded = decode_image(save(Image.fromarray(values), "TIFF"))
    assert decoded[3, 3] == 0
    assert decoded[4, 4] == 255
    assert decoded[0, 0] == 0
    assert decoded[-1, -1] == 255


def test_pages_of_a_tiff():
    pages = [draw(seed) for seed in range(3)]
    data = save(
        Image.fromarray(pages[0]), "TIFF", save_all=True, append_images=map(Image.fromarray, pages[1:])
    )
    assert header_of(data).num_units == 3
    for number, page in enumerate(pages):
        np.testing.assert_array_equal(decode_image(data, page=number), page)


def test_pages_are_independent_of_each_other():
    pages = [Image.fromarray(draw(seed)) for seed in range(3)]
    pages[1] = Image.fromarray(COLOR)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = save(pages[0], "TIFF", save_all=True, append_images=pages[1:], exif=exif)
    with open_picture(BytesBlob(data), ReadOptions()) as opened:
        for number in (2, 0, 1, 2):
            np.testing.assert_array_equal(opened.decode(number).pixels, decode_image(data, page=number))
        with pytest.raises(Unreadable):
            opened.decode(3)
        np.testing.assert_array_equal(opened.decode(1).pixels, decode_image(data, page=1))
        assert len(list(opened.arrays())) == 3
    np.testing.assert_array_equal(decode_image(data, page=0), turn(draw(0), 6))


def test_deep_pixels_stay_deep_until_they_are_stored():
    deep = COLOR.astype(np.uint16) * 200
    for suffix in (".png", ".tiff"):
        _, buffer = cv2.imencode(suffix, deep[:, :, ::-1])
        np.testing.assert_array_equal(decode_page(bytes(buffer)).pixels, deep)
        _, buffer = cv2.imencode(suffix, deep[:, :, 0])
        pixels = decode_page(bytes(buffer)).pixels
        assert pixels.dtype == np.uint16
        np.testing.assert_array_equal(pixels, deep[:, :, 0])
    signed = (GREY.astype(np.int16) - 100) * 9
    ok, buffer = cv2.imencode(".tiff", signed)
    assert ok
    pixels = decode_page(bytes(buffer)).pixels
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, signed)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_headers(kind):
    assert header_of(encode(COLOR, kind)) == Header(kind.lower(), 1, *COLOR.shape[:2], channels=3)
    if kind != "WEBP":
        assert header_of(encode(GREY, kind)) == Header(kind.lower(), 1, *GREY.shape, channels=1)


def test_headers_of_deep_pictures():
    for suffix in (".png", ".tiff"):
        for pixels, channels in ((COLOR, 3), (GREY, 1)):
            _, buffer = cv2.imencode(suffix, pixels.astype(np.uint16) * 200)
            header = header_of(bytes(buffer))
            assert (header.is_deep, header.channels) == (True, channels)


def test_headers_are_read_from_the_head(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (400, 300, 3)).astype(np.uint8)
    for kind, needs_all in (("PNG", False), ("JPEG", False), ("BMP", False), ("TIFF", True)):
        blob, reads = BytesBlob(encode(noise, kind)), []
        monkeypatch.setattr(blob, "read", lambda reads=reads, blob=blob: (reads.append(1), blob._data)[1])
        assert read_header(blob).height == 400
        assert bool(reads) == needs_all
    # metadata longer than the head
    exif = save(Image.fromarray(noise), "JPEG", icc_profile=bytes(200_000))
    assert header_of(exif).width == 300


def test_an_animation_counts_as_its_first_frame():
    frames = [Image.fromarray(draw(seed)) for seed in range(2)]
    data = save(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert header_of(data).num_units == 1
    np.testing.assert_array_equal(decode_image(data), draw(0))


def test_not_images():
    assert reason_of(b"") == "zero_bytes"
    assert reason_of(b"only words\n") == "not_an_image"
    assert reason_of(save(Image.fromarray(GREY), "GIF")) == "unsupported_format"
    assert reason_of(bytes(128) + b"DICM" + bytes(100)) == "unsupported_format"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated_files_are_refused(kind, share):
    data = encode(COLOR, kind)
    assert reason_of(data[: int(len(data) * share)]) in ("truncated", "damaged")


def test_truncation_is_named_for_the_common_formats():
    for kind in ("PNG", "JPEG"):
        data = encode(COLOR, kind)
        assert reason_of(data[: len(data) // 2]) == "truncated"


def test_garbage_behind_a_good_start():
    assert reason_of(encode(COLOR)[:16] + bytes(range(256)) * 4) == "damaged"


def test_decompression_bomb_is_refused_before_decoding(monkeypatch):
    def fail(*args: object) -> None:
        pytest.fail("decoded")

    monkeypatch.setattr(Image.Image, "load", fail)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def claim(side: int) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        return (
            b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert reason_of(claim(11_000)) == "too_many_pixels"
        assert reason_of(claim(60_000)) == "too_many_pixels"
        assert reason_of(claim(70), max_pixels=70 * 69) == "too_many_pixels"


def test_flat_and_tiny_pixels_are_refused():
    flat = np.full((80, 80), 77, np.uint8)
    flat[0, 0] = 79
    for pixels, reason in ((flat, "flat"), (GREY[:1, :1], "too_small"), (COLOR[:63], "too_small")):
        with pytest.raises(Unreadable) as caught:
            check_pixels(pixels, min_side=64, min_std=1.0)
        assert caught.value.reason == reason
    check_pixels(GREY, min_side=64, min_std=1.0)


def test_a_bug_of_ours_is_not_bad_data(monkeypatch):
    monkeypatch.setattr(shards.formats.pictures, "_is_deep_color", lambda *args: None + 1)
    with pytest.raises(TypeError):
        decode_image(encode(COLOR))


def test_a_type_error_of_the_decoder_is_bad_data():
    # a directory that says there are no samples per pixel: Pillow adds None to a number
    data = bytearray(encode(COLOR, "TIFF"))
    at = _tag_values(bytes(data))[262] - 8  # photometric interpretation
    data[at + 2 : at + 4] = struct.pack("<H", 2)  # its type becomes text
    assert reason_of(bytes(data)) == "damaged"


def test_unreadable_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(Unreadable("flat", "detail", where="x.png")))
    assert (error.reason, error.detail, str(error)) == (
        "flat",
        "detail",
        str(Unreadable("flat", "detail", where="x.png")),
    )


SEEDS = [encode(COLOR, kind) for kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP")] + [
    encode(COLOR, "TIFF", compression="tiff_lzw"),
    rotated("JPEG", 6),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_damaged_bytes_give_pixels_or_a_reason(seed, data):
    damaged = bytearray(seed[: data.draw(st.integers(1, len(seed)))])
    for _ in range(data.draw(st.integers(0, 5))):
        damaged[data.draw(st.integers(0, min(len(damaged), 600) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels = decode_image(bytes(damaged), max_pixels=10**6)
        except Unreadable as error:
            assert error.reason in REASONS  # noqa: PT017 (either outcome is right)
            return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 2 or pixels.shape[2] == 3
