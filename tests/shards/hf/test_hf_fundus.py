"""HF tokens of fundus photographs: the field of view, and where the tokens lie, drawn and real."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from shards.hf.tokens import HFParams, field_of_view, hf_response, hf_token_indices
from tests.shards.fundus import (
    FUNDUS,
    center_inside,
    draw_fundus,
    overlap,
    patch_means,
    real_images,
    reference_tokens,
    true_view,
)

WHOLE = HFParams(fov="none", frame_taper=0)


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


# real images


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "floor", "noisy_floor"),
    [("drive", 0.949, 0.935), ("chasedb1", 0.925, 0.87), ("hrf", 0.94, 0.91)],
)
def test_kept_tokens_hold_the_vessels(name: str, floor: float, noisy_floor: float) -> None:
    """Recall of vessel pixels inside the kept quarter, as a share of the best that a quarter can hold."""
    rng = np.random.default_rng(0)
    recalls, noisy_recalls = [], []
    for image, masks in real_images(name, 224):
        vessels = patch_means(masks["mask"], 16)
        best = np.sort(vessels)[-49:].sum()
        noisy = np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
        for picture, found in ((image, recalls), (noisy, noisy_recalls)):
            found.append(vessels[hf_token_indices(picture, params=FUNDUS)].sum() / best)
    low = np.percentile(recalls, 5)
    print(
        f"{name}: vessel recall / best possible {np.mean(recalls):.3f}, 5th percentile {low:.3f}, "
        f"least {min(recalls):.3f}; with noise {np.mean(noisy_recalls):.3f}"
    )
    assert np.mean(recalls) >= floor
    assert min(recalls) >= 0.82
    assert np.mean(noisy_recalls) >= noisy_floor


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "size", "step"), [("drive", 512, 4), ("hrf", 512, 5), ("odir5k", 256, 150), ("odir5k", 211, 300)]
)
def test_fast_path_keeps_the_tokens_of_the_definition_on_real_images(name: str, size: int, step: int) -> None:
    shares = [
        overlap(reference_tokens(image, FUNDUS), hf_token_indices(image, params=FUNDUS))
        for image, _ in real_images(name, size, step)
    ]
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
        tokens = hf_token_indices(image, params=FUNDUS)
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
        assert (patch_means(view, 16)[hf_token_indices(image, params=FUNDUS)] >= 0.5).all()
