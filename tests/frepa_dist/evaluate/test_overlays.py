"""Overlays color the right pixels."""

from __future__ import annotations

import numpy as np

from frepa_dist.evaluate.overlays import (
    FALSE_ALARM,
    HIT,
    MAX_SIDE,
    MISS,
    fit_picture,
    overlay_heat,
    overlay_masks,
    to_picture,
)


def test_hits_misses_and_false_alarms_have_their_colors():
    image = np.full((3, 2, 4), 200, np.uint8)
    truth = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], bool)
    found = np.array([[1, 0, 1, 0], [1, 0, 1, 0]], bool)
    where = np.array([[1, 1, 1, 1], [0, 0, 0, 0]], bool)
    drawn = overlay_masks(image, truth, found, where)
    assert [tuple(pixel) for pixel in drawn[0]] == [HIT, MISS, FALSE_ALARM, (110, 110, 110)]
    assert not drawn[1].any()


def test_heat_is_where_it_is_hot_and_lesions_are_outlined():
    image = np.full((3, 64, 64), 100, np.uint8)
    heat = np.zeros((64, 64))
    heat[40:44, 40:44] = 1
    truth = np.zeros((64, 64), bool)
    truth[10:20, 10:20] = True
    drawn = overlay_heat(image, heat, truth)
    assert tuple(drawn[10, 15]) == HIT
    assert tuple(drawn[15, 15]) == tuple(drawn[60, 5]) == (100, 100, 100)
    assert int(drawn[42, 42].max()) > 200
    assert (overlay_heat(image, np.ones((64, 64)), np.zeros((64, 64), bool)) == 100).all()


def test_pictures_keep_their_shape_when_they_shrink():
    large = np.zeros((3, 600, 2 * MAX_SIDE), np.uint8)
    assert to_picture(large).shape == (300, MAX_SIDE, 3)
    assert fit_picture(np.zeros((5, 7, 3), np.uint8)).shape == (5, 7, 3)
