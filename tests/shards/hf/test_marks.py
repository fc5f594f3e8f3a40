"""Burnt-in marks: what is one, what is none; painting them over leaves the tokens where they were."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from shards.hf.marks import find_marks, paint_over
from shards.hf.modalities import MODALITIES
from shards.hf.tokens import HFParams, hf_token_indices
from tests.shards.scenes import agreement, draw_fan, share_of_patches, texture, to_uint8


def test_letters_are_marks_and_long_lines_are_not() -> None:
    image = to_uint8(60 + 10 * texture((256, 256), grain=3))
    image[40:42] = image[:, 200:202] = 240  # as a fascia or a needle
    plain = find_marks(image, 0.3)
    assert plain is None or plain.mean() < 0.001  # at most where they cross
    lettered = image.copy()
    cv2.putText(lettered, "LT 3", (80, 150), cv2.FONT_HERSHEY_SIMPLEX, 0.4, 245, 1, cv2.LINE_AA)
    marks = find_marks(lettered, 0.3)
    assert marks is not None
    drawn_over = lettered.astype(int) - image > 100
    assert marks[drawn_over].mean() > 0.95
    assert marks.mean() < 0.03


def test_only_white_is_a_mark_in_a_color_image() -> None:
    image = to_uint8(np.array((150, 70, 60)) + 5 * texture((256, 256))[:, :, None])
    image[100:104, 100:104] = (255, 90, 70)  # red: a vessel, a stain
    assert find_marks(image, 0.3) is None
    image[60:66, 60:66] = 250  # a highlight
    marks = find_marks(image, 0.3)
    assert marks is not None
    assert marks[60:66, 60:66].all()
    assert marks.sum() < 150


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_marks_are_painted_with_what_is_around_them(dtype: type) -> None:
    ramp = np.tile(np.linspace(50, 150, 200, dtype=dtype), (160, 1))
    marked = ramp.copy()
    marks = np.zeros(ramp.shape, np.uint8)
    marks[70:76, 90:100] = 1
    marked[marks > 0] = 255
    painted = paint_over(marked, marks)
    assert painted.dtype == dtype
    np.testing.assert_array_equal(painted[marks == 0], ramp[marks == 0])
    assert np.abs(painted - ramp).max() < 4
    np.testing.assert_array_equal(paint_over(ramp.copy(), np.ones_like(marks)), ramp)


def test_lettering_and_callipers_do_not_move_the_tokens() -> None:
    image, _ = draw_fan(320)
    lettered = image.copy()
    for number, text in enumerate(("RIGHT BREAST", "RT 10 H 3 CM", "ANTIRADIAL")):
        place = (110, 150 + 30 * number)
        cv2.putText(lettered, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 255, 1, cv2.LINE_AA)
    for x, y in ((120, 260), (200, 280)):
        cv2.line(lettered, (x - 5, y), (x + 5, y), 255, 1)
        cv2.line(lettered, (x, y - 5), (x, y + 5), 255, 1)
    marked = lettered.astype(int) - image > 60

    def kept(params: HFParams) -> tuple[float, float]:
        tokens = hf_token_indices(lettered, params=params)
        touching = (share_of_patches(marked, tokens) > 0.04).sum()
        return agreement(hf_token_indices(image, params=params), tokens), float(touching)

    params = MODALITIES["ultrasound"].hf
    with_marks, without = kept(params.model_copy(update={"mark_contrast": 0.0})), kept(params)
    assert without[0] >= 0.9 > with_marks[0]
    assert without[1] < 0.5 * with_marks[1]
