"""Drawing HF tokens on an image."""

from __future__ import annotations

import numpy as np

from shards.hf.draw import MARK, fit, mark_tokens, token_mask


def test_outline_runs_around_the_first_quarter_of_the_tokens():
    pixels = np.full((64, 64), 200, np.uint8)  # 4 x 4 patches
    tokens = np.array([5, 6, 9, 10, *(set(range(16)) - {5, 6, 9, 10})], np.uint16)
    drawn = mark_tokens(pixels, tokens, 16, side=64)
    marked = (drawn == MARK).all(axis=2)
    y, x = np.nonzero(marked)
    assert 14 <= y.min() <= x.min() <= 16
    assert 47 <= y.max() <= 49
    assert 47 <= x.max() <= 49
    assert not marked[20:44, 20:44].any()  # not between tokens that touch
    assert marked[16, 20:44].all()
    assert (pixels == 200).all()  # what is drawn on is a copy


def test_mask_is_of_whole_patches():
    mask = token_mask(np.array([4, 0, 1, 2, 3, 5], np.uint16), 40, 50, 16, keep=1 / 3)
    assert mask.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_fit_keeps_the_aspect():
    assert fit(np.zeros((50, 100), np.uint8), 40).shape == (20, 40, 3)
    assert fit(np.zeros((100, 50, 3), np.uint8), 200).shape == (200, 100, 3)
    assert fit(np.zeros((1, 900), np.uint8), 30).shape == (1, 30, 3)
