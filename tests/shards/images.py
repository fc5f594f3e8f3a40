"""Synthetic images for the tests: textured, small, each seed another one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image


def draw(seed: int, height: int = 80, width: int = 96, channels: int = 3) -> np.ndarray:
    """A smooth background with fine structure, (H, W, C) or (H, W) uint8."""
    rng = np.random.default_rng(seed)
    shape = (height, width) if channels == 1 else (height, width, channels)
    smooth = cv2.GaussianBlur(rng.normal(0, 1, shape), (0, 0), 8)
    fine = cv2.GaussianBlur(rng.normal(0, 1, shape), (0, 0), 1)
    return np.clip(128 + 400 * smooth + 60 * fine, 0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """Encode by Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write_images(folder: Path, names: list[str], first_seed: int = 0, **options: Any) -> Path:
    """Write one image per name, the format by its suffix; return the folder."""
    kinds = {".png": "PNG", ".jpg": "JPEG", ".tif": "TIFF", ".bmp": "BMP", ".webp": "WEBP"}
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw(first_seed + number, **options), kinds[path.suffix]))
    return folder


def read_tree(root: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by relative path."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
