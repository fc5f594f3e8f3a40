"""The response map: what it holds, and the tokens of crops that are ranked from it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.hf.maps import hf_map, indices_from_map
from shards.hf.tokens import HFParams, hf_response, hf_scores, hf_token_indices, rank_tokens
from tests.shards.fundus import FUNDUS, draw_fundus, overlap, patch_means, real_images


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return np.intersect1d(first, second).size / np.union1d(first, second).size


def test_map_is_monotone_in_the_mean_response_and_covers_the_image() -> None:
    response = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32) * np.linspace(0, 1, 96)
    coded = hf_map(response, 4)
    means = patch_means(np.abs(response), 4).reshape(16, 24)
    assert coded.shape == (16, 24)
    assert coded.max() == 255
    np.testing.assert_allclose((coded / 255.0) ** 2, means / means.max(), atol=1 / 255 + 1e-6)
    assert hf_map(np.ones((10, 7), np.float32), 4).tolist() == [[255], [255]]
    assert hf_map(np.array([[1e-6, 0.0, 1.0]], np.float32), 1).tolist() == [[1, 0, 255]]
    assert not hf_map(np.zeros((8, 8), np.float32), 4).any()


@pytest.mark.parametrize("size", [224, 256])
@pytest.mark.parametrize("params", [HFParams(), FUNDUS], ids=["published", "fundus"])
def test_map_of_the_whole_image_ranks_as_the_image(size: int, params: HFParams) -> None:
    image = draw_fundus(size)
    coded = hf_map(hf_response(image, params), 4)
    ranked = indices_from_map(coded, (0, 0, 1, 1), 16, 0.25, output_size=size)
    assert overlap(hf_token_indices(image, params=params), ranked) >= 0.95


def test_patches_of_a_crop_are_area_integrals_of_the_map() -> None:
    """Against a map enlarged 20 times, where every patch is a whole number of fine pixels."""
    coded = np.random.default_rng(0).integers(1, 256, (12, 10), dtype=np.uint8)
    coded[:, 4:7] = 0  # outside the field of view
    top, left, height, width = 0.25, 0.1, 0.5, 0.75
    fine = np.kron(coded.astype(np.float64) ** 2, np.ones((20, 20)))
    part = fine[60:180, 20:170].reshape(5, 24, 5, 30)
    expected = rank_tokens((part.mean(axis=(1, 3)) * ((part > 0).mean(axis=(1, 3)) >= 0.5)).ravel(), 1.0)
    ranked = indices_from_map(coded, (top, left, height, width), 16, 1.0, output_size=80)
    np.testing.assert_array_equal(ranked, expected)


@settings(max_examples=60, deadline=None)
@given(
    cells=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    corner=st.tuples(st.floats(0, 0.6), st.floats(0, 0.6)),
    size=st.tuples(st.floats(0.05, 0.4), st.floats(0.05, 0.4)),
    patch=st.integers(1, 20),
    output=st.integers(1, 64),
    keep=st.floats(0.05, 1.0),
)
def test_indices_from_map_are_valid_and_flip_with_the_crop(
    cells: tuple[int, int],
    corner: tuple[float, float],
    size: tuple[float, float],
    patch: int,
    output: int,
    keep: float,
) -> None:
    coded = np.random.default_rng(0).integers(0, 256, cells, dtype=np.uint8)
    output = output // patch * patch  # the mirrored grid is the same grid
    if output == 0:
        return
    num = output // patch
    crop, mirrored_crop = (*corner, *size), (corner[0], 1 - corner[1] - size[1], *size)
    kept = indices_from_map(coded, crop, patch, keep, output_size=output)
    assert kept.size == np.unique(kept).size == round(keep * num * num)
    assert (kept < num * num).all()
    scores = np.zeros((2, num * num))
    flipped = indices_from_map(coded, crop, patch, 1.0, output_size=output, flip=True)
    mirrored = indices_from_map(coded[:, ::-1], mirrored_crop, patch, 1.0, output_size=output)
    scores[0, flipped], scores[1, mirrored] = np.arange(num * num), np.arange(num * num)
    assert np.median(np.abs(scores[0] - scores[1])) <= 0.1 * num * num  # the same ranks, but for rounded ties


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "step"), [("drive", 4), ("hrf", 5), ("chasedb1", 4)])
def test_tokens_of_random_crops_from_the_map(name: str, step: int) -> None:
    """Truth: the full-resolution response under the same crop, resized by area, scored patch by patch."""
    rng = np.random.default_rng(0)
    values = []
    for image, _ in real_images(name, 512, step):
        response = np.abs(hf_response(image, FUNDUS))
        coded = hf_map(response, 4)
        for _ in range(8):
            side = np.sqrt(rng.uniform(0.2, 1) * np.exp(rng.uniform(-0.28, 0.28) * np.array([1, -1])))
            height, width = np.minimum(512, np.rint(512 * side)).astype(int)
            top, left = rng.integers(0, 513 - height), rng.integers(0, 513 - width)
            flip = bool(rng.integers(2))
            part = response[top : top + height, left : left + width]
            part = cv2.resize(part, (224, 224), interpolation=cv2.INTER_AREA)
            part = part[:, ::-1] if flip else part
            crop = (top / 512, left / 512, height / 512, width / 512)
            ranked = indices_from_map(coded, crop, 16, 0.25, output_size=224, flip=flip)
            values.append(iou(rank_tokens(hf_scores(part, 16), 0.25), ranked))
    assert np.mean(values) >= 0.95
    assert np.percentile(values, 5) >= 0.88
