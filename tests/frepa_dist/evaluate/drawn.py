"""Labeled pictures for tests: two eyes of each patient, whose class is the tone of the picture."""

from __future__ import annotations

import csv

import numpy as np
from PIL import Image


def draw_labeled(folder, levels, *, num_patients=6, seed=0, split=None, spread=25):
    """Write pictures and `labels.csv` into a folder, and return the table.

    Args:
        folder: that is made.
        levels: grey level of each class.
        num_patients: of each class, with two pictures each.
        seed: of the noise.
        split: of a patient's number within the class, "train" or "test"; None gives no split.
        spread: of the noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for name, level in levels.items():
        for number in range(2 * num_patients):
            pixels = np.clip(rng.normal(level, spread, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{number}.png")
            row = [f"{name}{number}.png", name, f"p-{name}-{number // 2}"]
            rows.append(row if split is None else [*row, split(number // 2)])
    header = ["filename", "label", "patient", *([] if split is None else ["split"])]
    table = folder / "labels.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return table
