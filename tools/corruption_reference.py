"""Frepa's corruptions in NumPy: plainly, tile by tile, and vectorized.

The plain ones follow the description of Frepa (arXiv 2407.14651) and the cost structure of the authors'
published code: loops over tiles and channels, normal numbers drawn for each tile, whole complex transforms in
float64. They are what `frepa_dist.corruption` is held against, in value (tests, for equal draws) and in time
(`tools/bench_corruption.py`). The vectorized ones are what one writes next: no loops, float32, the generator
of NumPy. Nothing here uses the system.

Shapes: C channels, S image side, G tiles or cells along a side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# (channel, rows, columns, mean, std) -> the numbers that stand in a tile
TileNormal = Callable[[int, slice, slice, float, float], Array]


def drawn_tile(channel: int, rows: slice, columns: slice, mean: float, std: float) -> Array:
    """Draw the numbers of one tile from NumPy's global generator, as the authors' code does."""
    size = (rows.stop - rows.start, columns.stop - columns.start)
    return np.random.normal(loc=mean, scale=std, size=size)  # noqa: NPY002


def edges(size: int, side: int, *, centered: bool) -> list[slice]:
    """Cut an axis into tiles, from its start or from its middle outward."""
    start = -(-(size // 2) // side) * side - size // 2 if centered else 0
    ends = range(-start, size, side)
    return [slice(max(end, 0), min(end + side, size)) for end in ends]


def histogram_masking(image: Array, mask: Array, tile: int, normal: TileNormal = drawn_tile) -> Array:
    """Replace the masked tiles of an image (C, S, S) by normal numbers of their mean and deviation."""
    damaged = image.copy()
    cuts = edges(image.shape[-1], tile, centered=False)
    for i, rows in enumerate(cuts):
        for j, columns in enumerate(cuts):
            if mask[i, j]:
                for channel in range(len(image)):
                    pixels = image[channel, rows, columns]
                    damaged[channel, rows, columns] = normal(
                        channel, rows, columns, np.mean(pixels), np.std(pixels)
                    )
    return damaged


def frequency_masking(
    image: Array,
    cells: Array,
    cell: int,
    strength: float,
    width: float,
    *,
    fill: TileNormal = drawn_tile,
    noise: Array | None = None,
    hermitian: bool = False,
) -> Array:
    """Mask cells of the centered spectrum of an image (C, S, S) and add noise at low frequencies.

    Args:
        image: (C, S, S), not negative.
        cells: (G, G) bool, the masked ones.
        cell: side of a cell.
        strength: of the noise, as a share of the largest magnitude.
        width: of its envelope, as a share of S.
        fill: makes what stands in masked cells.
        noise: (C, S, S) normal numbers, real or complex; None draws real ones.
        hermitian: let one half of the spectrum decide for both, else take the real part of what comes out.
    """
    size = image.shape[-1]
    spectra = np.stack([np.fft.fftshift(np.fft.fft2(channel)) for channel in image])
    cuts = edges(size, cell, centered=True)
    for i, rows in enumerate(cuts):
        for j, columns in enumerate(cuts):
            if cells[i, j]:
                for channel in range(len(image)):
                    pixels = image[channel, rows, columns]
                    spectra[channel, rows, columns] = fill(
                        channel, rows, columns, np.mean(pixels), np.std(pixels)
                    )
    axis = np.arange(size) - size // 2
    envelope = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * (width * size) ** 2))
    scale = strength * np.max(np.abs(spectra))
    if noise is None:
        disturbance = np.random.normal(loc=0, scale=scale, size=image.shape)  # noqa: NPY002
    else:
        disturbance = scale * noise
    disturbance[:, size // 2, size // 2] = 0
    spectra = spectra + envelope * disturbance
    if hermitian:
        spectra = np.stack([symmetrize(spectrum) for spectrum in spectra])
    return np.stack([np.fft.ifft2(np.fft.ifftshift(spectrum)).real for spectrum in spectra])


def symmetrize(spectrum: Array) -> Array:
    """Make one half of a centered spectrum (S, S) the conjugate of the other.

    The half of positive horizontal frequency decides; where that is its own mirror, the half of positive
    vertical frequency; where both are, the real part.
    """
    size = len(spectrum)
    result = spectrum.copy()
    for row in range(size):
        for column in range(size):
            mirrored_row, mirrored_column = -row % size, -column % size  # S is even: -S / 2 is its own mirror
            decides = column > mirrored_column or (column == mirrored_column and row > mirrored_row)
            if (row, column) == (mirrored_row, mirrored_column):
                result[row, column] = spectrum[row, column].real
            elif not decides:
                result[row, column] = np.conj(spectrum[mirrored_row, mirrored_column])
    return result


def vectorized_histogram_masking(image: Array, ratio: float, tile: int, rng: np.random.Generator) -> Array:
    """The same as `histogram_masking` for S a multiple of `tile`, without loops, in float32."""
    channels, size, _ = image.shape
    grid = size // tile
    tiles = image.reshape(channels, grid, tile, grid, tile)
    mean, std = (f(axis=(2, 4), keepdims=True) for f in (tiles.mean, tiles.std))
    noise = rng.standard_normal(tiles.shape, dtype=np.float32)
    mask = (rng.random((grid, grid)) < ratio)[None, :, None, :, None]
    result: Array = np.where(mask, mean + std * noise, tiles).reshape(image.shape)
    return result


def vectorized_frequency_masking(
    image: Array, ratio: float, cell: int, strength: float, width: float, rng: np.random.Generator
) -> Array:
    """The same as `frequency_masking` for S a multiple of two cells, without loops, in float32."""
    channels, size, _ = image.shape
    grid = size // cell
    spectrum = np.fft.fftshift(np.fft.fft2(image), axes=(1, 2))
    tiles = image.reshape(channels, grid, cell, grid, cell)
    mean, std = (f(axis=(2, 4), keepdims=True) for f in (tiles.mean, tiles.std))
    fill = (mean + std * rng.standard_normal(tiles.shape, dtype=np.float32)).reshape(image.shape)
    cells = rng.random((grid, grid)) < ratio
    cells[grid // 2 - 1 : grid // 2 + 1, grid // 2 - 1 : grid // 2 + 1] = False
    spectrum = np.where(cells.repeat(cell, 0).repeat(cell, 1), fill, spectrum)
    axis = np.arange(size, dtype=np.float32) - size // 2
    decay = np.exp(-(axis**2) / (2 * (width * size) ** 2))
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    noise *= np.float32(strength) * np.abs(spectrum).max() * decay[:, None] * decay[None, :]
    noise[:, size // 2, size // 2] = 0
    result: Array = np.fft.ifft2(np.fft.ifftshift(spectrum + noise, axes=(1, 2))).real
    return result
