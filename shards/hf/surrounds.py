"""Rules that tell what an image shows from what surrounds it, on a small copy: one rule a kind of surround.

Each takes the small copy and returns the inside as a mask (h, w), or None where no surround is plausible, so
that the whole frame is inside. `field_of_view` makes the small copy and shapes the result.

- `without_surround`: photographs of a disc, ellipse or octagon, X-rays, MRI: a dark, flat surround that
  reaches the frame, and paper white that does.
- `without_dark_corners`: CT, dermoscopy: dark areas that hold a corner of the frame. Lungs and lesions that
  are cut by the frame are as dark as the air or the tube, but do not reach its corners.
- `without_padding`: OCT, ultrasound: exactly black or white areas that reach the frame.
- `without_ink`: histopathology: neither pen marks nor wide glass.

Shapes: h, w height and width of the small copy in pixels; C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.uint8]  # 0 or 1

PAPER_WHITE = 0.97  # all channels above this share of the brightest
MIN_FRAME_SHARE = 0.02  # of the frame's length that a surround must take
MAX_WIDTH, MAX_RELATIVE_WIDTH = 0.015, 0.08  # half of a surround's pixels lie within this, or this x contrast
MAX_RATIO = 0.6  # of the surround's level to the inside's
MAX_SPLITS = 2
FLAT_SHARE = 0.98  # of the full-size pixels that a cell of padding must hold
PADDING_WIDTH = 3  # of padding at least, in pixels of the small copy: less is a dark or bright spot
INK_EXCESS, INK_BLACK = 0.1, 0.2  # green above red; the brightest channel of black ink
GLASS_LEVEL, GLASS_CHROMA = 0.75, 0.12  # the darkest channel at least; spread of the channels at most
GLASS_MARGIN = 0.06  # of glass next to tissue that stays inside, as a share of the shorter side


class Small(NamedTuple):
    """A copy of an image, shrunk by area; levels as shares of the brightest, 0 black (or the lowest level).

    Attributes:
        channels: (C, h, w).
        level: (h, w) the brightest channel, slightly smoothed.
        zero: the level of black in the image's own units.
        span: from black to the brightest level, in the image's own units.
    """

    channels: Float32
    level: Float32
    zero: float
    span: float


def without_surround(small: Small, threshold: float, paper: bool) -> Mask | None:
    """Separate the inside from a dark surround and, if `paper`, from paper white; both must reach the frame.

    Args:
        small: the image.
        threshold: the rim's level, as a share of the way from the surround's level to the inside's.
        paper: whether white that reaches the frame is surround.
    """
    white = np.zeros(small.level.shape, np.uint8)
    if paper:
        white = _reaching_frame((small.channels.min(axis=0) >= PAPER_WHITE).astype(np.uint8))
    if white.any():
        white = cv2.dilate(white, np.ones((5, 5), np.uint8))  # its blurred edge is not dark
    rest = small.level[white == 0]
    if rest.size == 0:
        return None
    surround = _dark_surround(small.level, white, rest)
    if surround is None:
        return 1 - white if white.any() else None
    low, inside = surround
    dark = (small.level <= low + threshold * (inside - low)).astype(np.uint8)
    return 1 - _reaching_frame(white | dark)


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


def without_dark_corners(small: Small, level: float | None) -> Mask | None:
    """Separate the inside from dark areas that hold a corner of the frame.

    Args:
        small: the image.
        level: where the inside begins, in the image's own units; None: at Otsu's threshold, or lower, so
            that dark corners are well below the median of the brighter part.
    """
    if level is None:
        split = _otsu(small.level.ravel())
        split = min(split, MAX_RATIO * float(np.median(small.level[small.level >= split])))
    else:
        split = min(max((level - small.zero) / small.span, -1.0), 2.0)  # also for a flat image
    dark = (small.level <= split).astype(np.uint8)
    _, labels = cv2.connectedComponents(dark, connectivity=4)
    corners = np.unique(labels[[0, 0, -1, -1], [0, -1, 0, -1]])
    outside = np.isin(labels, corners[corners > 0])
    if not outside.any() or outside.all():
        return None
    return (~outside).astype(np.uint8)


def without_padding(black: Float32, white: Float32) -> Mask | None:
    """Leave out black and white areas without any noise that reach the frame: wedges, bars, beside a fan.

    Args:
        black: (h, w) shares of exactly black pixels.
        white: (h, w) shares of exactly white pixels.
    """
    outside = np.zeros(black.shape, np.uint8)
    square = np.ones((PADDING_WIDTH, PADDING_WIDTH), np.uint8)
    for share in (black, white):
        flat = cv2.morphologyEx((share >= FLAT_SHARE).astype(np.uint8), cv2.MORPH_OPEN, square)
        outside |= _reaching_frame(flat)
    return 1 - outside if outside.any() else None


def without_ink(small: Small) -> Mask | None:
    """Leave out pen marks, which are black, or greener than red as no stain is, and glass far from tissue."""
    if len(small.channels) != 3:
        return None
    red, green, _ = small.channels
    brightest, darkest = small.channels.max(axis=0), small.channels.min(axis=0)
    ink = (green - red > INK_EXCESS) | (brightest < INK_BLACK)
    ink = cv2.morphologyEx(ink.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    ink = cv2.dilate(ink, np.ones((5, 5), np.uint8))  # its blurred edge has the colour of tissue
    glass = (darkest >= GLASS_LEVEL) & (brightest - darkest <= GLASS_CHROMA)
    width = 2 * max(1, round(GLASS_MARGIN * min(glass.shape))) + 1
    wide = cv2.erode(glass.astype(np.uint8), np.ones((width, width), np.uint8))
    inside = 1 - (ink | wide)
    return np.asarray(inside) if inside.any() and not inside.all() else None


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
