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

import cv2
import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.uint8]  # 0 or 1

WORKING_SIZE = 128
PAPER_WHITE = 0.97  # all channels above this share of the brightest
MIN_AREA = 0.1  # a smaller field of view is not believed
MIN_FRAME_SHARE = 0.02  # of the frame's length that a surround must take
MAX_WIDTH, MAX_RELATIVE_WIDTH = 0.015, 0.08  # half of a surround's pixels lie within this, or this x contrast
MAX_RATIO = 0.6  # of the surround's level to the inside's
MAX_SPLITS = 2


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
        (H, W) in [0, 1], where the frame's edges are rim too: most discs touch them or are cut by them. None
        when the image has no plausible surround, so that the field of view is the whole frame.
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
    framed = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    distance = (cv2.distanceTransform(framed, cv2.DIST_L2, 5)[1:-1, 1:-1] - 0.5) * scale
    ramp = np.asarray((distance - erosion) / softness + 0.5, np.float32)
    soft = cv2.resize(ramp, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(cv2.min(cv2.max(soft, 0), 1))


def _working_copy(image: npt.NDArray[np.generic]) -> tuple[Float32, Mask]:
    """Shrink by area; the brightest channel as a share of its maximum (h, w), and where it is paper white."""
    small = image
    while max(small.shape[:2]) >= 2 * WORKING_SIZE and small.shape[0] % 2 == small.shape[1] % 2 == 0:
        half = (small.shape[1] // 2, small.shape[0] // 2)
        small = cv2.resize(small, half, interpolation=cv2.INTER_AREA)  # four times as fast as all in one
    height, width = small.shape[:2]
    scale = WORKING_SIZE / max(height, width)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = cv2.resize(small, size, interpolation=cv2.INTER_AREA)
    channels = np.array(cv2.split(small), np.float32)  # (C, h, w): reducing the last axis is 30 times slower
    level, darkest = channels.max(axis=0), channels.min(axis=0)
    zero = min(float(level.min()), 0.0)  # zero is black, but where there are negative values
    span = max(float(level.max()) - zero, float(np.finfo(np.float32).tiny))
    white = (darkest - zero >= PAPER_WHITE * span).astype(np.uint8)
    return np.asarray(cv2.GaussianBlur((level - zero) / span, (3, 3), 0)), white


def _inside(level: Float32, white: Mask, threshold: float) -> Mask | None:
    """Separate the inside from a white and a dark surround; None when neither is plausible."""
    paper = _reaching_frame(white)
    if paper.any():
        paper = cv2.dilate(paper, np.ones((5, 5), np.uint8))  # its blurred edge is not dark
    rest = level[paper == 0]
    if rest.size == 0:
        return None
    surround = _dark_surround(level, paper, rest)
    if surround is None:
        return 1 - paper if paper.any() else None
    low, inside = surround
    dark = (level <= low + threshold * (inside - low)).astype(np.uint8)
    return 1 - _reaching_frame(paper | dark)


def _dark_surround(level: Float32, paper: Mask, rest: Float32) -> tuple[float, float] | None:
    """Levels of a dark surround and of the inside, or None.

    The surround is sought among the pixels along the frame (and along white paper) below Otsu's threshold,
    then, where a vignetted inside is among them, below Otsu's threshold of the darker part. It is there when
    half of them lie in a narrow interval (the shorth), well below the inside.
    """
    beyond = cv2.copyMakeBorder(paper, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1)
    along = cv2.dilate(beyond, np.ones((3, 3), np.uint8))[1:-1, 1:-1] > paper
    frame = np.sort(level[along])
    for _ in range(MAX_SPLITS):
        split = _otsu(rest)
        above = level[(level > split) & (paper == 0)]
        seeds = frame[: int(np.searchsorted(frame, split, side="right"))]
        if above.size == 0 or seeds.size < max(2, MIN_FRAME_SHARE * frame.size):
            return None
        half = seeds.size // 2
        widths = seeds[half:] - seeds[: seeds.size - half]
        start = int(np.argmin(widths))
        low = float(seeds[start : start + half + 1].mean())
        inside = float(np.median(above))
        flat = float(widths[start]) <= max(MAX_WIDTH, MAX_RELATIVE_WIDTH * (inside - low))
        if flat and low <= MAX_RATIO * inside:
            return low, inside
        rest = rest[rest <= split]
    return None


def _otsu(values: Float32) -> float:
    """Otsu's threshold of values in [0, 1]."""
    low, high = float(values.min()), float(values.max())
    coarse = ((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    split, _ = cv2.threshold(coarse, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return low + (split + 1) / 255 * (high - low)


def _reaching_frame(mask: Mask) -> Mask:
    """Keep the parts of `mask` (h, w) that touch the frame."""
    _, labels = cv2.connectedComponents(mask, connectivity=4)
    touches = np.zeros(int(labels.max()) + 1, np.uint8)
    touches[np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])] = 1
    touches[0] = 0
    kept: Mask = touches[labels]
    return kept


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
