"""Whole-slide images as tiles of a regular grid; tiles of glass are left out.

The grid starts at the top left corner of the scan; what is left at the right and the bottom edge and fills no
tile belongs to none. A tile is read from the coarsest level that is fine enough, and brought to its size by
area averaging. What the scanner did not visit counts as glass.

Tissue is what has color: a pixel whose channels lie 20 or more apart and that is not nearly black. Most glass
is told from a thumbnail, once a slide. Pen marks count as tissue; a grey stain would count as glass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import openslide

from shards.formats import pictures
from shards.formats.common import (
    MAX_UNITS,
    Decoded,
    Header,
    Opened,
    Pixels,
    Raw,
    ReadOptions,
    Unreadable,
    decoder_faults,
    readable,
)
from shards.stores.blobs import Blob, FileBlob

_MIN_CHROMA = 20  # of 255: how far the channels of tissue lie apart at least
_MIN_VALUE = 50  # of 255: darker is the edge of the slide, or a fold of dirt
_CELLS_PER_TILE = 16  # of the thumbnail, along a side
_MAX_THUMBNAIL_PIXELS = 1 << 24
_MAX_ENLARGEMENT = 1.05  # how much finer than the scan `tile_mpp` may be


@dataclass(frozen=True)
class _Grid:
    """Tiles of a slide: `span` pixels of the scan on a side, in `columns` x `rows`."""

    span: float
    columns: int
    rows: int
    mpp: float | None


def read_header(blob: Blob, options: ReadOptions) -> Header:
    """Describe a slide; needs the whole object as a file.

    A large tiled TIFF that openslide does not know is a picture.

    Raises:
        Unreadable: it is damaged, or smaller than a tile.
    """
    with ExitStack() as stack:
        slide = _open(blob, stack)
        if slide is None:
            return pictures.read_header(blob)
        grid = _lay_grid(slide, options)
        magnification = _number(slide, openslide.PROPERTY_NAME_OBJECTIVE_POWER)
        facts = {"mpp": grid.mpp, "magnification": magnification}
        return Header(
            format="slide",
            num_units=grid.columns * grid.rows,
            height=options.tile_size,
            width=options.tile_size,
            channels=3,
            facts={name: float(f"{value:.6g}") for name, value in facts.items() if value is not None},
        )


def open_slide(blob: Blob, options: ReadOptions) -> Opened:
    """Open a slide, whose units are its tiles, row by row.

    Raises:
        Unreadable: as `read_header`.
    """
    with ExitStack() as stack:
        slide = _open(blob, stack)
        if slide is None:
            return pictures.open_picture(blob, options)
        return _Slide(slide, _lay_grid(slide, options), options, stack.pop_all())


def tissue_share(pixels: Pixels) -> float:
    """How much of an RGB image has the color of stained tissue, 0 to 1."""
    return float(_tissue_mask(pixels, _MIN_CHROMA).mean())


class _Slide(Opened):
    def __init__(self, slide: Any, grid: _Grid, options: ReadOptions, files: ExitStack) -> None:
        self._slide, self._grid, self._options, self._files = slide, grid, options, files
        self._is_glass: npt.NDArray[np.bool_] | None = None

    def decode(self, unit: int) -> Decoded:
        row, column = divmod(unit, self._grid.columns)
        with decoder_faults("openslide", "PIL"):
            if self._is_glass is None:
                self._is_glass = self._find_glass()
            if self._is_glass[row, column]:
                raise Unreadable("no_tissue")
            pixels = self._read(row, column)
        if tissue_share(pixels) < self._options.min_tissue:
            raise Unreadable("no_tissue")
        return Decoded(pixels)

    def arrays(self) -> Iterator[Raw]:
        return readable(self, self._grid.columns * self._grid.rows)

    def close(self) -> None:
        self._files.close()

    def _read(self, row: int, column: int) -> Pixels:
        span, size = self._grid.span, self._options.tile_size
        level = self._slide.get_best_level_for_downsample(span / size * 1.01)
        side = max(1, round(span / self._slide.level_downsamples[level]))
        if side * side > self._options.max_pixels:
            raise Unreadable("too_many_pixels", f"{side} x {side}")
        corner = (round(column * span), round(row * span))
        pixels = _lay_on_glass(self._slide.read_region(corner, level, (side, side)))
        if side == size:
            return pixels
        return np.asarray(cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA), np.uint8)

    def _find_glass(self) -> npt.NDArray[np.bool_]:
        """Which tiles (rows, columns) have no trace of color on a thumbnail.

        Averaging over a cell dilutes what is small, so half the color counts there; and a tile with the least
        of tissue that is asked for still shows it. Without a level that is small enough, none are told so.
        """
        grid = self._grid
        unknown = np.zeros((grid.rows, grid.columns), bool)
        level = self._slide.get_best_level_for_downsample(grid.span / _CELLS_PER_TILE)
        width, height = self._slide.level_dimensions[level]
        num_cells = grid.rows * grid.columns * _CELLS_PER_TILE**2
        if max(width * height, num_cells) > min(_MAX_THUMBNAIL_PIXELS, self._options.max_pixels):
            return unknown
        thumbnail = _lay_on_glass(self._slide.read_region((0, 0), level, (width, height)))
        step = grid.span / self._slide.level_downsamples[level]
        covered = thumbnail[: round(grid.rows * step), : round(grid.columns * step)]
        cells = (grid.columns * _CELLS_PER_TILE, grid.rows * _CELLS_PER_TILE)
        small = cv2.resize(covered, cells, interpolation=cv2.INTER_AREA)
        mask = _tissue_mask(np.asarray(small, np.uint8), _MIN_CHROMA // 2)
        shares = mask.reshape(grid.rows, _CELLS_PER_TILE, grid.columns, _CELLS_PER_TILE).mean(axis=(1, 3))
        return np.asarray(shares < self._options.min_tissue / 4)


def _open(blob: Blob, stack: ExitStack) -> Any:
    """The slide, or None for a TIFF that is none; closed with the stack."""
    is_mirax = blob.name.lower().endswith(".mrxs")
    if is_mirax and not isinstance(blob, FileBlob):
        fix = "copy the slide with its folder to this machine"
        raise Unreadable("unsupported_format", "MIRAX is several files", fix=fix)
    path = stack.enter_context(blob.as_file())
    with decoder_faults("openslide", "PIL"):
        if openslide.OpenSlide.detect_format(path) is None:
            if is_mirax:
                raise Unreadable("damaged", "MIRAX")
            return None
        return stack.enter_context(openslide.OpenSlide(path))


def _lay_grid(slide: Any, options: ReadOptions) -> _Grid:
    width, height = slide.dimensions
    mpp = _number(slide, openslide.PROPERTY_NAME_MPP_X)
    span = float(options.tile_size)
    if options.tile_mpp is not None:
        if mpp is None:
            fix = "set `tile_mpp` to null to take slides as they were scanned"
            raise Unreadable("no_resolution", fix=fix)
        if options.tile_mpp * _MAX_ENLARGEMENT < mpp:
            raise Unreadable("no_resolution", f"scanned at {mpp:.3g} micrometers per pixel")
        span *= max(1.0, options.tile_mpp / mpp)
    columns, rows = int(width / span), int(height / span)
    if columns * rows == 0:
        raise Unreadable("too_small", f"{width} x {height}")
    if columns * rows > MAX_UNITS:
        raise Unreadable("too_many_units")
    return _Grid(span, columns, rows, mpp)


def _number(slide: Any, name: str) -> float | None:
    """A positive number among a slide's properties."""
    try:
        number = float(slide.properties.get(name, "nan"))
    except ValueError:
        return None
    return number if 0 < number < 1e6 else None


def _lay_on_glass(region: Any) -> Pixels:
    """RGBA with what was not scanned transparent, as RGB with it white."""
    layers = np.asarray(region)
    color = np.ascontiguousarray(layers[:, :, :3])
    color[layers[:, :, 3] == 0] = 255
    return color


def _tissue_mask(pixels: Pixels, min_chroma: int) -> npt.NDArray[np.bool_]:
    highest, lowest = pixels.max(axis=2), pixels.min(axis=2)
    return np.asarray((highest - lowest >= min_chroma) & (highest >= _MIN_VALUE))
