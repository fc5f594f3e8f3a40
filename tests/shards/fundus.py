"""Fundus images for the tests of HF tokens: drawn ones, and real ones where a folder of them is named."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from shards.hf.modalities import find_modality
from shards.hf.tokens import HFParams, hf_response_reference, hf_scores, rank_tokens

FUNDUS = find_modality("fundus").hf


def draw_fundus(size: int = 224, seed: int = 0, surround: float = 0.0, shape: str = "disc") -> np.ndarray:
    """Vessels on a bright disc; `surround` is the grey level around it. Returns (size, size, 3) uint8."""
    rng = np.random.default_rng(seed)
    image = np.full((size, size, 3), (170, 90, 40), np.float32)
    image *= np.linspace(1.1, 0.7, size, dtype=np.float32)[:, None, None]
    for _ in range(10):
        points = np.cumsum(np.vstack([[size / 2] * 2, rng.normal(rng.normal(0, 6, 2), 4, (20, 2))]), axis=0)
        color = (110.0, 45.0, 25.0)
        cv2.polylines(image, [points.astype(np.int32)], False, color, max(1, size // 100), cv2.LINE_AA)
    image += rng.normal(0, 2, image.shape)
    outside = ~true_view(size)
    if shape == "disc":
        image[outside] = surround + rng.normal(0, 2, (int(outside.sum()), 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def true_view(size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    return np.hypot(y, x) <= 0.42 * size


def center_inside(view: np.ndarray, index: int, patch: int) -> bool:
    row, column = divmod(int(index), view.shape[1] // patch)
    return bool(view[row * patch + patch // 2, column * patch + patch // 2])


def patch_means(array: np.ndarray, patch: int) -> np.ndarray:
    """Row-major means over whole patches, by a plain loop."""
    rows, columns = array.shape[0] // patch * patch, array.shape[1] // patch * patch
    corners = [(row, column) for row in range(0, rows, patch) for column in range(0, columns, patch)]
    return np.array([array[r : r + patch, c : c + patch].mean() for r, c in corners])


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return np.intersect1d(first, second).size / max(1, first.size)


def reference_tokens(image: np.ndarray, params: HFParams = HFParams()) -> np.ndarray:  # noqa: B008 (frozen)
    return rank_tokens(hf_scores(hf_response_reference(image, params), 16), 0.25)


def real_images(name: str, size: int, step: int = 1) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Images of one source at (size, size), with their masks as shares of a pixel."""
    root = os.environ.get("FREPA_TEST_DATA")
    if not root:
        pytest.skip("FREPA_TEST_DATA names no folder of real images")
    folder = Path(root) / "fundus" / name
    if not folder.is_dir():
        pytest.skip(f"FREPA_TEST_DATA has no fundus/{name}")
    images = []
    with (folder / "labels.csv").open(newline="") as table:
        for row in list(csv.DictReader(table))[::step]:
            pixels = [(kind, row[kind]) for kind in ("filename", "mask", "fov") if row.get(kind)]
            loaded = {
                kind: cv2.resize(cv2.imread(str(folder / file)), (size, size), interpolation=cv2.INTER_AREA)
                for kind, file in pixels
            }
            image = np.ascontiguousarray(loaded.pop("filename")[:, :, ::-1])
            images.append((image, {kind: mask[:, :, 0] / 255.0 for kind, mask in loaded.items()}))
    return images
