"""HF tokens: the definition, the fast path held to it, the field of view, the map, and real fundus images."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.hf_tokens import (
    HFParams,
    field_of_view,
    hf_map,
    hf_response,
    hf_response_reference,
    hf_scores,
    hf_token_indices,
    indices_from_map,
    rank_tokens,
)
from shards.support.errors import ConfigError, DataError

WHOLE = HFParams(fov="none", frame_taper=0)


def draw_fundus(size: int = 224, seed: int = 0, surround: float = 0.0, shape: str = "disc") -> np.ndarray:
    """Vessels on a bright disc; `surround` is the grey level around it. Returns (size, size, 3) uint8."""
    rng = np.random.default_rng(seed)
    image = np.full((size, size, 3), (170, 90, 40), np.float32)
    image *= np.linspace(1.1, 0.7, size, dtype=np.float32)[:, None, None]
    for _ in range(10):
        points = np.cumsum(np.vstack([[size / 2] * 2, rng.normal(rng.normal(0, 6, 2), 4, (20, 2))]), axis=0)
        color = (110.0, 45.0, 25.0)
        cv2.polylines(image, [points.astype(np.int32)], False, color, max(1, size // 100), cv2.LINE_AA)
    image += rng.normal(0, 2, image.shape)
    outside = ~true_view(size)
    if shape == "disc":
        image[outside] = surround + rng.normal(0, 2, (int(outside.sum()), 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def true_view(size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    return np.hypot(y, x) <= 0.42 * size


def center_inside(view: np.ndarray, index: int, patch: int) -> bool:
    row, column = divmod(int(index), view.shape[1] // patch)
    return bool(view[row * patch + patch // 2, column * patch + patch // 2])


def patch_means(array: np.ndarray, patch: int) -> np.ndarray:
    """Row-major means over whole patches, by a plain loop."""
    rows, columns = array.shape[0] // patch * patch, array.shape[1] // patch * patch
    corners = [(row, column) for row in range(0, rows, patch) for column in range(0, columns, patch)]
    return np.array([array[r : r + patch, c : c + patch].mean() for r, c in corners])


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return np.intersect1d(first, second).size / max(1, first.size)


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return np.intersect1d(first, second).size / np.union1d(first, second).size


def reference_tokens(image: np.ndarray, params: HFParams = HFParams()) -> np.ndarray:  # noqa: B008 (frozen)
    return rank_tokens(hf_scores(hf_response_reference(image, params), 16), 0.25)


# the definition


@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (4, 4), (7, 7), (1, 6), (5, 1)])
def test_definition_equals_an_explicit_transform(shape: tuple[int, int]) -> None:
    """Every frequency by the sum that defines it, the gain by its formula."""
    height, width = shape
    image = np.random.default_rng(0).uniform(0, 255, shape)
    y, x = np.mgrid[:height, :width]
    expected = np.zeros(shape, complex)
    for v in range(height):
        for u in range(width):
            wave = np.exp(2j * np.pi * (v * y / height + u * x / width))
            fy, fx = min(v, height - v) / height, min(u, width - u) / width
            cycles = np.hypot(fy, fx) * min(shape)
            low_pass = np.exp(-2 * (np.pi * 0.04 * cycles) ** 2)
            gain = (1 - low_pass) / (1 + (1.5 / cycles) ** 4) if cycles > 0 else 0.0
            expected += gain * wave * (image * wave.conj()).mean()
    params = WHOLE.model_copy(update={"cutoff_cycles": 1.5})
    np.testing.assert_allclose(hf_response_reference(image, params), expected.real, atol=1e-9)
    np.testing.assert_allclose(hf_response(image, params), expected.real, atol=1e-3)


@pytest.mark.parametrize("shape", [(224, 224), (240, 320), (211, 223), (197, 256), (64, 1), (1, 97), (2, 2)])
@pytest.mark.parametrize("channel", ["green", "luminance"])
def test_fast_path_equals_the_definition(shape: tuple[int, int], channel: str) -> None:
    """Sizes of factors 2, 3, 5 go through OpenCV, the others (211, 223, 197 are prime) through SciPy."""
    image = cv2.resize(draw_fundus(), shape[::-1], interpolation=cv2.INTER_AREA)
    params = HFParams(channel=channel)
    for picture in (image, image.astype(np.uint16) * 256, image.astype(np.float64) / 255):
        expected = hf_response_reference(picture, params)
        np.testing.assert_allclose(hf_response(picture, params), expected, atol=1e-5 * picture.max())


@pytest.mark.parametrize("seed", range(4))
def test_fast_path_keeps_the_tokens_of_the_definition(seed: int) -> None:
    image = draw_fundus(512, seed, surround=25.0 * (seed % 2))
    assert overlap(reference_tokens(image), hf_token_indices(image)) >= 0.99


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


def test_digest_follows_the_parameters() -> None:
    assert HFParams().digest() == HFParams().digest()
    assert len(HFParams().digest()) == 12
    changed = [{"channel": "luminance"}, {"fov": "none"}, {"cutoff_cycles": 20.0}, {"order": 3}]
    assert len({HFParams(**change).digest() for change in [{}, *changed]}) == 5


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
    patch=st.integers(1, 20),
    keep=st.floats(0.01, 1.0),
)
def test_any_image_gives_finite_scores_and_valid_indices(
    height: int, width: int, color: bool, dtype: type, kind: str, fov: str, patch: int, keep: float
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
    params = HFParams(fov=fov)
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


# the field of view


@pytest.mark.parametrize("size", [96, 224, 512])
@pytest.mark.parametrize("surround", [0.0, 25.0, 45.0])
def test_the_field_of_view_is_found_on_black_and_grey_surrounds(size: int, surround: float) -> None:
    image, truth = draw_fundus(size, surround=surround), true_view(size)
    view = field_of_view(image)
    assert not (view & ~truth).any()
    assert view.sum() >= 0.85 * truth.sum()
    response = hf_response(image)
    assert not response[~view].any()
    assert all(center_inside(truth, index, size // 14) for index in hf_token_indices(image, size // 14))


def test_paper_white_corners_and_a_black_ring_are_outside() -> None:
    image, truth = draw_fundus(256), true_view(256)
    y, x = np.mgrid[:256, :256] - 127.5
    image[np.hypot(y, x) > 0.49 * 256] = 255
    view = field_of_view(image)
    assert not (view & ~truth).any()
    assert view.sum() >= 0.85 * truth.sum()
    assert all(center_inside(truth, index, 16) for index in hf_token_indices(image))


def test_lettering_and_a_tab_beside_the_disc_are_outside() -> None:
    image, truth = draw_fundus(256), true_view(256)
    image[124:132, 230:254] = 120  # as cameras mark which side is up
    for top, left in ((4, 4), (230, 216)):
        image[top : top + 22, left : left + 36] = 180
    assert not (field_of_view(image) & ~truth).any()


def test_dark_corners_of_a_vignetted_image_that_fills_the_frame_are_outside() -> None:
    """Most of what Otsu calls dark is inside here; the corners are found among the darker part."""
    y, x = np.mgrid[:256, :256] - 127.5
    image = np.clip(200 - 1.1 * np.hypot(y, x), 0, 255)
    corners = np.hypot(y, x) > 150
    image[corners] = 1
    view = field_of_view(image.astype(np.uint8))
    assert not (view & corners).any()
    assert view.mean() > 0.8


def test_a_shadow_at_the_rim_stays_in_a_convex_field_of_view() -> None:
    image, truth = draw_fundus(224), true_view(224)
    cv2.circle(image, (112, 202), 18, (2, 1, 1), -1)
    filled, dented = (field_of_view(image, HFParams(fov_convex=convex)) for convex in (True, False))
    assert (truth & ~filled).sum() < (truth & ~dented).sum() - 200


@pytest.mark.parametrize("part", [np.s_[80:144, 70:150], np.s_[60:160, 60:160]])
def test_a_crop_without_surround_is_all_field_of_view(part: tuple[slice, slice]) -> None:
    assert field_of_view(np.ascontiguousarray(draw_fundus()[part])).all()


def test_opposite_edges_that_differ_do_not_fill_the_border_with_tokens() -> None:
    """The filter is periodic: without the taper, the jump from bottom to top is the strongest response."""
    image = (draw_fundus(shape="whole") * np.linspace(1.2, 0.3, 224)[:, None, None]).astype(np.uint8)

    def border_share(params: HFParams) -> float:
        return float(np.isin(hf_token_indices(image, params=params) // 14, (0, 13)).mean())

    assert border_share(WHOLE) > 0.4
    assert border_share(HFParams(fov="none")) < 0.2


# the map


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
def test_map_of_the_whole_image_ranks_as_the_image(size: int) -> None:
    image = draw_fundus(size)
    ranked = indices_from_map(hf_map(hf_response(image), 4), (0, 0, 1, 1), 16, 0.25, output_size=size)
    assert overlap(hf_token_indices(image), ranked) >= 0.95


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


# real images


def real_images(name: str, size: int, step: int = 1) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Images of one source at (size, size), with their masks as shares of a pixel."""
    root = os.environ.get("FREPA_TEST_DATA")
    if not root:
        pytest.skip("FREPA_TEST_DATA names no folder of real images")
    folder = Path(root) / "fundus" / name
    if not folder.is_dir():
        pytest.skip(f"FREPA_TEST_DATA has no fundus/{name}")
    images = []
    with (folder / "labels.csv").open(newline="") as table:
        for row in list(csv.DictReader(table))[::step]:
            pixels = [(kind, row[kind]) for kind in ("filename", "mask", "fov") if row.get(kind)]
            loaded = {
                kind: cv2.resize(cv2.imread(str(folder / file)), (size, size), interpolation=cv2.INTER_AREA)
                for kind, file in pixels
            }
            image = np.ascontiguousarray(loaded.pop("filename")[:, :, ::-1])
            images.append((image, {kind: mask[:, :, 0] / 255.0 for kind, mask in loaded.items()}))
    return images


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "floor"), [("drive", 0.92), ("chasedb1", 0.85), ("hrf", 0.90)])
def test_kept_tokens_hold_the_vessels(name: str, floor: float) -> None:
    """Recall of vessel pixels inside the kept quarter, as a share of the best that a quarter can hold."""
    recalls = []
    for image, masks in real_images(name, 224):
        vessels = patch_means(masks["mask"], 16)
        kept = vessels[hf_token_indices(image)].sum()
        recalls.append(kept / np.sort(vessels)[-49:].sum())
    print(f"{name}: vessel recall / best possible {np.mean(recalls):.3f}")
    assert np.mean(recalls) >= floor


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "size", "step"), [("drive", 512, 4), ("hrf", 512, 5), ("odir5k", 256, 150), ("odir5k", 211, 300)]
)
def test_fast_path_keeps_the_tokens_of_the_definition_on_real_images(name: str, size: int, step: int) -> None:
    shares = [overlap(reference_tokens(im), hf_token_indices(im)) for im, _ in real_images(name, size, step)]
    assert np.mean(shares) >= 0.99


@pytest.mark.real_data
@pytest.mark.parametrize("surround", [None, 28.0])
@pytest.mark.parametrize("name", ["drive", "hrf"])
def test_no_token_lies_outside_the_rim(name: str, surround: float | None) -> None:
    """By the true field of view; also with the surround replaced by noisy grey, as some cameras have it."""
    rng = np.random.default_rng(0)
    for image, masks in real_images(name, 224):
        truth = masks["fov"] >= 0.5
        if surround is not None:
            image[~truth] = np.clip(rng.normal(surround, 3, (int((~truth).sum()), 3)), 0, 255)
        view = field_of_view(image)
        assert (view & ~truth).sum() <= 0.001 * truth.sum()
        assert view.sum() >= 0.88 * truth.sum()
        tokens = hf_token_indices(image)
        assert all(center_inside(truth, index, 16) for index in tokens)
        assert (patch_means(masks["fov"], 16)[tokens] > 0.5).all()


@pytest.mark.real_data
def test_field_of_view_on_many_cameras() -> None:
    """ODIR: black surrounds, discs cut by the frame, white corners; none of it may be called inside."""
    images = [image for image, _ in real_images("odir5k", 256, 40)]
    white = [im for im, _ in real_images("odir5k", 256) if im[[0, 0, -1, -1], [0, -1, 0, -1]].min() > 240]
    assert len(white) >= 5
    for image in images + white:
        view = field_of_view(image)
        assert 0.4 <= view.mean() <= 0.9
        tissue = (image.max(axis=2) > 8) & (image.min(axis=2) < 250)
        outlines, _ = cv2.findContours(tissue.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        hull = cv2.convexHull(max(outlines, key=cv2.contourArea))  # with the shadows at the rim
        truth = cv2.drawContours(np.zeros(view.shape, np.uint8), [hull], -1, 1, cv2.FILLED) > 0
        assert (view & ~truth).sum() <= 0.002 * view.sum()
        assert (patch_means(view, 16)[hf_token_indices(image)] >= 0.5).all()


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "step"), [("drive", 4), ("hrf", 5), ("chasedb1", 4)])
def test_tokens_of_random_crops_from_the_map(name: str, step: int) -> None:
    """Truth: the full-resolution response under the same crop, resized by area, scored patch by patch."""
    rng = np.random.default_rng(0)
    values = []
    for image, _ in real_images(name, 512, step):
        response = np.abs(hf_response(image))
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
