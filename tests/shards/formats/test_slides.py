"""Whole-slide images: which TIFF is one, the grid, glass, resolution."""

from __future__ import annotations

import io

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

import shards.formats.slides
from shards.formats.common import ReadOptions, Unreadable
from shards.formats.registry import open_object
from shards.formats.slides import tissue_share
from shards.stores.blobs import BytesBlob, FileBlob
from tests.shards.formats.made import decode, draw_slide, header_of, make_slide
from tests.shards.images import draw, encode

PIXELS = draw_slide()
SLIDE = make_slide(PIXELS)
ROWS, COLUMNS = 8, 4  # of 512 px in 4300 x 2100


def tiles(data: bytes, name: str = "x.tif", **options: object) -> dict[int, np.ndarray]:
    """The tiles of tissue, by their number."""
    found = {}
    with open_object(BytesBlob(data, name), ReadOptions(**options)) as opened:
        for unit in range(header_of(data, name, **options).num_units):
            try:
                found[unit] = opened.decode(unit).pixels
            except Unreadable as error:
                assert error.reason == "no_tissue"  # noqa: PT017
    return found


def test_tiles_of_tissue():
    header = header_of(SLIDE, "x.tif")
    assert (header.format, header.num_units, header.height, header.width) == ("slide", 32, 512, 512)
    assert not header.is_volume
    assert header.facts["mpp"] == 0.5
    found = tiles(SLIDE)
    for unit in range(ROWS * COLUMNS):
        top, left = unit // COLUMNS * 512, unit % COLUMNS * 512
        expected = PIXELS[top : top + 512, left : left + 512]
        share = (expected[..., 1] == 120).mean()
        if share == 0 or share > 0.11:
            assert (unit in found) == (share > 0)
        if unit in found:
            np.testing.assert_array_equal(found[unit], expected)
    assert 5 < len(found) < 25


def test_the_thumbnail_only_saves_time(monkeypatch):
    with_thumbnail = set(tiles(SLIDE))
    monkeypatch.setattr(shards.formats.slides, "_MAX_THUMBNAIL_PIXELS", 0)
    assert set(tiles(SLIDE)) == with_thumbnail


def test_glass_is_not_read_at_full_size(monkeypatch):
    sizes = []
    read = openslide.OpenSlide.read_region
    monkeypatch.setattr(
        openslide.OpenSlide,
        "read_region",
        lambda self, corner, level, size: (sizes.append(size), read(self, corner, level, size))[1],
    )
    with open_object(BytesBlob(SLIDE, "x.tif"), ReadOptions()) as opened:
        for unit in (0, 1, 2):
            with pytest.raises(Unreadable):
                opened.decode(unit)
    assert len(sizes) == 1


def test_resolution():
    assert header_of(SLIDE, "x.tif", tile_mpp=1.0).num_units == 4 * 2
    centre = tiles(SLIDE, tile_mpp=1.0)[3]
    assert centre.shape == (512, 512, 3)
    expected = cv2.resize(PIXELS[1024:2048, 1024:2048], (512, 512), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(centre.astype(int), expected, atol=1)
    assert header_of(SLIDE, "x.tif", tile_mpp=0.49).num_units == 32  # close enough to the scan
    for data, options in ((SLIDE, {"tile_mpp": 0.25}), (make_slide(PIXELS, mpp=None), {"tile_mpp": 1.0})):
        with pytest.raises(Unreadable) as caught:
            header_of(data, "x.tif", **options)
        assert caught.value.reason == "no_resolution"


def test_limits():
    for options, reason in (
        ({"tile_size": 2200}, "too_small"),
        ({"tile_size": 512, "max_pixels": 512 * 511}, "too_many_pixels"),
    ):
        with pytest.raises(Unreadable) as caught:
            decode(SLIDE, "x.tif", unit=17 if "max_pixels" in options else 0, **options)
        assert caught.value.reason == reason


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="rgb", compression="zlib", **options)
    return buffer.getvalue()


def test_a_picture_in_strips_needs_no_reader_of_slides(monkeypatch):
    monkeypatch.setattr("shards.formats.registry._load", lambda kind: pytest.fail(kind))
    with pytest.raises(pytest.fail.Exception, match="tiff"):
        header_of(tiff(PIXELS), "x.tif")
    with pytest.raises(pytest.fail.Exception, match="slide"):
        header_of(SLIDE, "x.tif")


def test_plain_tiffs_stay_pictures():
    small = draw(0)
    assert header_of(tiff(small), "x.tif").format == "tiff"
    assert header_of(tiff(small, tile=(16, 16)), "x.tif").format == "tiff"
    strips = tiff(PIXELS)
    assert header_of(strips, "x.tif").format == "tiff"
    np.testing.assert_array_equal(decode(strips, "x.tif").pixels, PIXELS)
    assert header_of(tiff(PIXELS, tile=(256, 256)), "x.tif").format == "slide"
    # a name that promises a slide does not make one
    assert header_of(tiff(small), "x.svs").format == "tiff"
    np.testing.assert_array_equal(decode(tiff(small), "x.svs").pixels, small)


def test_mirax_needs_its_folder(tmp_path):
    data = encode(draw(0), "JPEG")
    with pytest.raises(Unreadable) as caught:
        header_of(data, "x.mrxs")
    assert caught.value.reason == "unsupported_format"
    (tmp_path / "x.mrxs").write_bytes(data)
    with pytest.raises(Unreadable) as caught:
        open_object(FileBlob(str(tmp_path / "x.mrxs"), len(data)), ReadOptions())
    assert caught.value.reason == "damaged"


def test_what_counts_as_tissue():
    for color, share in (((240, 240, 238), 0), ((10, 5, 40), 0), ((120, 120, 120), 0), ((180, 100, 160), 1)):
        assert tissue_share(np.full((8, 8, 3), color, np.uint8)) == share


def test_what_was_not_scanned_is_glass():
    layers = np.zeros((4, 4, 4), np.uint8)
    layers[:2] = (180, 100, 160, 255)
    laid = shards.formats.slides._lay_on_glass(Image.fromarray(layers))
    assert (laid[:2] == (180, 100, 160)).all()
    assert (laid[2:] == 255).all()
