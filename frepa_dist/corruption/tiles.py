"""Masking of tiles in the pixels: with noise of their own mean and deviation (Frepa), or with zero.

Shapes: B batch, C channels, S image side, G tiles along a side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the name torch's users know)
from torch import Tensor


class TileStats(NamedTuple):
    """Mean and standard deviation (of the population) of the pixels of each tile, (B, C, G, G) each."""

    mean: Tensor
    std: Tensor


def spread_tiles(values: Tensor, tile: int, size: int, offset: int = 0) -> Tensor:
    """Give each pixel the value of its tile.

    Args:
        values: (..., G, G).
        tile: side of a tile.
        size: S.
        offset: how many pixels of the first tile lie outside the image.

    Returns:
        (..., S, S).
    """
    bands = _spread_bands(values, tile, size, offset)
    return bands.expand(*bands.shape[:-2], size // bands.shape[-3], size).reshape(
        *values.shape[:-2], size, size
    )


def _spread_bands(values: Tensor, tile: int, size: int, offset: int) -> Tensor:
    """Give each column the value of its tile, for bands of rows that have the same values.

    What is spread along columns only broadcasts against `_as_bands` without being written out.

    Returns:
        (..., R, 1, S) for R bands of equal height: the rows of tiles, or all rows where tiles are cut.
    """
    place = (torch.arange(size, device=values.device) + offset) // tile
    bands = values.index_select(-1, place)
    if offset or size % tile:
        bands = bands.index_select(-2, place)
    return bands.unsqueeze(-2)


def _as_bands(images: Tensor, bands: Tensor) -> Tensor:
    """View (B, C, S, S) as (B, C, R, S / R, S)."""
    return images.unflatten(-2, (bands.shape[-3], -1))  # type: ignore[no-untyped-call, no-any-return]


def tile_stats(images: Tensor, tile: int, *, num: int, offset: int = 0) -> TileStats:
    """Measure tiles; pixels outside the image count for nothing.

    Args:
        images: (B, C, S, S).
        tile: side of a tile.
        num: G; the tiles cover the image.
        offset: how many pixels of the first tile lie outside the image.
    """
    size = images.shape[-1]
    ends = torch.arange(num + 1, device=images.device) * tile - offset
    inside = ends.clamp(0, size).diff().float()
    count = inside[:, None] * inside[None, :]
    pad = (offset, num * tile - offset - size)

    def sum_tiles(x: Tensor) -> Tensor:
        if any(pad):
            x = F.pad(x, (*pad, *pad))
        rows = x.reshape(*x.shape[:2], num, tile, -1).sum(-2)  # along whole rows: contiguous
        return rows.reshape(*x.shape[:2], num, num, tile).sum(-1)

    mean = sum_tiles(images) / count
    # in two passes: the difference of mean square and squared mean would give flat tiles a deviation
    bands = _spread_bands(mean, tile, size, offset)
    deviation = (_as_bands(images, bands) - bands).view(images.shape)
    return TileStats(mean, (sum_tiles(deviation.square_()) / count).sqrt_())


def noise_masking(images: Tensor, mask: Tensor, noise: Tensor, tile: int) -> Tensor:
    """Replace masked tiles by noise of their mean and deviation: Frepa's histogram-equalized masking.

    The grey levels of the image keep their distribution, unlike with a constant. Nothing is clipped.

    Args:
        images: (B, C, S, S) float32, contiguous.
        mask: (B, G, G) bool, true where masked; the same in all channels.
        noise: (B, C, S, S) standard normal, contiguous; it becomes the result.
        tile: side of a tile in pixels.

    Returns:
        (B, C, S, S).
    """
    size = images.shape[-1]
    stats = tile_stats(images, tile, num=mask.shape[-1])
    mean, std, hidden = (
        _spread_bands(values, tile, size, 0) for values in (stats.mean, stats.std, mask[:, None])
    )
    filled = _as_bands(noise, mean).mul_(std).add_(mean)
    torch.where(hidden, filled, _as_bands(images, mean), out=filled)
    return noise


def zero_masking(images: Tensor, mask: Tensor, tile: int) -> Tensor:
    """Set masked tiles to zero; the arguments are those of `noise_masking`, the images stay."""
    return images.masked_fill(spread_tiles(mask, tile, images.shape[-1])[:, None], 0)
