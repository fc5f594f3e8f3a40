"""A small dataset, built as users build theirs: two modalities, several shards, one image that repeats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.builder.build import BuildConfig, build_dataset


@pytest.fixture(scope="session")
def planned_dataset(tmp_path_factory) -> Path:
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("planned") / "shards"
    for modality, num, side in (("histopathology", 40, 64), ("fundus", 24, 80)):
        images = tmp_path_factory.mktemp(modality)
        for number in range(num):
            if number < num - 1:  # the last one has the pixels of the one before
                pixels = rng.integers(0, 256, (side, side + number % 3, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{number}.{'png' if number < num - 1 else 'tiff'}")
        build_dataset([images], root, BuildConfig(modality=modality, size=64, shard_bytes=100_000, jobs=1))
    return root
