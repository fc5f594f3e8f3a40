"""Pictures for tests: of two eyes of each patient, whose class is their tone; with masks of what is dark."""

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


def draw_masked(folder, num=8, seed=0, height=72, width=90):
    """Write dark blocks on a noisy ground, in a field of view without its left border, and their table."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num):
        mask = np.zeros((height, width), bool)
        for _ in range(4):
            y, x = rng.integers(0, height - 20), rng.integers(0, width - 20)
            mask[y : y + 20, x : x + 20] = True
        pixels = np.where(mask, 60, 180)[..., None] + rng.integers(-30, 30, (height, width, 3))
        where = np.ones((height, width), bool)
        where[:, :10] = False
        for kind, values in (("image", pixels.astype(np.uint8)), ("mask", mask), ("fov", where)):
            Image.fromarray(values).save(folder / f"{kind}{number}.png")
        part = "test" if number % 4 == 0 else "train"
        rows.append([f"image{number}.png", f"mask{number}.png", f"fov{number}.png", part])
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["filename", "mask", "fov", "split"], *rows])
    return folder
