"""The field of view: the part of an image that shows tissue, as distinct from what surrounds it.

Fundus cameras (and dermatoscopes, endoscopes) draw a bright disc, ellipse or polygon on a surround that is
black, dark grey or paper white; scanners draw a body in air, a fan, or a rotated frame. A fixed threshold
fails where the surround is not black, and Otsu's alone cuts shadows off. So the levels of surround and inside
are measured on each image, by the rules of `surrounds`, and a surround must be plausible: dark, flat, and
reaching the frame. Where it is not, the whole frame is the field of view.

Everything happens on a copy of at most `WORKING_SIZE` pixels a side, by one piece of code for the definition
and for the fast path: 4 px at 512 is less than half of the erosion that follows.

Shapes: H, W image height and width in pixels; h, w those of the working copy.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from shards.hf.surrounds import (
    Float32,
    Mask,
    Small,
    without_dark_corners,
    without_ink,
    without_padding,
    without_surround,
)

FieldOfView = Literal["adaptive", "body", "padding", "tissue", "none"]
"""What is left out: a surround; dark corners of the frame; padding; pen marks and wide glass; nothing."""

WORKING_SIZE = 128
MIN_AREA = 0.1  # a smaller field of view is not believed
PADDING_TOLERANCE = 0.012  # of the range: JPEG leaves 3 of 255 on what was 0


def soft_field_of_view(
    image: npt.NDArray[np.generic],
    kind: FieldOfView = "adaptive",
    *,
    threshold: float,
    convex: bool,
    erosion: float,
    softness: float,
    level: float | None = None,
    paper: bool = True,
) -> Float32 | None:
    """Soft mask of the field of view, from 0 at and outside the rim to 1 well inside.

    Args:
        image: (H, W) or (H, W, 3), any numeric type that OpenCV can resize.
        kind: the rule.
        threshold: the rim's level, as a share of the way from the surround's level to the inside's.
        convex: whether to fill dents, such as shadows at the rim, by taking the convex hull.
        erosion: distance from the rim, in pixels, at which the mask is one half.
        softness: width of the linear ramp from 0 to 1, in pixels.
        level: in the image's units, where the inside of kind "body" begins; None: Otsu's threshold.
        paper: whether kind "adaptive" takes white that reaches the frame for surround.

    Returns:
        (H, W) in [0, 1], where the frame's edges are rim too: most discs touch them or are cut by them. None
        when the image has no plausible surround, so that the field of view is the whole frame.
    """
    small = _working_copy(image)
    if kind == "adaptive":
        inside = without_surround(small, threshold, paper)
    elif kind == "body":
        inside = without_dark_corners(small, level)
    elif kind == "padding":
        inside = without_padding(*_extremes(image))
    else:
        inside = without_ink(small)
    if inside is None:
        return None
    mask = inside if kind == "tissue" else _largest_part(inside, convex)
    if mask.mean() < MIN_AREA or mask.all():
        return None
    height, width = image.shape[:2]
    scale = max(height, width) / max(mask.shape)
    # from the first inside pixel's center; its near edge, half a pixel out, is the rim
    framed = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    distance = (cv2.distanceTransform(framed, cv2.DIST_L2, 5)[1:-1, 1:-1] - 0.5) * scale
    ramp = np.asarray((distance - erosion) / softness + 0.5, np.float32)
    soft = cv2.resize(ramp, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(cv2.min(cv2.max(soft, 0), 1))


def _working_copy(image: npt.NDArray[np.generic]) -> Small:
    """Shrink by area, and count levels from black."""
    # (C, h, w): reducing the last axis is 30 times slower
    channels = np.array(cv2.split(_shrink(image)), np.float32)
    brightest = channels.max(axis=0)
    zero = min(float(brightest.min()), 0.0)  # zero is black, but where there are negative values
    span = max(float(brightest.max()) - zero, float(np.finfo(np.float32).tiny))
    level = np.asarray(cv2.GaussianBlur((brightest - zero) / span, (3, 3), 0))
    return Small((channels - zero) / span, level, zero, span)


def _extremes(image: npt.NDArray[np.generic]) -> tuple[Float32, Float32]:
    """Shares of black and of white pixels in each cell of the working copy, (h, w) each."""
    channels = cv2.split(image)
    lowest, highest = cv2.minMaxLoc(image.reshape(image.shape[0], -1))[:2]
    lowest = min(lowest, 0.0)
    tolerance = PADDING_TOLERANCE * (highest - lowest)
    black = np.logical_and.reduce([channel <= lowest + tolerance for channel in channels])
    white = np.logical_and.reduce([channel >= highest - tolerance for channel in channels])
    black_share, white_share = (_shrink(mask.astype(np.float32)) for mask in (black, white))
    return np.asarray(black_share, np.float32), np.asarray(white_share, np.float32)


def _shrink(image: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Bring the longer side down to WORKING_SIZE by area averaging."""
    small = image
    while max(small.shape[:2]) >= 2 * WORKING_SIZE and small.shape[0] % 2 == small.shape[1] % 2 == 0:
        half = (small.shape[1] // 2, small.shape[0] // 2)
        small = cv2.resize(small, half, interpolation=cv2.INTER_AREA)  # four times as fast as all in one
    height, width = small.shape[:2]
    scale = WORKING_SIZE / max(height, width)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = cv2.resize(small, size, interpolation=cv2.INTER_AREA)
    return small


def _largest_part(mask: Mask, convex: bool) -> Mask:
    """Cut off tabs and lettering, keep the largest component, fill its holes, and its dents if `convex`."""
    radius = max(1, round(0.03 * min(mask.shape)))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    opened = cv2.morphologyEx(mask, cv2.MORPH_OPEN, disc)
    contours, _ = cv2.findContours(opened, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled: Mask = np.zeros_like(opened)
    if contours:
        largest = max(contours, key=cv2.contourArea)
        cv2.drawContours(filled, [cv2.convexHull(largest) if convex else largest], -1, 1, cv2.FILLED)
    return filled
