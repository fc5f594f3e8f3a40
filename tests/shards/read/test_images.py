"""The plain views for evaluation."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from shards.builder.build import BuildConfig, build_dataset
from shards.hf.tokens import hf_token_indices
from shards.read.crops import apply_crop, center_crop
from shards.read.images import ImageSet
from shards.read.views import StreamConfig


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


def test_ct_is_shown_in_the_reference_window(tmp_path, write_dataset, draw_image):
    write_dataset(tmp_path, {"ct": [3]})
    images = ImageSet(StreamConfig(root=str(tmp_path), image_size=32, patch_size=8))
    view, image = images[1], draw_image(1, "ct")
    expected = apply_crop(image, center_crop(*image.shape), 32).astype(float)
    assert view.image.dtype == np.uint8
    assert np.abs(view.image[2] - np.clip((expected + 1000) / 2000, 0, 1) * 255).max() <= 0.501
    np.testing.assert_array_equal(images.read(1).image, image)


def test_a_dataset_that_was_built(tmp_path):
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        grain = rng.integers(0, 256, (96, 96, 3)) * np.linspace(0.1, 1, 96)[:, None]  # stronger below
        cv2.imwrite(str(tmp_path / f"images/{number}.png"), grain.astype(np.uint8))
    image = cv2.imread(str(tmp_path / "images/2.png"))
    cv2.imwrite(str(tmp_path / "images/copy.png"), image, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    config = BuildConfig(modality="histopathology", size=96, jobs=1)
    build_dataset([tmp_path / "images"], tmp_path / "dataset", config)

    images = ImageSet(
        StreamConfig(
            root=tmp_path / "dataset",
            image_size=96,
            hf_digests={"histopathology": config.hf_params().digest()},
        )
    )
    assert len(images) == 6  # the copy has the pixels of another one
    for i in range(6):
        np.testing.assert_array_equal(images[i].image, images.read(i).image.transpose(2, 0, 1))
        expected = hf_token_indices(images.read(i).image, 16, 0.25, config.hf_params())
        assert len(set(images[i].hf_indices) & set(expected)) >= 8  # of 9: the map has 8 bits
        assert images[i].hf_indices[0] == expected[0]
