"""HF tokens: the definition, the fast path that is held to it, scores and ranks."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.hf.maps import hf_map, indices_from_map
from shards.hf.tokens import (
    HFParams,
    hf_response,
    hf_response_reference,
    hf_scores,
    hf_token_indices,
    rank_tokens,
)
from shards.support.errors import ConfigError, DataError
from tests.shards.fundus import FUNDUS, draw_fundus, overlap, patch_means, reference_tokens, true_view

WHOLE = HFParams(fov="none", frame_taper=0)


# the definition


@pytest.mark.parametrize("offset", [None, 0.2])
@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (4, 4), (7, 7), (1, 6), (5, 1)])
def test_definition_equals_an_explicit_transform(shape: tuple[int, int], offset: float | None) -> None:
    """Every frequency by the sum that defines it, the gain by its formula."""
    height, width = shape
    image = np.random.default_rng(0).uniform(0, 255, shape)
    level = image if offset is None else np.log(image + offset * image.mean())
    y, x = np.mgrid[:height, :width]
    expected = np.zeros(shape, complex)
    for v in range(height):
        for u in range(width):
            wave = np.exp(2j * np.pi * (v * y / height + u * x / width))
            fy, fx = min(v, height - v) / height, min(u, width - u) / width
            cycles = np.hypot(fy, fx) * min(shape)
            low_pass = np.exp(-2 * (np.pi * 0.04 * cycles) ** 2)
            gain = (1 - low_pass) / (1 + (1.5 / cycles) ** 4) / (1 + (cycles / 2) ** 4) if cycles > 0 else 0.0
            expected += gain * wave * (level * wave.conj()).mean()
    changes = {"cutoff_cycles": 1.5, "low_pass_cycles": 2.0, "log_offset": offset}
    params = WHOLE.model_copy(update=changes)
    np.testing.assert_allclose(hf_response_reference(image, params), expected.real, atol=1e-9)
    np.testing.assert_allclose(hf_response(image, params), expected.real, atol=1e-3)


@pytest.mark.parametrize("shape", [(224, 224), (240, 320), (211, 223), (197, 256), (64, 1), (1, 97), (2, 2)])
@pytest.mark.parametrize("params", [HFParams(channel="luminance"), FUNDUS], ids=["published", "fundus"])
def test_fast_path_equals_the_definition(shape: tuple[int, int], params: HFParams) -> None:
    """Sizes of factors 2, 3, 5 go through OpenCV, the others (211, 223, 197 are prime) through SciPy."""
    image = cv2.resize(draw_fundus(), shape[::-1], interpolation=cv2.INTER_AREA)
    for picture in (image, image.astype(np.uint16) * 256, image.astype(np.float64) / 255):
        expected = hf_response_reference(picture, params)
        unit = picture.max() if params.log_offset is None else 1
        np.testing.assert_allclose(hf_response(picture, params), expected, atol=1e-5 * unit)


@pytest.mark.parametrize("seed", range(4))
def test_fast_path_keeps_the_tokens_of_the_definition(seed: int) -> None:
    image = draw_fundus(512, seed, surround=25.0 * (seed % 2))
    for params in (HFParams(), FUNDUS):
        assert overlap(reference_tokens(image, params), hf_token_indices(image, params=params)) >= 0.99


def test_transposed_and_mirrored_images_have_the_same_response() -> None:
    image = draw_fundus(240, surround=20)[:, :208]
    mirrored, transposed = image[:, ::-1].copy(), image.transpose(1, 0, 2).copy()
    response = hf_response(image, WHOLE)
    np.testing.assert_allclose(hf_response(mirrored, WHOLE)[:, ::-1], response, atol=1e-3)
    np.testing.assert_allclose(hf_response(transposed, WHOLE).T, response, atol=1e-3)
    scores = hf_scores(hf_response(image), 16)  # with a field of view: but for its outline's rasterization
    of_mirrored = hf_scores(hf_response(mirrored)[:, ::-1].copy(), 16)
    of_transposed = hf_scores(hf_response(transposed).T.copy(), 16)
    for other in (of_mirrored, of_transposed):
        assert overlap(rank_tokens(scores, 0.25), rank_tokens(other, 0.25)) >= 0.95


def test_tokens_lie_on_fine_detail() -> None:
    """Thin lines on a strong gradient: the patches with lines are kept, in both color and grey."""
    image = np.tile(np.linspace(60, 200, 224), (224, 1))
    image[20:28:2, 32:192] -= 40
    for picture in (image.astype(np.uint8), np.repeat(image.astype(np.uint8)[:, :, None], 3, axis=2)):
        kept = hf_token_indices(picture, keep=10 / 196, params=HFParams(fov="none", channel="luminance"))
        assert sorted(kept) == [14 + column for column in range(2, 12)]


def test_brightness_inside_does_not_matter() -> None:
    image = draw_fundus()
    brighter = image.copy()
    brighter[true_view(224)] += 40
    assert overlap(hf_token_indices(image), hf_token_indices(brighter)) >= 0.95
    np.testing.assert_array_equal(hf_response(image + np.uint8(40), WHOLE), hf_response(image, WHOLE))


def test_the_logarithm_counts_contrast_not_brightness() -> None:
    """Light from one side: the tokens stay where the detail is; and twice the light changes nothing."""
    grain = cv2.GaussianBlur(np.random.default_rng(0).normal(size=(224, 224)), (0, 0), 2)
    strength = np.random.default_rng(1).uniform(0, 1, (14, 14)).repeat(16, 0).repeat(16, 1)
    image = (100 * (1 + grain * strength)).astype(np.float32)
    lit = image * np.linspace(1.6, 0.4, 224, dtype=np.float32)[:, None]
    for offset, low, high in ((None, 0.0, 0.8), (0.01, 0.9, 1.0)):
        params = HFParams(cutoff_cycles=24.0, fov="none", log_offset=offset)
        kept = overlap(hf_token_indices(image, params=params), hf_token_indices(lit, params=params))
        assert low <= kept <= high
    np.testing.assert_allclose(hf_response(2 * image, FUNDUS), hf_response(image, FUNDUS), atol=1e-5)


@pytest.mark.parametrize("params", [FUNDUS, WHOLE.model_copy(update={"log_offset": 0.1})])
def test_the_logarithm_of_black_and_of_negative_levels_is_finite(params: HFParams) -> None:
    assert not hf_response(np.zeros((32, 32), np.uint8), params).any()
    assert not hf_response(np.full((32, 32), -1000, np.int16), params).any()
    image = np.random.default_rng(0).integers(-1000, 1000, (32, 32)).astype(np.int16)
    assert np.isfinite(hf_response(image, params)).all()
    shifted = (image.astype(np.int32) - image.min()).astype(np.uint16)  # the lowest negative level is black
    np.testing.assert_allclose(hf_response(image, params), hf_response(shifted, params), atol=1e-5)


def test_the_low_pass_keeps_noise_from_counting() -> None:
    """Stripes below, a noisy half without any above: filtered, the noise takes no token from the stripes."""
    image = np.full((512, 512), 120, np.float32)
    image[:256] += np.random.default_rng(0).normal(0, 10, (256, 512))
    image[256:] += 6 * np.sin(2 * np.pi * 30 * np.arange(512) / 512)

    def share_on_stripes(low_pass_cycles: float | None) -> float:
        params = HFParams(fov="none", cutoff_cycles=24.0, low_pass_cycles=low_pass_cycles)
        return float((hf_token_indices(image, keep=0.4, params=params) >= 512).mean())

    assert share_on_stripes(60.0) > 0.95
    assert share_on_stripes(None) < 0.05


def test_digest_follows_the_parameters() -> None:
    assert HFParams().digest() == HFParams().digest()
    assert len(HFParams().digest()) == 12
    changed = [{"channel": "luminance"}, {"fov": "none"}, {"cutoff_cycles": 20.0}, {"order": 3}]
    changed += [{"log_offset": 0.1}, {"low_pass_cycles": 90.0}]
    assert len({HFParams(**change).digest() for change in [{}, *changed]}) == 7


# scores and ranks


def test_scores_are_patch_means_row_major_without_the_trailing_pixels() -> None:
    response = np.random.default_rng(0).normal(size=(11, 14))
    np.testing.assert_allclose(hf_scores(response, 4), patch_means(np.abs(response), 4), rtol=1e-6)
    assert hf_scores(response, 12).size == 0


def test_a_patch_mostly_outside_the_field_of_view_scores_nothing() -> None:
    response = np.full((8, 24), -3.0, np.float32)
    response[:, :5] = 0
    response[:, 20:] = 0
    assert hf_scores(response, 8).tolist() == [0.0, 3.0, 1.5]
    ranked = indices_from_map(hf_map(response, 1), (0, 0, 1, 1), 8, 1.0, output_size=24)
    assert ranked[:6].tolist() == [1, 4, 7, 2, 5, 8]


def test_rank_is_by_score_and_ties_go_to_the_lower_index() -> None:
    scores = np.array([1.0, 3.0, 0.0, 3.0, 1.0, 2.0], np.float32)
    assert rank_tokens(scores, 1.0).tolist() == [1, 3, 5, 0, 4, 2]
    assert rank_tokens(scores, 0.5).tolist() == [1, 3, 5]
    alternating = np.tile(np.array([0, 1], np.float32), 500)
    assert rank_tokens(alternating, 1.0).tolist() == [*range(1, 1000, 2), *range(0, 1000, 2)]
    with pytest.raises(ConfigError, match="0 < keep <= 1"):
        rank_tokens(scores, 0.0)
    with pytest.raises(ConfigError, match="larger patches"):
        rank_tokens(np.zeros(70_000), 0.5)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    color=st.booleans(),
    dtype=st.sampled_from([np.uint8, np.uint16, np.int16, np.float32, np.float64]),
    kind=st.sampled_from(["noise", "flat", "black", "one pixel", "halves"]),
    fov=st.sampled_from(["adaptive", "none"]),
    offset=st.sampled_from([None, 0.15]),
    patch=st.integers(1, 20),
    keep=st.floats(0.01, 1.0),
)
def test_any_image_gives_finite_scores_and_valid_indices(
    height: int,
    width: int,
    color: bool,
    dtype: type,
    kind: str,
    fov: str,
    offset: float | None,
    patch: int,
    keep: float,
) -> None:
    shape = (height, width, 3) if color else (height, width)
    image = np.zeros(shape, dtype)
    if kind == "noise":
        image = np.random.default_rng(0).uniform(0, 250, shape).astype(dtype)
    elif kind == "flat":
        image[:] = 97
    elif kind == "one pixel":
        image[height // 2, width // 3] = 200
    elif kind == "halves":
        image[: height // 2] = 120
    params = HFParams(fov=fov, log_offset=offset)
    response = hf_response(image, params)
    assert response.shape == (height, width)
    assert response.dtype == np.float32
    assert np.isfinite(response).all()
    np.testing.assert_allclose(response, hf_response_reference(image, params), atol=2e-3)
    if kind in ("flat", "black"):
        assert not response.any()
    num = (height // patch) * (width // patch)
    indices = hf_token_indices(image, patch, keep, params)
    assert indices.dtype == np.uint16
    assert indices.size == np.unique(indices).size == round(keep * num)
    assert (indices < num).all()
    np.testing.assert_array_equal(indices, rank_tokens(hf_scores(response, patch), keep))
    assert hf_map(response, patch).shape == (max(1, height // patch), max(1, width // patch))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 4), np.uint8), "no image"),
        (np.zeros(8, np.uint8), "no image"),
        (np.zeros((0, 8), np.uint8), "no image"),
        (np.zeros((8, 8), np.int64), "int64"),
        (np.full((8, 8), np.nan, np.float32), "NaN"),
    ],
)
def test_what_is_no_image_is_refused(image: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        hf_response(image)
