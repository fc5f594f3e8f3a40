"""The field of view: the part of a photograph that shows tissue, as distinct from the camera's surround.

Fundus cameras (and dermatoscopes, endoscopes) draw a bright disc, ellipse or polygon on a surround that is
black, dark grey or paper white. A fixed threshold fails where the surround is not black, and Otsu's alone
cuts shadows off. So the levels of surround and inside are measured on each image, and the surround must be
plausible: dark, flat, and reaching the frame. Where it is not, the whole frame is the field of view.

Everything happens on a copy of at most `WORKING_SIZE` pixels a side, by one piece of code for the definition
and for the fast path: 4 px at 512 is less than half of the erosion that follows.

Shapes: H, W image height and width in pixels; h, w those of the working copy.
"""

from __future__ import annotations

from functools import reduce

import cv2
import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

WORKING_SIZE = 128
SATURATED = 0.97  # paper-white corners: all channels above this share of the image's maximum
MIN_CONTRAST = 0.04  # inside minus surround, as a share of the image's range
MIN_AREA = 0.1  # a smaller field of view is not believed
MAX_SPREAD = 0.25  # a surround is flat: its 90th minus 10th percentile, as a share of inside minus surround


def soft_field_of_view(
    image: npt.NDArray[np.generic], *, threshold: float, convex: bool, erosion: float, softness: float
) -> Float32 | None:
    """Soft mask of the field of view, from 0 at and outside the rim to 1 well inside.

    Args:
        image: (H, W) or (H, W, 3), any numeric type that OpenCV can resize.
        threshold: the rim's level, as a share of the way from the surround's level to the inside's.
        convex: whether to fill dents, such as shadows at the rim, by taking the convex hull.
        erosion: distance from the rim, in pixels, at which the mask is one half.
        softness: width of the linear ramp from 0 to 1, in pixels.

    Returns:
        (H, W) in [0, 1]; the frame's own edges are no rim. None when the image has no plausible surround, so
        that the field of view is the whole frame.
    """
    level, white = _working_copy(image)
    inside = _inside(level, white, threshold)
    if inside is None:
        return None
    mask = _largest_part(inside, convex)
    if mask.mean() < MIN_AREA or mask.all():
        return None
    height, width = image.shape[:2]
    scale = max(height, width) / max(mask.shape)
    # from the first inside pixel's center; its near edge, half a pixel out, is the rim
    distance = (cv2.distanceTransform(mask, cv2.DIST_L2, 5) - 0.5) * scale
    ramp = np.asarray((distance - erosion) / softness + 0.5, np.float32)
    soft = cv2.resize(ramp, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(cv2.min(cv2.max(soft, 0), 1))


def _working_copy(image: npt.NDArray[np.generic]) -> tuple[Float32, Bool]:
    """Shrink by area; return the brightest channel scaled to [0, 1] (h, w), and where it is paper white."""
    height, width = image.shape[:2]
    scale = min(1.0, WORKING_SIZE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image
    channels = cv2.split(small.astype(np.float32))
    level, darkest = reduce(cv2.max, channels), reduce(cv2.min, channels)
    low, high, _, _ = cv2.minMaxLoc(level)
    if high <= low:
        return np.zeros_like(level), np.zeros(level.shape, bool)
    white = darkest >= low + SATURATED * (high - low)
    return np.asarray(cv2.GaussianBlur((level - low) / (high - low), (3, 3), 0)), white


def _inside(level: Float32, white: Bool, threshold: float) -> Bool | None:
    """Separate the inside from a dark and a white surround; None when there is no plausible surround."""
    paper = _reaching_frame(white)
    rest = level[~paper]
    if rest.size == 0:
        return None
    split = _otsu(rest)
    dark = _reaching_frame(paper | (level <= split)) & ~paper
    if not dark.any():
        return ~paper if paper.any() else None
    low, surround, high = np.percentile(level[dark], (10, 50, 90))
    inside = float(np.median(level[~paper & ~dark])) if (~paper & ~dark).any() else surround
    contrast = inside - surround
    if contrast < MIN_CONTRAST or high - low > MAX_SPREAD * contrast:
        return ~paper if paper.any() else None
    outside = _reaching_frame(paper | (level <= surround + threshold * contrast))
    return ~outside


def _otsu(values: Float32) -> float:
    """Otsu's threshold of values in [0, 1]."""
    split, _ = cv2.threshold((values * 255).astype(np.uint8), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return float(split) / 255


def _reaching_frame(mask: Bool) -> Bool:
    """Keep the parts of `mask` (h, w) that touch the frame."""
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    touches = np.zeros(int(labels.max()) + 1, bool)
    touches[np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])] = True
    touches[0] = False
    kept: Bool = touches[labels]
    return kept


def _largest_part(mask: Bool, convex: bool) -> npt.NDArray[np.uint8]:
    """Cut off tabs and lettering, keep the largest component, fill its holes, and its dents if `convex`."""
    radius = max(1, round(0.03 * min(mask.shape)))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, disc)
    contours, _ = cv2.findContours(opened, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros_like(opened)
    if contours:
        largest = max(contours, key=cv2.contourArea)
        cv2.drawContours(filled, [cv2.convexHull(largest) if convex else largest], -1, 1, cv2.FILLED)
    return filled
