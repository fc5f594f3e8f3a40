"""Marks that are no tissue: burnt-in lettering, callipers, lead letters, electrodes, specular highlights.

They are brighter than most of the image and compact: shorter than a share of the image both along rows and
along columns, so that ribs, fasciae and vessels, which are thin but long, are not among them. In colour
images they are white as well, so that the darkest channel tells them from mucosa and blood.

They are painted over before the filter, which then finds nothing there; so patches that hold little else
rank low, and a patch with a letter in its corner is ranked by the rest of it.

Shapes: H, W image height and width in pixels. Lengths are shares of the shorter side.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.uint8]  # 0 or 1

MAX_LENGTH = 0.06  # of a mark, both along rows and along columns
MARGIN = 0.008  # around what is found: marks are blurred by resizing and ringed by JPEG
MIN_LEVEL = 0.6  # of the brightest level
SURROUNDINGS = 0.08  # side of the window whose mean a mark is painted with


def find_marks(image: npt.NDArray[np.generic], contrast: float) -> Mask | None:
    """Find small bright marks.

    Args:
        image: (H, W) or (H, W, 3), any numeric type.
        contrast: how far a mark exceeds what is left of it and right of it, and what is above and below, as
            a share of the range from the darkest level (or 0) to the brightest.

    Returns:
        (H, W), 1 on marks and a narrow margin; None when there are none.
    """
    levels = _whiteness(image)
    side = min(levels.shape)
    length = max(3, round(MAX_LENGTH * side)) | 1
    along_row = cv2.morphologyEx(levels, cv2.MORPH_OPEN, np.ones((1, length), np.uint8))
    along_column = cv2.morphologyEx(levels, cv2.MORPH_OPEN, np.ones((length, 1), np.uint8))
    excess = cv2.subtract(levels, cv2.max(along_row, along_column))
    top = cv2.minMaxLoc(levels)[1]
    high = cv2.threshold(excess, contrast * top, 1, cv2.THRESH_BINARY)[1]
    bright = cv2.threshold(levels, MIN_LEVEL * top, 1, cv2.THRESH_BINARY)[1]
    found = cv2.bitwise_and(high, bright)
    if not cv2.hasNonZero(found):
        return None
    width = 2 * max(1, round(MARGIN * side)) + 1
    return np.asarray(cv2.dilate(found, np.ones((width, width), np.uint8)), np.uint8)


def _whiteness(image: npt.NDArray[np.generic]) -> Mask:
    """The darkest channel in 0..255, where 0 is black, or the lowest level where that is negative, (H, W)."""
    levels: Any = image
    if image.ndim == 3:
        red, green, blue = cv2.split(image)
        levels = cv2.min(cv2.min(red, green), blue)
    if levels.dtype == np.uint8:
        return np.asarray(levels)
    low, high = min(float(levels.min()), 0.0), float(levels.max())
    if high <= low:
        return np.zeros(levels.shape, np.uint8)
    return np.asarray(np.rint((levels.astype(np.float32) - low) * (255 / (high - low))), np.uint8)


def paint_over(channel: npt.NDArray[Any], marks: Mask) -> npt.NDArray[Any]:
    """Replace marks by the mean of the unmarked pixels around them, in place.

    Args:
        channel: (H, W) float32 or float64.
        marks: (H, W), 1 on marks.

    Returns:
        `channel`; where a window holds nothing but marks, the mean of all unmarked pixels is taken.
    """
    height, width = channel.shape
    unmarked = 1 - marks
    if not cv2.hasNonZero(unmarked):
        return channel
    where = marks.view(np.bool_)
    level = cv2.mean(channel, mask=unmarked)[0]
    channel[where] = level
    # a quarter of the size is enough for means over a window, and ten times as fast
    size = (max(1, width // 4), max(1, height // 4))
    window = 2 * max(1, round(SURROUNDINGS * min(size) / 2)) + 1
    sums = cv2.blur(cv2.resize(channel, size, interpolation=cv2.INTER_AREA) - level, (window, window))
    shares = cv2.resize(unmarked * np.uint8(255), size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    weights = cv2.blur(shares, (window, window))
    means = np.asarray(level + sums / np.maximum(weights, 1e-2), channel.dtype)
    np.copyto(channel, cv2.resize(means, (width, height), interpolation=cv2.INTER_LINEAR), where=where)
    return channel
