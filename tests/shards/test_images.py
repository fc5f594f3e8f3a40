"""The plain views for evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from shards.crops import apply_crop, center_crop
from shards.images import ImageSet
from shards.views import StreamConfig


@pytest.fixture
def images(tmp_path, write_dataset) -> ImageSet:
    write_dataset(tmp_path, {"fundus": [10, 10], "xray": [5]}, duplicates=(3,))
    return ImageSet(StreamConfig(root=tmp_path, image_size=32, patch_size=8))


def test_all_samples_in_order_without_duplicates(images):
    keys = [images[i].key for i in range(len(images))]
    assert keys == [f"sample{n:05d}" for n in range(25) if n != 3]
    with pytest.raises(IndexError):
        images[len(images)]
    with pytest.raises(IndexError):
        images[-1]


def test_a_view_is_the_middle_square(images, draw_image):
    view = images[7]  # number 8, color, PNG
    image = draw_image(8)
    expected = apply_crop(image, center_crop(*image.shape[:2]), 32)
    np.testing.assert_array_equal(view.image, expected.transpose(2, 0, 1))
    assert (view.modality, view.labels) == ("fundus", {"class": 2})
    assert view.hf_indices.shape == (4,)
    assert view.hf_indices.dtype == np.int64
    np.testing.assert_array_equal(images.read(7).image, image)


def test_grey_is_repeated(images):
    view = images[9]  # number 10
    assert view.image.shape == (3, 32, 32)
    np.testing.assert_array_equal(view.image[0], view.image[2])
