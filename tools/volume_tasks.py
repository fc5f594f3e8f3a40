"""Volumes whose answer needs several slices, for the tests and `tools/bench_volume.py`.

Shapes: F slices, S side in pixels.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
LABELS = "labels.csv"


def moving_bead(seed: int, *, to_the_right: bool, num: int = 8, size: int = 32) -> Bytes:
    """A bright bead that goes around once, to the right or to the left, from a random place: (F, S, S).

    Each slice, at each number, shows the bead anywhere with the same chance, and the set of slices of a
    volume is the same in both directions: only which slice follows which tells them apart.
    """
    rng = np.random.default_rng([seed, 0])
    step = size / num
    row, start = rng.uniform(0.4, 0.6) * size, rng.integers(num)
    places = ((start + np.arange(num) * (1 if to_the_right else -1)) % num + 0.5) * step
    y, x = np.mgrid[:size, :size] + 0.5
    beads = np.exp(-((x - places[:, None, None]) ** 2 + (y - row) ** 2) / (2 * (0.1 * size) ** 2))
    return np.clip(60 + 150 * beads + rng.normal(0, 4, (num, size, size)), 0, 255).astype(np.uint8)


def lasting_blobs(seed: int, *, num: int = 6, size: int = 32, blobs: int = 6) -> tuple[Bytes, Bytes]:
    """Blobs of which some are in the next slice too: volume (F, S, S), and 1 where such a blob is.

    In each slice there are `blobs` blobs on a grid of 4 x 4 places. Which places are taken is drawn anew for
    each slice, so that a blob lasts by chance; a slice alone does not say which of its blobs do.
    """
    rng = np.random.default_rng([seed, 1])
    cell = size // 4
    taken = np.zeros((num, 16), bool)
    for slice_ in taken:
        slice_[rng.choice(16, size=blobs, replace=False)] = True
    lasts = taken & np.roll(taken, -1, axis=0)
    lasts[-1] = False
    y, x = (np.mgrid[:cell, :cell] + 0.5) / cell - 0.5
    disc = (x**2 + y**2 < 0.35**2).astype(np.float64)
    volume = _place(taken, disc) * 140.0 + 60 + rng.normal(0, 8, (num, size, size))
    return np.clip(volume, 0, 255).astype(np.uint8), _place(lasts, disc).astype(np.uint8)


def _place(is_there: NDArray[np.bool_], disc: NDArray[np.float64]) -> NDArray[np.float64]:
    """Discs at some of the 4 x 4 places of each slice, (F, S, S)."""
    return np.stack([np.kron(one.reshape(4, 4), disc) for one in is_there])


def write_nifti(path: Path, slices: NDArray[np.generic]) -> None:
    """Write (F, H, W) so that its axial slices are shown as they are given."""
    import nibabel

    volume = np.ascontiguousarray(slices.transpose(2, 1, 0)[::-1, ::-1])
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4), dtype=volume.dtype), path)


def write_labels(folder: Path, rows: Iterable[dict[str, str]]) -> str:
    """Write the table of labels of a folder; returns its path."""
    found = list(rows)
    path = folder / LABELS
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    return str(path)


def write_bead_volumes(folder: Path, num: int) -> str:
    """Write beads in turn to the right and to the left, each of a patient of its own; returns the labels."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(num):
        name = f"bead_{number:04d}.nii"
        write_nifti(folder / name, moving_bead(number, to_the_right=number % 2 == 0))
        label = "right" if number % 2 == 0 else "left"
        rows.append({"filename": name, "label": label, "patient": f"p{number}"})
    return write_labels(folder, rows)
