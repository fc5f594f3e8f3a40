"""Cut the medical images that scikit-image ships into crops: what `make demo` pretrains on by default.

The retina photograph (1411 x 1411, from Wikimedia Commons, public domain) and the immunohistochemistry slide
(512 x 512, colon, scikit-image's authors' gallery) are described in `skimage.data`. Overlapping crops of two
images are no dataset: they show that the pipeline runs, not what a method is worth.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray


def cut_crops(image: NDArray[np.uint8], size: int, stride: int, least_lit: float) -> list[NDArray[np.uint8]]:
    """Square crops on a regular grid, row by row, without those that are mostly dark surround.

    Args:
        image: (H, W, 3), RGB.
        size: side of a crop in pixels.
        stride: pixels between neighboring crops.
        least_lit: least share of pixels brighter than 20 of 255 in some channel.
    """
    height, width = image.shape[:2]
    crops = []
    for top in range(0, height - size + 1, stride):
        for left in range(0, width - size + 1, stride):
            crop = image[top : top + size, left : left + size]
            if np.mean(crop.max(axis=2) > 20) >= least_lit:
                crops.append(crop)
    return crops


def write_demo_images(folder: Path) -> dict[str, int]:
    """Write the crops as FOLDER/MODALITY/NAME-000.png; returns the number of images by modality."""
    import skimage.data

    crops = {
        "fundus": cut_crops(skimage.data.retina(), size=448, stride=68, least_lit=0.6),
        "histopathology": cut_crops(skimage.data.immunohistochemistry(), size=256, stride=32, least_lit=0.0),
    }
    for modality, images in crops.items():
        (folder / modality).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            cv2.imwrite(str(folder / modality / f"{modality}-{number:03d}.png"), image[:, :, ::-1])
    return {modality: len(images) for modality, images in crops.items()}
