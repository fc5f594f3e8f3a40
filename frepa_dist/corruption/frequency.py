"""Corruptions of the spectrum: Frepa's frequency dual-component masking, and MFM's discs.

All work on the half spectrum of `rfft2`, unshifted: columns 0 to S / 2, the rest being the conjugate at the
mirrored place. What the authors do on the whole centered spectrum before they take the real part comes to
the conjugate-symmetric part of it, (X(k) + conj X(-k)) / 2, and that needs half the spectrum only.

Shapes: B batch, C channels, S image side, W = S // 2 + 1, G cells along a side (even, zero frequency in the
middle), R and Q the distinct rows and columns of cells.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from frepa_dist.corruption.plan import Mode, num_cells
from frepa_dist.corruption.tiles import TileStats, tile_stats
from frepa_dist.spectrum import radial_frequency

CACHED_GRIDS = 16  # sizes and devices; one of 512 pixels takes 10 kB


class FrequencyDraws(NamedTuple):
    """What is drawn for `dual_component_masking`.

    Attributes:
        cells: (B, G, G) bool, true where masked, in centered order; false for the 4 in the middle.
        strength: (B,) deviation of the noise as a share of the spectrum's largest magnitude.
        width: (B,) of the noise's envelope as a share of S.
        noise: (B, C, S, W, P) standard normal, P = 2 (real and imaginary part) in mode `hermitian`, else 1.
        fill: (B, C, S, W) standard normal for what stands in masked cells; None leaves them zero.
    """

    cells: Tensor
    strength: Tensor
    width: Tensor
    noise: Tensor
    fill: Tensor | None


class _CellGrid(NamedTuple):
    """Where each bin of the half spectrum finds its cell.

    Many rows share their cell and that of their mirrored row; the few distinct pairs are worked out once and
    then copied to all rows that have them. So for columns.

    Attributes:
        rows: (2, R) distinct pairs (cell, cell of the mirrored bin).
        row_of: (S,) which pair a row has.
        columns: (2, Q) the same for columns.
        column_of: (W,) which pair a column has.
    """

    rows: Tensor
    row_of: Tensor
    columns: Tensor
    column_of: Tensor

    def own(self, table: Tensor) -> Tensor:
        """Read (..., G, G) at the cells of bins, (..., R, Q)."""
        return table.index_select(-2, self.rows[0]).index_select(-1, self.columns[0])

    def mirrored(self, table: Tensor) -> Tensor:
        """Read (..., G, G) at the cells of mirrored bins, (..., R, Q)."""
        return table.index_select(-2, self.rows[1]).index_select(-1, self.columns[1])

    def spread(self, values: Tensor, times: int = 1) -> Tensor:
        """Copy (..., R, Q) to all bins, each `times` times in its row, (..., S, W * times)."""
        columns = self.column_of.repeat_interleave(times) if times > 1 else self.column_of
        return values.index_select(-1, columns).index_select(-2, self.row_of)


class _Component(NamedTuple):
    """What masking does to a coefficient: weight * F + mean + std * normal; (B, 1 or C, R, Q) each."""

    weight: Tensor
    mean: Tensor
    std: Tensor


@lru_cache(maxsize=CACHED_GRIDS)
def _cell_grid(size: int, cell: int, device: torch.device) -> _CellGrid:
    frequency = np.fft.fftfreq(size, d=1 / size).round().astype(np.int64)
    own = frequency // cell + num_cells(size, cell) // 2
    pairs = np.stack([own, own[-np.arange(size)]])
    rows, row_of = np.unique(pairs, axis=1, return_inverse=True)
    columns, column_of = np.unique(pairs[:, : size // 2 + 1], axis=1, return_inverse=True)
    parts = (rows, row_of.reshape(-1), columns, column_of.reshape(-1))
    return _CellGrid(*(torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in parts))


def _published(masked: Tensor, stats: TileStats | None, grid: _CellGrid) -> _Component:
    """The symmetric part of masks and fill that are drawn for all cells independently."""
    here, there = grid.own(masked), grid.mirrored(masked)
    weight = 1 - (here + there) / 2
    if stats is None:
        return _Component(weight, torch.zeros_like(weight), torch.zeros_like(weight))
    mean = (here * grid.own(stats.mean) + there * grid.mirrored(stats.mean)) / 2
    # two independent normal numbers add up to one: half of their sum has this deviation
    std = (here * grid.own(stats.std).square() + there * grid.mirrored(stats.std).square()).sqrt() / 2
    return _Component(weight, mean, std)


def _hermitian(masked: Tensor, stats: TileStats | None, grid: _CellGrid) -> _Component:
    """The cells of the half spectrum decide for both halves."""
    here = grid.own(masked)
    if stats is None:
        return _Component(1 - here, torch.zeros_like(here), torch.zeros_like(here))
    return _Component(1 - here, here * grid.own(stats.mean), here * grid.own(stats.std))


def dual_component_masking(images: Tensor, draws: FrequencyDraws, cell: int, mode: Mode) -> Tensor:
    """Mask cells of high frequency and add noise of low frequency: Frepa's second corruption.

    The mean of each image and channel stays. Nothing is clipped.

    Args:
        images: (B, C, S, S) float32, S even, not negative: the largest magnitude of the spectrum is then that
            at zero frequency, and the noise's strength is a share of the largest of all channels.
        draws: the numbers drawn; `noise` and `fill` are used up.
        cell: side of a cell in bins.
        mode: see `CorruptionConfig.mode`.

    Returns:
        (B, C, S, S).
    """
    size, half = images.shape[-1], images.shape[-1] // 2
    grid = _cell_grid(size, cell, images.device)
    stats = None
    if draws.fill is not None:
        num = num_cells(size, cell)
        stats = tile_stats(images, cell, num=num, offset=(num * cell - size) // 2)
    fold = _published if mode == "published" else _hermitian
    component = fold(draws.cells[:, None].float(), stats, grid)
    spectrum = torch.fft.rfft2(images).contiguous()
    largest = spectrum[:, :, 0, 0].real.amax(dim=1)
    # as real numbers, real and imaginary in turn: a product with real ones would make those complex first
    parts = torch.view_as_real(spectrum)
    parts.flatten(-2).mul_(grid.spread(component.weight, 2))
    added = _low_noise(draws, largest, size)
    if draws.fill is not None:
        if mode == "published":  # where k = -k there are no two numbers whose half sum was taken
            draws.fill[..., ::half, ::half].mul_(math.sqrt(2))
        draws.fill.mul_(grid.spread(component.std)).add_(grid.spread(component.mean))
        added.select(-1, 0).add_(draws.fill)
    parts.narrow(-1, 0, added.shape[-1]).add_(added)
    # both halves lie in these columns, so one half is made the conjugate of the other
    for column in (0, half):
        spectrum[..., half + 1 :, column] = spectrum[..., 1:half, column].conj().flip(-1)
    return _inverse(spectrum, size)


def _low_noise(draws: FrequencyDraws, largest: Tensor, size: int) -> Tensor:
    """White noise under a Gaussian envelope, zero at zero frequency; (B, C, S, W, P) in place.

    A deviation s of real numbers at k and -k leaves s / sqrt(2) in their symmetric part (`published`);
    a complex number of deviation s has s / sqrt(2) in each part (`hermitian`). At the bins that are their
    own mirror it is s in both.
    """
    half, noise = size // 2, draws.noise
    axis = torch.fft.fftfreq(size, d=1 / size, device=largest.device)
    envelope = torch.exp(-axis.square() / (2 * (draws.width[:, None] * size).square()))  # (B, S)
    rows = envelope * (draws.strength * largest / math.sqrt(2))[:, None]
    columns = envelope[:, : half + 1].repeat_interleave(noise.shape[-1], dim=-1)
    noise.flatten(-2).mul_(rows[:, None, :, None]).mul_(columns[:, None, None])
    noise[..., ::half, ::half, :].mul_(math.sqrt(2))
    noise[..., 0, 0, :].zero_()
    return noise


def disc_pass(images: Tensor, radius: float, keep: Literal["low", "high"]) -> Tensor:
    """Keep the frequencies within a disc, or all others: the corruptions of MFM (Xie et al., 2206.07706).

    Args:
        images: (B, C, S, S) float32.
        radius: in cycles per image side; frequencies below it are low.
        keep: which ones stay.

    Returns:
        (B, C, S, S); the two ways add up to the images. Without low frequencies the mean is zero.
    """
    size = images.shape[-1]
    low = radial_frequency(size, images.device)[:, : size // 2 + 1] < radius
    spectrum = torch.fft.rfft2(images).masked_fill_(~low if keep == "low" else low, 0)
    return _inverse(spectrum, size)


def _inverse(spectrum: Tensor, size: int) -> Tensor:
    """Transform half spectra (B, C, S, W), which may be overwritten, back to images (B, C, S, S)."""
    images: Tensor
    # a subclass, such as a fake tensor whose cost is counted, has no memory that NumPy could share
    if spectrum.device.type == "cpu" and type(spectrum) is Tensor:
        # torch transforms the columns of several images twice as slowly as SciPy, which does it in place
        columns = scipy.fft.ifft(spectrum.numpy(), axis=-2, overwrite_x=True, workers=torch.get_num_threads())
        images = torch.fft.irfft(torch.from_numpy(columns), n=size)
    else:
        images = torch.fft.irfft2(spectrum, s=(size, size))
    return images
