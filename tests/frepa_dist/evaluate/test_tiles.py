"""Tiles cover every pixel, and merge to what was cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frepa_dist.evaluate.tiles import cut_tiles, merge_tiles, tile_corners


@given(height=st.integers(1, 150), width=st.integers(1, 150), side=st.sampled_from([16, 32, 64]))
def test_what_is_cut_merges_to_the_image(height, width, side):
    image = np.random.default_rng(0).random((2, height, width)).astype(np.float32)
    corners = tile_corners(height, width, side)
    tiles = cut_tiles(image, corners, side)
    assert tiles.shape == (len(corners), 2, side, side)
    np.testing.assert_allclose(merge_tiles(tiles, corners, (height, width)), image, rtol=1e-5)


def test_neighbors_overlap_by_the_share_at_least():
    rows = np.unique(tile_corners(500, 100, 100, overlap=0.5)[:, 0])
    assert (rows[0], rows[-1]) == (0, 400)
    assert np.diff(rows).max() <= 50


@pytest.mark.parametrize("mirror", [True, False])
def test_outside_of_a_small_image(mirror):
    image = np.arange(1, 5, dtype=np.float32).reshape(2, 2)
    (tile,) = cut_tiles(image, tile_corners(2, 2, 4), 4, mirror=mirror)
    edge = np.pad(image, 1, mode="symmetric") if mirror else np.pad(image, 1)
    np.testing.assert_array_equal(tile, edge)


def test_a_jump_between_two_tiles_is_smoothed():
    corners = tile_corners(32, 48, 32, overlap=0.5)
    tiles = np.stack([np.full((1, 32, 32), value, np.float32) for value in (0.0, 1.0)])
    row = merge_tiles(tiles, corners, (32, 48))[0, 16]
    assert (np.diff(row) >= 0).all()
    assert np.diff(row).max() < 0.1
