"""The rules that tell what an image shows from what surrounds it, on drawn images."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from shards.hf.modalities import MODALITIES
from shards.hf.tokens import HFParams, field_of_view, hf_response, hf_response_reference, hf_token_indices
from tests.shards.scenes import (
    PATCH,
    agreement,
    draw_fan,
    drawn,
    ellipse,
    share_of_patches,
    texture,
    to_uint8,
)


def check_view(image: np.ndarray, truth: np.ndarray, params: HFParams, least: float = 0.8) -> None:
    """Nothing outside `truth` is in the field of view, most of it is, and no token lies outside."""
    view = field_of_view(image, params)
    assert (view & ~truth).sum() <= 0.002 * truth.sum()
    assert (view & truth).sum() >= least * truth.sum()
    tokens = hf_token_indices(image, PATCH, 0.25, params)
    assert (share_of_patches(truth, tokens) >= 0.5).all()


# ultrasound, OCT: padding


@pytest.mark.parametrize("size", [160, 320, 512])
def test_a_fan_is_found_without_the_text_and_the_grey_bar_beside_it(size: int) -> None:
    image, fan = draw_fan(size)
    scale = size / 320
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(image, "MI 1.2", (int(4 * scale), int(20 * scale)), font, 0.4 * scale, 230, 1)
    bar = np.s_[int(0.3 * size) : int(0.6 * size), int(0.97 * size) : int(0.99 * size)]
    image[bar] = np.linspace(255, 60, image[bar].shape[0])[:, None]
    check_view(image, fan, MODALITIES["ultrasound"].hf)


def test_a_shadow_inside_the_fan_stays_inside() -> None:
    image, fan = draw_fan()
    shadow = drawn(image.shape, np.array([[0.45, 0.4], [0.55, 0.4], [0.58, 0.7], [0.42, 0.7]]))
    image[shadow] = 0
    view = field_of_view(image, MODALITIES["ultrasound"].hf)
    assert view[shadow].all()
    assert not (view & ~fan).any()


@pytest.mark.parametrize("level", [0, 255])
def test_a_wedge_of_padding_holds_no_token(level: int) -> None:
    image = to_uint8(30 + 12 * texture((256, 400), grain=0.8))
    image[120:150] = to_uint8(150 + 40 * texture((30, 400)))
    wedge = drawn(image.shape, np.array([[0, 0], [1, 0], [1, 0.22], [0, 0.08]]))
    image[wedge] = level
    params = MODALITIES["oct"].hf
    check_view(image, ~wedge, params, least=0.85)
    whole = params.model_copy(update={"fov": "none"})
    assert (share_of_patches(wedge, hf_token_indices(image, params=whole)) > 0).any()


def test_black_and_white_that_are_no_padding_stay_inside() -> None:
    image = to_uint8(60 + 25 * texture((256, 256)))
    image[100:140, 100:160] = 0  # does not reach the frame
    image[:40] = to_uint8(12 + 2 * texture((40, 256)))  # dark, but not black
    assert field_of_view(image, MODALITIES["oct"].hf).all()


# CT: the body


def draw_slice(size: int = 256, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A chest on a table in Hounsfield units, int16; the body, and the table."""
    shape = (size, size)
    body = ellipse(shape, (0.5, 0.45), (0.4, 0.3))
    table = drawn(shape, np.array([[0.1, 0.8], [0.9, 0.8], [0.9, 0.84], [0.1, 0.84]]))
    image = np.full(shape, -1000.0)
    image[body] = 40
    for center in (0.33, 0.67):
        image[ellipse(shape, (center, 0.43), (0.13, 0.2))] = -850
    rng = np.random.default_rng(seed)
    for x, y in rng.uniform((0.24, 0.3), (0.42, 0.55), (25, 2)):
        image[ellipse(shape, (x, y), (0.008, 0.008))] = 30
    image[table] = 100
    image += rng.normal(0, 15, shape)
    image[~ellipse(shape, (0.5, 0.5), (0.5, 0.5))] = -2000  # outside the circle that is reconstructed
    return np.rint(image).astype(np.int16), body, table


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("size", [160, 256, 512])
def test_a_ct_slice_is_its_body_without_table_and_air_but_with_lungs(size: int, dtype: type) -> None:
    image, body, table = draw_slice(size)
    params = MODALITIES["ct"].hf
    view = field_of_view(image.astype(dtype), params)
    assert not (view & table).any()
    check_view(image.astype(dtype), body, params)
    windowed = to_uint8((image + 1000.0) / 1400 * 255)  # as pictures of CT are: Otsu takes the level's place
    check_view(windowed, body, params)
    assert not (field_of_view(windowed, params) & table).any()


def test_lungs_cut_by_the_frame_stay_inside() -> None:
    image, body, _ = draw_slice()
    part = np.s_[70:170, 55:201]  # the lungs reach the left and right edges
    params = MODALITIES["ct"].hf
    picture = to_uint8((image[part] + 1000.0) / 1400 * 255)
    assert body[part].mean() > 0.95
    assert field_of_view(picture, params).mean() > 0.85
    assert field_of_view(picture, params)[25:60, 20:30].all()


def test_bright_metal_does_not_raise_the_level_where_the_body_begins() -> None:
    shape = (200, 200)
    limb = ellipse(shape, (0.5, 0.5), (0.56, 0.56))  # cut by the frame
    image = np.where(limb, 40.0, -1000) + np.random.default_rng(0).normal(0, 15, shape)
    image[ellipse(shape, (0.5, 0.5), (0.35, 0.35))] = 1000
    params = MODALITIES["ct"].hf
    check_view(image.astype(np.int16), limb, params)
    by_otsu = field_of_view(image.astype(np.int16), params.model_copy(update={"fov_level": None}))
    assert (by_otsu & limb).sum() < 0.6 * limb.sum()


def test_clip_ends_what_metal_and_padding_add() -> None:
    image, _, _ = draw_slice()
    params = MODALITIES["ct"].hf
    image[120:124, 126:130] = 1000
    metal = image.copy()
    metal[120:124, 126:130] = 3071
    metal[image < -1000] = -3024
    np.testing.assert_array_equal(hf_response(metal, params), hf_response(image, params))
    unclipped = params.model_copy(update={"clip": None})
    assert np.abs(hf_response(metal, unclipped) - hf_response(image, unclipped)).max() > 100
    picture = np.arange(256, dtype=np.uint8).repeat(64).reshape(128, 128)
    narrow = HFParams(clip=(0.0, 10.0), fov="none")
    np.testing.assert_array_equal(hf_response(picture, narrow), hf_response(picture, HFParams(fov="none")))


# dermoscopy: dark corners


def draw_skin(size: int = 224, radius: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Skin with a lesion under a tube whose shadow falls off smoothly beyond `radius`; where it is lit."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    distance = np.hypot(y, x)
    light = np.clip(1 - (distance - radius) / 0.05, 0.03, 1)
    skin = np.full((size, size, 3), (215, 170, 160), np.float64)
    skin[np.hypot(y - 0.1, x + 0.05) < 0.2] = (110, 60, 50)
    skin += 6 * texture((size, size))[:, :, None]
    return to_uint8(skin * light[:, :, None]), distance < radius + 0.025


@pytest.mark.parametrize("size", [224, 512])
def test_dark_corners_are_outside_and_their_soft_edge_holds_no_token(size: int) -> None:
    image, lit = draw_skin(size)
    check_view(image, lit, MODALITIES["dermoscopy"].hf)


def test_corners_that_are_somewhat_darker_stay_inside() -> None:
    y, x = (np.mgrid[:224, :224] + 0.5) / 224 - 0.5
    light = 1 - 0.6 * np.hypot(y, x) ** 2
    skin = np.array((215, 170, 160)) * light[:, :, None] + 4 * texture((224, 224))[:, :, None]
    assert field_of_view(to_uint8(skin), MODALITIES["dermoscopy"].hf).all()


def test_a_dark_lesion_that_reaches_the_frame_stays_inside() -> None:
    image, _ = draw_skin(radius=1.0)
    image[80:160, :70] = to_uint8(np.array((70, 40, 35)) + 8 * texture((80, 70))[:, :, None])
    assert field_of_view(image, MODALITIES["dermoscopy"].hf).all()


# X-ray, MRI, endoscopy: a measured surround


@pytest.mark.parametrize("dark", [0, 14])
def test_a_collimated_and_turned_xray_ends_at_its_edge(dark: int) -> None:
    size = 272
    exposed = drawn((size, size), np.array([[0.1, 0.06], [0.95, 0.12], [0.9, 0.93], [0.05, 0.88]]))
    image = 130 + 25 * texture((size, size), grain=5) + 6 * texture((size, size))
    image = to_uint8(np.where(exposed, image, dark + np.random.default_rng(0).normal(0, 1, (size, size))))
    check_view(image, exposed, MODALITIES["xray"].hf)


def test_white_tissue_that_reaches_the_frame_stays_inside_an_xray() -> None:
    image = to_uint8(120 + 20 * texture((256, 256)))
    image[170:] = 255
    assert field_of_view(image, MODALITIES["xray"].hf).all()
    assert not field_of_view(image, HFParams(channel="luminance"))[220:].any()


def test_a_head_and_neck_are_followed_where_a_hull_would_take_in_the_air() -> None:
    shape = (224, 224)
    head = ellipse(shape, (0.5, 0.35), (0.25, 0.3))
    body = head | drawn(
        shape, np.array([[0.4, 0.5], [0.6, 0.5], [0.62, 0.8], [0.97, 1], [0.03, 1], [0.38, 0.8]])
    )
    image = np.abs(np.where(body, 110 + 25 * texture(shape), 3 * texture(shape, 1, 0.7)))
    params = MODALITIES["mri"].hf
    check_view(to_uint8(image), body, params, least=0.7)
    hull = field_of_view(to_uint8(image), params.model_copy(update={"fov_convex": True}))
    assert (hull & ~body).sum() > 500


def test_an_octagon_ends_at_its_border_and_at_the_box_in_its_corner() -> None:
    size = 256
    corners = [[0.2, 0], [0.85, 0], [1, 0.2], [1, 0.8], [0.85, 1], [0.2, 1], [0, 0.8], [0, 0.2]]
    octagon = drawn((size, size), np.array(corners))
    octagon[170:, :80] = False
    tissue = np.array((190, 100, 80)) + 12 * texture((size, size))[:, :, None]
    image = to_uint8(np.where(octagon[:, :, None], tissue, 2))
    check_view(image, octagon, MODALITIES["endoscopy"].hf)


# histopathology: ink and glass


@pytest.mark.parametrize("ink", [(20, 110, 60), (20, 60, 160), (15, 15, 18)])
def test_pen_marks_hold_no_token(ink: tuple[int, int, int]) -> None:
    size = 256
    image = np.array((220, 170, 205)) + 5 * texture((size, size))[:, :, None]
    for x, y in np.random.default_rng(0).uniform(0, size, (120, 2)).astype(int):
        cv2.circle(image, (int(x), int(y)), 4, (95, 55, 130), -1, cv2.LINE_AA)  # nuclei
    stroke = np.zeros((size, size), np.uint8)
    cv2.line(stroke, (-5, 200), (260, 60), 1, 34)
    image[stroke > 0] = np.array(ink) + 3 * texture((size, size))[stroke > 0][:, None]
    image = to_uint8(image)
    params = MODALITIES["histopathology"].hf
    assert not field_of_view(image, params)[stroke > 0].any()
    assert (share_of_patches(stroke > 0, hf_token_indices(image, params=params)) <= 0.5).all()
    whole = params.model_copy(update={"fov": "none"})
    touching = [
        (share_of_patches(stroke > 0, hf_token_indices(image, params=p)) > 0.2).mean()
        for p in (whole, params)
    ]
    assert touching[0] > 0.2
    assert touching[1] < 0.5 * touching[0]


def test_wide_glass_is_outside_and_tissue_with_its_margin_is_not() -> None:
    image = np.full((256, 256, 3), 238.0)
    image[:, :100] = np.array((200, 150, 190)) + 10 * texture((256, 100))[:, :, None]
    view = field_of_view(to_uint8(image), MODALITIES["histopathology"].hf)
    assert view[20:-20, 10:105].all()
    assert not view[:, 125:].any()


# all rules


@pytest.mark.parametrize("name", sorted(MODALITIES))
def test_depth_does_not_matter(name: str) -> None:
    """The same picture in 8 bits, in 16 and in floating point has the same field of view and tokens."""
    if name == "ct":
        pytest.skip("deep CT is in Hounsfield units: another rule")
    picture = draw_skin()[0] if name in ("dermoscopy", "histopathology", "endoscopy") else draw_fan(224)[0]
    params = MODALITIES[name].hf
    for other in (picture.astype(np.uint16) * 257, picture.astype(np.float32) / 255):
        assert (field_of_view(other, params) == field_of_view(picture, params)).mean() >= 0.999
        assert (
            agreement(hf_token_indices(picture, params=params), hf_token_indices(other, params=params))
            >= 0.95
        )


@pytest.mark.parametrize("name", sorted(MODALITIES))
@pytest.mark.parametrize("kind", ["black", "flat", "noise", "halves", "checkers", "one pixel", "line"])
def test_any_image_has_a_finite_response_that_equals_the_definition(name: str, kind: str) -> None:
    shape = (1, 70) if kind == "line" else (61, 70)
    picture = np.zeros(shape, np.uint8)
    if kind in ("noise", "line"):
        picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    elif kind == "flat":
        picture[:] = 130
    elif kind == "halves":
        picture[:30] = 255
    elif kind == "checkers":
        picture[::8] = picture[:, ::8] = 250
    elif kind == "one pixel":
        picture[30, 30] = 255
    params = MODALITIES[name].hf
    for image in (picture, np.repeat(picture[:, :, None], 3, axis=2), picture.astype(np.int16) * 8 - 1000):
        response = hf_response(image, params)
        assert np.isfinite(response).all()
        np.testing.assert_allclose(response, hf_response_reference(image, params), atol=2e-5 * 2048)
        if kind in ("black", "flat"):
            assert not response.any()
