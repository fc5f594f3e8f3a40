"""Draws HF tokens on an image, for pages that a person looks at."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

KEEP = 0.25  # share of tokens that is marked
TILE = 360  # longer side of what is drawn, in pixels
MARK = (60, 255, 60)


def mark_tokens(
    pixels: Pixels, tokens: npt.NDArray[np.uint16], patch_size: int, keep: float = KEEP, side: int = TILE
) -> Pixels:
    """Enlarge or shrink an image to a longer side of `side` and outline the first `keep` of its tokens.

    Args:
        pixels: (H, W) or (H, W, 3) RGB.
        tokens: (N,) all patch indices of the image, strongest first.
        patch_size: in pixels of `pixels`.
        keep: share of the tokens that is outlined.
        side: longer side of the result.

    Returns:
        (h, w, 3) RGB; the outline runs around groups of tokens, so that what they hold stays visible.
    """
    height, width = pixels.shape[:2]
    grid = cv2.copyMakeBorder(
        token_mask(tokens, height, width, patch_size, keep), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0
    )
    drawn = fit(pixels, side)
    scale = drawn.shape[1] / width

    def line(x0: int, y0: int, x1: int, y1: int) -> None:
        start, end = (
            (round(x * patch_size * scale), round(y * patch_size * scale)) for x, y in ((x0, y0), (x1, y1))
        )
        cv2.line(drawn, start, end, MARK, 2)

    for y, x in np.argwhere(grid[1:, 1:] != grid[1:, :-1]):
        line(x, y, x, y + 1)
    for y, x in np.argwhere(grid[1:, 1:] != grid[:-1, 1:]):
        line(x, y, x + 1, y)
    return drawn


def token_mask(
    tokens: npt.NDArray[np.uint16], height: int, width: int, patch_size: int, keep: float = KEEP
) -> Pixels:
    """Which patches the strongest tokens are, (rows, columns) of 0 or 1; arguments as of `mark_tokens`."""
    rows, columns = height // patch_size, width // patch_size
    chosen = np.zeros(rows * columns, np.uint8)
    chosen[tokens[: round(keep * len(tokens))]] = 1
    return chosen.reshape(rows, columns)


def fit(pixels: Pixels, side: int) -> Pixels:
    """Scale to a longer side of `side`, as RGB, in memory of its own."""
    scale = side / max(pixels.shape[:2])
    size = tuple(max(1, round(length * scale)) for length in pixels.shape[1::-1])
    fitted = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    colored = cv2.cvtColor(fitted, cv2.COLOR_GRAY2RGB) if fitted.ndim == 2 else fitted
    return np.array(colored, np.uint8)
