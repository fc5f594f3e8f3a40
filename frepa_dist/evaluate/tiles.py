"""Large images as the tiles that an encoder sees, and predictions for tiles as one of the image.

Shapes: H, W of an image, T tiles, S side of a tile, K maps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Corners = npt.NDArray[np.int64]


def tile_corners(height: int, width: int, side: int, overlap: float = 0.5) -> Corners:
    """Place tiles evenly so that they cover an image, neighbors overlapping by a share at least.

    An image smaller than a tile has one tile, which begins outside of it: see `cut_tiles`.

    Returns:
        (T, 2), the upper left corners.
    """

    def places(length: int) -> npt.NDArray[np.int64]:
        if length <= side:
            return np.array([(length - side) // 2], np.int64)
        num = int(np.ceil((length - side) / (side * (1 - overlap)))) + 1
        return np.round(np.linspace(0, length - side, num)).astype(np.int64)

    rows, columns = np.meshgrid(places(height), places(width), indexing="ij")
    return np.stack([rows.ravel(), columns.ravel()], axis=1)


def cut_tiles(
    image: npt.NDArray[Any], corners: Corners, side: int, *, mirror: bool = True
) -> npt.NDArray[Any]:
    """Cut tiles out of an image.

    Args:
        image: (..., H, W).
        corners: (T, 2).
        side: S.
        mirror: what lies outside is the image mirrored; else 0.

    Returns:
        (T, ..., S, S).
    """
    height, width = image.shape[-2:]
    margins = [(0, 0)] * (image.ndim - 2) + [_margin(height, side), _margin(width, side)]
    padded = np.pad(image, margins, mode="symmetric") if mirror else np.pad(image, margins)
    top, left = margins[-2][0], margins[-1][0]
    return np.stack([padded[..., y + top : y + top + side, x + left : x + left + side] for y, x in corners])


def _margin(length: int, side: int) -> tuple[int, int]:
    """Pixels to add before and behind, so that one tile fits."""
    before = max(0, -((length - side) // 2))
    return before, max(0, side - length - before)


def merge_tiles(tiles: npt.NDArray[Any], corners: Corners, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Put predictions together: the mean over the tiles of a pixel, which count less toward their edges.

    Args:
        tiles: (T, K, S, S).
        corners: (T, 2), of tiles that cover the image.
        shape: (H, W).

    Returns:
        (K, H, W).
    """
    kinds, side = tiles.shape[1:3]
    ramp = np.minimum(np.arange(side) + 1, side - np.arange(side)).astype(np.float32)
    weight = np.minimum.outer(ramp, ramp)
    (top, bottom), (left, right) = _margin(shape[0], side), _margin(shape[1], side)
    total = np.zeros((kinds, shape[0] + top + bottom, shape[1] + left + right), np.float32)
    weights = np.zeros(total.shape[1:], np.float32)
    for tile, (y, x) in zip(tiles, corners, strict=True):
        place = np.s_[y + top : y + top + side, x + left : x + left + side]
        total[:, *place] += tile * weight
        weights[place] += weight
    inner = np.s_[top : top + shape[0], left : left + shape[1]]
    return np.asarray(total[:, *inner] / weights[inner], np.float32)
