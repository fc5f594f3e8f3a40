"""Response maps: where the high frequency of an image lies, stored small, and read for any crop of it.

Training crops and mirrors, and the tokens of a view are those of the filter on the whole image. So the
response is stored once, averaged over cells of a quarter of a patch, and the patches of a crop are ranked by
the cells that they cover.

Shapes: H, W image height and width in pixels; h, w cells of a response map.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from shards.hf.tokens import Float32, rank_tokens


def hf_map(response: npt.NDArray[np.floating[Any]], cell: int) -> npt.NDArray[np.uint8]:
    """Response map: mean |response| of each cell, as round(255 sqrt(mean / largest mean)).

    Only cells outside the field of view are 0: the others are at least 1. The map covers the whole image:
    where `cell` does not divide a side, its cells are a little longer.

    Returns:
        (max(1, H // cell), max(1, W // cell)).
    """
    rows, columns = max(1, response.shape[0] // cell), max(1, response.shape[1] // cell)
    means = cv2.resize(np.abs(response).astype(np.float32), (columns, rows), interpolation=cv2.INTER_AREA)
    largest = float(means.max())
    if largest <= 0:
        return np.zeros((rows, columns), np.uint8)
    coded = np.rint(255 * np.sqrt(means / largest))
    return np.asarray(np.maximum(coded, means > 0), np.uint8)


def indices_from_map(
    hf_map: npt.NDArray[np.uint8],
    crop: tuple[float, float, float, float],
    patch_size: int,
    keep: float,
    *,
    output_size: int,
    flip: bool = False,
) -> npt.NDArray[np.uint16]:
    """The HF tokens of a crop, ranked from the response map of the whole image.

    Args:
        hf_map: (h, w) as written by `hf_map`.
        crop: (top, left, height, width) as shares of the image's height and width.
        patch_size: in pixels of the resized crop.
        keep: share of patches to return.
        output_size: the crop is resized to output_size x output_size pixels.
        flip: whether the resized crop is mirrored left to right.

    Returns:
        (round(keep * (output_size // patch_size)^2),) patch indices, ranked as by `rank_tokens`.
    """
    top, left, height, width = crop
    num = output_size // patch_size
    rows = _cell_weights(hf_map.shape[0], top, height, num, patch_size / output_size)
    columns = _cell_weights(hf_map.shape[1], left, width, num, patch_size / output_size, flip)
    squared = np.square(hf_map.astype(np.float32))  # undoes the square root; the scale does not matter
    scores = rows @ squared @ columns.T
    inside = rows @ (hf_map > 0).astype(np.float32) @ columns.T
    patch_area = height * width * hf_map.size * (patch_size / output_size) ** 2
    return rank_tokens((scores * (inside >= 0.5 * patch_area)).ravel(), keep)


def _cell_weights(
    cells: int, start: float, length: float, num: int, step: float, flip: bool = False
) -> Float32:
    """Overlap of each patch of a crop with each cell along one axis, (num, cells), in cells."""
    edges = np.arange(num + 1) * step
    if flip:
        edges = 1 - edges
    edges = (start + edges * length) * cells
    lower, upper = np.minimum(edges[:-1], edges[1:])[:, None], np.maximum(edges[:-1], edges[1:])[:, None]
    cell = np.arange(cells)
    overlap = np.minimum(upper, cell + 1) - np.maximum(lower, cell)
    return np.asarray(np.maximum(overlap, 0), np.float32)
