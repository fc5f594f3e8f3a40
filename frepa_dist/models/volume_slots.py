"""How the slices of a volume of any length fill the places of an encoder that sees F of them at once.

A window is F consecutive slice *numbers*. A volume with fewer has one window, the rest of it empty; a longer
one is cut into windows that overlap, the last one ending with the volume. A slice that is missing (a gap in
the numbers) leaves its place empty, so that two places next to each other are always two slices next to each
other. A slice in several windows counts once: with the mean of what they make of it.

Shapes: N slices of a volume, n windows, F places of a window.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Slots(NamedTuple):
    """The windows of a volume.

    Attributes:
        rows: (n, F) int64, which of the N slices is at a place, -1 where none is.
        weight: (n, F) float32, its share: 1 over the number of windows that hold the slice, 0 where none is.
    """

    rows: NDArray[np.int64]
    weight: NDArray[np.float32]


def cut_slots(slices: NDArray[np.int64], num_slots: int, overlap: int) -> Slots:
    """Cut a volume into windows.

    Args:
        slices: (N,) numbers of its slices, ascending; N at least 1.
        num_slots: F.
        overlap: slice numbers that two windows that follow each other have in common, fewer than F; the last
            two may have more.

    Returns:
        The windows that hold a slice. Every slice is in one at least; its weights add up to 1.
    """
    assert 0 <= overlap < num_slots
    assert len(slices)
    assert (np.diff(slices) > 0).all()
    places = np.asarray(slices, np.int64) - slices[0]
    last = max(0, int(places[-1]) + 1 - num_slots)
    starts = np.unique(np.append(np.arange(0, last, num_slots - overlap), last))
    number_of = np.full(int(starts[-1]) + num_slots, -1, np.int64)
    number_of[places] = np.arange(len(places))
    rows = number_of[starts[:, None] + np.arange(num_slots)]
    rows = rows[(rows >= 0).any(axis=1)]
    counts = np.bincount(rows[rows >= 0], minlength=len(places))
    weight = np.where(rows >= 0, 1 / counts[rows], 0)
    return Slots(rows, weight.astype(np.float32))


def merge_slots(values: Tensor, slots: Slots) -> Tensor:
    """Bring what windows say of slices together again.

    Args:
        values: (n, F, ...) of any float type.
        slots: of the volume.

    Returns:
        (N, ...): of each slice, the mean over the windows that hold it. A product of matrices, since adding
        by index is not reproducible on a GPU.
    """
    flat = slots.rows.reshape(-1)
    shares = np.zeros((int(flat.max()) + 1, len(flat)), np.float32)
    places = np.flatnonzero(flat >= 0)
    shares[flat[places], places] = slots.weight.reshape(-1)[places]
    matrix = torch.from_numpy(shares).to(values.device, values.dtype)
    return (matrix @ values.reshape(len(flat), -1)).reshape(-1, *values.shape[2:])
