"""Drawn images with known parts, for the tests of the field of view and of marks."""

from __future__ import annotations

import cv2
import numpy as np

PATCH = 16


def texture(shape: tuple[int, int], seed: int = 0, grain: float = 1.5) -> np.ndarray:
    """Smooth noise of standard deviation 1."""
    noise = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=shape), (0, 0), grain)
    return np.asarray(noise / noise.std())


def drawn(shape: tuple[int, int], contour: np.ndarray) -> np.ndarray:
    """The inside of a polygon, with points as shares of width and height."""
    points = np.rint(contour * np.array(shape[::-1])).astype(np.int32)
    return cv2.fillPoly(np.zeros(shape, np.uint8), [points], 1) > 0


def ellipse(shape: tuple[int, int], center: tuple[float, float], axes: tuple[float, float]) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    y, x = (y + 0.5) / shape[0], (x + 0.5) / shape[1]
    return np.hypot((x - center[0]) / axes[0], (y - center[1]) / axes[1]) <= 1


def to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def share_of_patches(mask: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """How much of each token's patch is in `mask`."""
    rows, columns = mask.shape[0] // PATCH, mask.shape[1] // PATCH
    part = mask[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH)
    return np.asarray(part.mean(axis=(1, 3)).ravel()[tokens])


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    return np.intersect1d(first, second).size / first.size


def draw_fan(size: int = 320, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A convex probe's fan of speckle on black, (size, size), and where it is."""
    angles = np.linspace(-0.7, 0.7, 40)
    arc = np.stack([0.5 + 0.2 * np.sin(angles), -0.08 + 0.2 * np.cos(angles)], axis=1)
    far = np.stack([0.5 + 0.95 * np.sin(angles), -0.08 + 0.95 * np.cos(angles)], axis=1)
    fan = drawn((size, size), np.clip(np.concatenate([arc, far[::-1]]), -1, 0.99))
    bands = 90 + 40 * np.sin(np.mgrid[:size, :size][0] / size * 40)
    image = np.where(fan, np.maximum(bands * (1 + 0.25 * texture((size, size), seed)), 12), 0)
    return to_uint8(image), fan
