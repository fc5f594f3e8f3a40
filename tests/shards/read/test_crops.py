"""Crops stay inside the image, have the asked distribution, and are what they say."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.read.crops import Crop, apply_crop, center_crop, crop_shares, random_crop
from shards.read.draws import sample_rng

SIDES = st.integers(1, 700)


def draw(position: int, height: int, width: int, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=True) -> Crop:
    rng = sample_rng(0, 0, position, "crop")
    return random_crop(rng, height, width, scale=scale, ratio=ratio, flip=flip)


@given(st.integers(0, 1000), SIDES, SIDES)
def test_a_crop_lies_inside(position, height, width):
    crop = draw(position, height, width)
    assert crop.height > 0
    assert crop.width > 0
    assert crop.top >= 0
    assert crop.left >= 0
    assert crop.top + crop.height <= height
    assert crop.left + crop.width <= width
    assert all(0 <= share <= 1 for share in crop_shares(crop, height, width))


def test_area_and_aspect_ratio_keep_to_their_ranges():
    crops = [draw(position, 600, 500) for position in range(3000)]
    areas = np.array([c.height * c.width for c in crops]) / (600 * 500)
    ratios = np.array([c.width / c.height for c in crops])
    assert 0.195 < areas.min() < 0.22
    assert 0.9 < areas.max() <= 1
    assert 0.745 < ratios.min() < 0.76
    assert 1.3 < ratios.max() < 1.345
    assert abs(np.mean([c.flip for c in crops]) - 0.5) < 0.03
    # uniform over the places that are left, up to the last one
    along = np.array([c.top / (600 - c.height) for c in crops if c.height < 500])
    assert np.histogram(along, bins=4, range=(0, 1))[0].min() > 0.2 * len(along)


def test_flip_may_be_off_and_moves_nothing_else():
    for position in range(20):
        with_flip, without = draw(position, 90, 70), draw(position, 90, 70, flip=False)
        assert with_flip[:4] == without[:4]
        assert not without.flip


def test_a_narrow_image_gives_its_largest_allowed_rectangle():
    assert draw(0, 400, 20, scale=(1.0, 1.0), flip=False) == Crop(186, 0, 27, 20)
    assert draw(0, 20, 400, scale=(1.0, 1.0), flip=False) == Crop(0, 186, 20, 27)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40, 3), (50, 50)])
def test_center_crop_is_the_middle_square(shape):
    height, width = shape[:2]
    crop = center_crop(height, width)
    assert crop.height == crop.width == min(height, width)
    assert not crop.flip
    assert abs(2 * crop.top + crop.height - height) <= 1
    assert abs(2 * crop.left + crop.width - width) <= 1


def test_pixels_of_a_crop():
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    part = image[10:42, 20:52]
    np.testing.assert_array_equal(apply_crop(image, Crop(10, 20, 32, 32), 32), part)
    np.testing.assert_array_equal(apply_crop(image, Crop(10, 20, 32, 32, True), 32), part[:, ::-1])
    halved = apply_crop(image, Crop(10, 20, 32, 32), 16)
    means = part.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - means).max() <= 0.5
    assert apply_crop(image[:, :, 0], Crop(0, 0, 20, 30), 64).shape == (64, 64)


def test_shrinking_does_not_alias():
    stripes = np.zeros((512, 512), np.uint8)
    stripes[:, ::2] = 255  # finer than the small grid can show: nothing of them may be left but grey
    small = apply_crop(stripes, Crop(0, 0, 512, 512), 200)
    assert small.astype(float).std() < 30
    assert cv2.resize(stripes, (200, 200), interpolation=cv2.INTER_LINEAR).astype(float).std() > 60


def test_hounsfield_units_stay_whole_numbers_within_their_range():
    image = np.where(np.indices((16, 16)).sum(axis=0) // 4 % 2, 3071, -1024).astype(np.int16)
    large = apply_crop(image, Crop(0, 0, 16, 16), 64)
    assert large.dtype == np.int16
    exact = cv2.resize(image.astype(np.float64), (64, 64), interpolation=cv2.INTER_CUBIC)
    assert exact.max() > 3100  # the filter overshoots
    assert np.abs(large - np.clip(exact, -1024, 3071)).max() <= 2
    assert (large.min(), large.max()) == (-1024, 3071)
    small = apply_crop(image, Crop(0, 0, 16, 16, True), 4)
    assert np.abs(small[:, ::-1] - image.reshape(4, 4, 4, 4).mean(axis=(1, 3))).max() <= 0.5
