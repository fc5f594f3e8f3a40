"""The HF tokens of a crop, ranked from the stored map, against those of the full-resolution response."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from shards.builder.canonical import resize_to_canonical
from shards.hf.maps import hf_map, indices_from_map
from shards.hf.modalities import find_modality
from shards.hf.tokens import hf_response
from shards.read.crops import Crop, crop_shares, random_crop
from shards.read.draws import sample_rng

SIZE, PATCH, KEEP, CELL = 224, 16, 0.25, 4
NUM = SIZE // PATCH
BINS = (0.2, 0.4, 0.6, 0.8, 1.0)  # of the crop's area


def tokens_of_response(response: np.ndarray, crop: Crop) -> set[int]:
    """The definition: |response| of the whole image, the crop cut out of it, averaged over each patch."""
    part = np.abs(response[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width])
    part = part[:, ::-1] if crop.flip else part
    scores = cv2.resize(part, (NUM, NUM), interpolation=cv2.INTER_AREA)
    inside = cv2.resize((part > 0).astype(np.float32), (NUM, NUM), interpolation=cv2.INTER_AREA)
    ranked = np.argsort(-(scores * (inside >= 0.5)).ravel(), kind="stable")
    return set(ranked[: round(KEEP * NUM * NUM)].tolist())


def overlaps(image: np.ndarray, number: int, crops_per_bin: int) -> np.ndarray:
    """Intersection over union of map's and response's tokens, for random crops, (bins, crops_per_bin)."""
    response = hf_response(image, find_modality("fundus").hf)
    stored = hf_map(response, CELL)
    height, width = image.shape[:2]
    found = np.empty((len(BINS) - 1, crops_per_bin))
    for i, j in np.ndindex(found.shape):
        rng = sample_rng(0, number, i * crops_per_bin + j, "test.crop")
        crop = random_crop(rng, height, width, scale=(BINS[i], BINS[i + 1]), ratio=(3 / 4, 4 / 3), flip=True)
        shares = crop_shares(crop, height, width)
        kept = indices_from_map(stored, shares, PATCH, KEEP, output_size=SIZE, flip=crop.flip)
        truth = tokens_of_response(response, crop)
        found[i, j] = len(truth & set(kept.tolist())) / len(truth | set(kept.tolist()))
    return found


def real_images(name: str, num: int) -> list[np.ndarray]:
    """Images of one source at canonical size, spread over it."""
    root = os.environ.get("FREPA_TEST_DATA")
    if not root:
        pytest.skip("FREPA_TEST_DATA names no folder of real images")
    folder = Path(root) / "fundus" / name
    if not folder.is_dir():
        pytest.skip(f"FREPA_TEST_DATA has no fundus/{name}")
    with (folder / "labels.csv").open(newline="") as table:
        files = sorted(row["filename"] for row in csv.DictReader(table))
    chosen = files[:: max(1, len(files) // num)][:num]
    return [resize_to_canonical(cv2.imread(str(folder / file))[:, :, ::-1].copy(), 512) for file in chosen]


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "num", "mean", "low"),
    [
        ("drive", 20, 0.95, 0.88),
        ("chasedb1", 14, 0.95, 0.88),
        ("hrf", 15, 0.95, 0.88),
        ("odir5k", 60, 0.90, 0.80),  # stored at 256 pixels, so that a patch of a small crop is two cells wide
    ],
)
def test_a_crop_keeps_the_tokens_of_the_full_resolution_response(name, num, mean, low):
    """`low` is a floor of the 5th percentile over crops."""
    crops_per_bin = 6
    found = np.concatenate(
        [overlaps(im, n, crops_per_bin) for n, im in enumerate(real_images(name, num))], axis=1
    )
    for i, values in enumerate(found):
        print(
            f"{name}: crops of {BINS[i]}-{BINS[i + 1]} of the area: IoU mean {values.mean():.3f}, "
            f"5th percentile {np.percentile(values, 5):.3f}, {values.size} crops"
        )
    print(f"{name}: IoU mean {found.mean():.3f}, 5th percentile {np.percentile(found, 5):.3f}")
    assert found.mean() >= mean
    assert np.percentile(found, 5) >= low
