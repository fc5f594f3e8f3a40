"""Windows of volumes of any length: every slice once, neighbors at neighboring places, nothing invented."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from frepa_dist.models.volume_slots import cut_slots, merge_slots

NUMBERS = st.sets(st.integers(0, 90), min_size=1).map(lambda found: np.array(sorted(found), np.int64) + 7)
WINDOWS = st.integers(1, 20).flatmap(lambda num: st.tuples(st.just(num), st.integers(0, num - 1)))


@given(NUMBERS, WINDOWS)
def test_every_slice_counts_once_and_places_are_true_to_the_numbers(slices, window):
    num_slots, overlap = window
    slots = cut_slots(slices, num_slots, overlap)
    assert slots.rows.shape == slots.weight.shape == (len(slots.rows), num_slots)
    is_there = slots.rows >= 0
    assert is_there.any(axis=1).all()
    np.testing.assert_array_equal(slots.weight > 0, is_there)
    shares = np.bincount(slots.rows[is_there], slots.weight[is_there], minlength=len(slices))
    np.testing.assert_allclose(shares, 1, rtol=1e-6)
    for rows in slots.rows:
        places = np.flatnonzero(rows >= 0)
        assert len({slices[rows[place]] - place for place in places}) == 1
        first = slices[rows[places[0]]] - places[0]
        within = slices[(slices >= first) & (slices < first + num_slots)]
        np.testing.assert_array_equal(slices[rows[places]], within)  # whatever falls into it is in it


@given(NUMBERS, WINDOWS)
def test_merging_is_the_mean_over_the_windows_that_hold_a_slice(slices, window):
    slots = cut_slots(slices, *window)
    values = torch.randn(*slots.rows.shape, 2, 3, dtype=torch.float64)
    merged = merge_slots(values, slots)
    assert merged.shape == (len(slices), 2, 3)
    for number in range(len(slices)):
        held = values[torch.from_numpy(slots.rows == number)]
        torch.testing.assert_close(merged[number], held.mean(dim=0), rtol=1e-5, atol=1e-6)


def test_windows_written_out():
    assert cut_slots(np.arange(3), 5, 2).rows.tolist() == [[0, 1, 2, -1, -1]]
    assert cut_slots(np.arange(5), 5, 2).rows.tolist() == [[0, 1, 2, 3, 4]]
    assert cut_slots(np.arange(9), 5, 2).rows.tolist() == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [4, 5, 6, 7, 8]]
    # slices 10, 11, 13 and, far behind, 30: a gap stays a gap, windows that hold nothing are no windows
    found = cut_slots(np.array([10, 11, 13, 30]), 4, 1)
    assert found.rows.tolist() == [[0, 1, -1, 2], [2, -1, -1, -1], [-1, -1, -1, 3]]
    assert found.weight.tolist() == [[1, 1, 0, 0.5], [0.5, 0, 0, 0], [0, 0, 0, 1]]
