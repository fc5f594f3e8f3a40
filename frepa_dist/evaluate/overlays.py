"""Pictures for a page: what was found over what is there, heat over an image, and their sizes.

Shapes: H, W of an image.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from frepa_dist.evaluate.masks import Mask
from shards.formats.common import Pixels

Gallery = list[list[tuple[Pixels, str]]]
"""Rows of pictures (H, W, 3) with their captions, for `shards.support.page.Page.gallery`."""

MAX_SIDE = 512  # of a picture on the page
HIT, MISS, FALSE_ALARM = (0, 200, 130), (255, 205, 0), (225, 30, 200)
"""Colors that stay apart for color-blind readers, and from a grey picture."""
LEGEND = "green: found and there; yellow: missed; magenta: found and not there"
DIMMED = 0.55


def to_picture(image: Pixels) -> Pixels:
    """(3, H, W) -> (H, W, 3), no side above `MAX_SIDE`."""
    return fit_picture(np.ascontiguousarray(image.transpose(1, 2, 0)))


def fit_picture(picture: Pixels, max_side: int = MAX_SIDE) -> Pixels:
    """Average a picture (H, W, 3) down where a side is longer than allowed."""
    height, width = picture.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return picture
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    smaller: Pixels = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return smaller


def overlay_masks(image: Pixels, truth: Mask, found: Mask, where: Mask) -> Pixels:
    """Color what was found, missed and falsely found over the dimmed grey picture; see `LEGEND`.

    Args:
        image: (3, H, W).
        truth: (H, W).
        found: (H, W).
        where: (H, W), pixels that count; the others stay black.

    Returns:
        (H, W, 3), at the size of the image: fit it to the page.
    """
    drawn = np.repeat((_grey(image) * DIMMED * where)[..., None], 3, axis=2).astype(np.uint8)
    for chosen, color in ((truth & found, HIT), (truth & ~found, MISS), (~truth & found, FALSE_ALARM)):
        drawn[chosen & where] = color
    return drawn


def overlay_heat(image: Pixels, heat: npt.NDArray[np.floating[Any]], truth: Mask) -> Pixels:
    """Lay heat over the grey picture, from nothing at its median to full color at its largest.

    Args:
        image: (3, H, W).
        heat: (H, W).
        truth: (H, W), whose outline is drawn.

    Returns:
        (H, W, 3).
    """
    low, high = float(np.median(heat)), float(heat.max())
    share = np.clip((heat - low) / (high - low), 0, 1) if high > low else np.zeros_like(heat)
    colors = cv2.applyColorMap(np.round(share * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    weight = 0.85 * share[..., None]
    drawn = ((1 - weight) * _grey(image)[..., None] + weight * colors).round().astype(np.uint8)
    outlines, _ = cv2.findContours(truth.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    thickness = max(1, round(max(truth.shape) / 300))
    return np.asarray(cv2.drawContours(np.ascontiguousarray(drawn), outlines, -1, HIT, thickness), np.uint8)


def _grey(image: Pixels) -> npt.NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(image.transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY))
