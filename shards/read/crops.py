"""Crops of an image: which rectangle, and the resized pixels.

Shapes: H, W height and width of the stored image in pixels; S side of the square that comes out.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.formats.intensity import HOUNSFIELD_RANGE

TRIES = 10


class Crop(NamedTuple):
    """A rectangle of an image in pixels, and whether it is mirrored left to right afterwards."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def random_crop(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
) -> Crop:
    """Draw a rectangle as RandomResizedCrop of torchvision does: area uniform, aspect ratio log-uniform.

    The first of ten draws that fits is taken; else the largest centered rectangle of an allowed aspect ratio.
    The number of draws from `rng` is the same in every case.

    Args:
        rng: the generator of the sample (`shards.read.draws.sample_rng`).
        height: H.
        width: W.
        scale: range of the area, as a share of H * W.
        ratio: range of width / height.
        flip: mirror every second crop.
    """
    areas = height * width * rng.uniform(*scale, size=TRIES)
    ratios = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), size=TRIES))
    along_y, along_x, coin = rng.random(3)
    heights = np.rint(np.sqrt(areas / ratios)).astype(int)
    widths = np.rint(np.sqrt(areas * ratios)).astype(int)
    fits = np.flatnonzero((heights > 0) & (heights <= height) & (widths > 0) & (widths <= width))
    mirrored = bool(flip and coin < 0.5)
    if fits.size == 0:
        aspect = min(max(width / height, ratio[0]), ratio[1])
        h, w = min(height, max(1, round(width / aspect))), min(width, max(1, round(height * aspect)))
        return Crop((height - h) // 2, (width - w) // 2, h, w, mirrored)
    h, w = int(heights[fits[0]]), int(widths[fits[0]])
    return Crop(int(along_y * (height - h + 1)), int(along_x * (width - w + 1)), h, w, mirrored)


def center_crop(height: int, width: int) -> Crop:
    """The largest centered square: the same view as resizing the short side to S and cutting S x S."""
    side = min(height, width)
    return Crop((height - side) // 2, (width - side) // 2, side, side)


def crop_shares(crop: Crop, height: int, width: int) -> tuple[float, float, float, float]:
    """Top, left, height and width of a crop as shares of the image's sides."""
    return crop.top / height, crop.left / width, crop.height / height, crop.width / width


def apply_crop(image: NDArray[Any], crop: Crop, size: int) -> NDArray[Any]:
    """Cut, resize and mirror, uint8 or int16; (H, W) or (H, W, 3) -> (S, S) or (S, S, 3) of the same type.

    Shrinking averages over areas, the one filter of OpenCV that does not alias: fine detail is what is
    to be learned, and must not come from the sampling grid. Enlarging is bicubic, as in MAE's augmentation;
    where it overshoots, values are clipped to what can be stored.
    """
    part = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    if part.shape[:2] != (size, size):
        shrinks = crop.height >= size and crop.width >= size
        part = cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
        if part.dtype == np.int16 and not shrinks:  # OpenCV itself keeps uint8 within 0..255
            part = np.clip(part, *HOUNSFIELD_RANGE)
    return part[:, ::-1] if crop.flip else part
