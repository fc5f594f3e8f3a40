"""From a format's values to stored ones: windows, Hounsfield units, what stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from pydantic import ValidationError

import shards.formats.intensity
from shards.formats.common import Decoded
from shards.formats.intensity import IntensityRule, measure_window, scale_to_8_bit, to_stored

PERCENTILES = IntensityRule()
HOUNSFIELD = IntensityRule(kind="hounsfield")
KINDS = ("as_is", "hounsfield", "percentiles")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["int16", "uint16", "int8", "float32"]).flatmap(
        lambda kind: st.lists(
            arrays_of.arrays(
                kind,
                arrays_of.array_shapes(max_dims=3),
                elements=None if kind != "float32" else st.floats(-1e6, 1e6, width=32),
            ),
            min_size=1,
            max_size=4,
        )
    ),
    st.floats(0, 49),
    st.floats(51, 100),
)
def test_the_window_is_that_of_all_values_together(arrays, low, high):
    together = np.concatenate([array.ravel() for array in arrays]).astype(np.float64)
    expected = np.percentile(together, (low, high))
    window = measure_window(arrays, IntensityRule(low=low, high=high))
    if expected[1] > expected[0]:
        np.testing.assert_allclose(window, expected, rtol=1e-5, atol=1e-3)
    elif together.max() > together.min():
        assert window == (together.min(), together.max())
    else:
        assert window == (together[0], together[0] + 1)


def test_values_that_are_no_numbers_are_left_out():
    values = np.array([np.nan, np.inf, -np.inf, *range(101)], np.float32)
    assert measure_window([values], IntensityRule(low=10, high=90)) == (10, 90)
    assert measure_window([np.full((4, 4), np.nan, np.float32)], PERCENTILES) == (0, 1)
    assert measure_window([], PERCENTILES) == (0, 1)


def test_integers_and_floats_together():
    arrays = [np.arange(0, 51, dtype=np.int16), np.arange(51, 101, dtype=np.float32)]
    assert measure_window(arrays, IntensityRule(low=10, high=90)) == (10, 90)


def test_a_large_volume_is_thinned_evenly(monkeypatch):
    monkeypatch.setattr(shards.formats.intensity, "_MAX_SAMPLED", 1000)
    slices = [np.random.default_rng(n).normal(n, 1, 997).astype(np.float32) for n in range(40)]
    measured = measure_window(iter(slices), PERCENTILES)
    np.testing.assert_allclose(measured, np.percentile(np.stack(slices), (0.5, 99.5)), atol=0.7)
    # the values themselves: every 64th of the whole stream, however it is cut
    whole = measure_window([np.concatenate(slices)], PERCENTILES)
    assert measured == whole
    np.testing.assert_allclose(measured, np.percentile(np.concatenate(slices)[::64], (0.5, 99.5)), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_8_bit_pixels_stay(kind):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert to_stored(Decoded(pixels), IntensityRule(kind=kind), (3, 4)) is pixels


def test_hounsfield_units_stay_and_are_clipped():
    pixels = np.array([[-3000, -1024, 0, 3071, 9000, np.nan, 40.6, np.inf]], np.float32)
    stored = to_stored(Decoded(pixels, is_hounsfield=True), HOUNSFIELD)
    assert stored.dtype == np.int16
    assert stored.tolist() == [[-1024, -1024, 0, 3071, 3071, -1024, 41, 3071]]


def test_a_ct_without_a_unit_is_told_by_its_air():
    signed = np.array([[-1000, 0, 500]], np.int16)
    assert to_stored(Decoded(signed), HOUNSFIELD).dtype == np.int16
    assert to_stored(Decoded(signed + 1024), HOUNSFIELD).dtype == np.uint8
    assert to_stored(Decoded((signed + 1024).astype(np.uint16)), HOUNSFIELD).dtype == np.uint8


def test_only_the_hounsfield_rule_keeps_hounsfield_units():
    decoded = Decoded(np.array([[-1000, 0, 1000]], np.int16), is_hounsfield=True)
    for kind in ("as_is", "percentiles"):
        assert to_stored(decoded, IntensityRule(kind=kind, low=0, high=100)).tolist() == [[0, 128, 255]]


def test_the_windows_precedence():
    pixels = np.arange(0, 1001, dtype=np.uint16).reshape(1, -1)
    decoded = Decoded(pixels, window=(100, 200))
    assert to_stored(decoded, PERCENTILES)[0, [5, 500, 995]].tolist() == [0, 128, 255]
    assert to_stored(decoded, PERCENTILES, (0, 2000))[0, 1000] == 128
    voi = IntensityRule(prefer_voi=True)
    assert to_stored(decoded, voi, (0, 2000))[0, [100, 150, 200]].tolist() == [0, 128, 255]
    assert to_stored(Decoded(pixels), voi, (0, 2000))[0, 1000] == 128


@pytest.mark.parametrize("window", [(0.0, 1e-40), (5e30, 5e30), (-3e38, 3e38)])
def test_extreme_windows(window):
    values = np.array([[-np.inf, -1e38, 0, 1e38, np.inf, np.nan]], np.float32)
    scaled = scale_to_8_bit(values, window)
    assert scaled[0, 0] == 0
    assert scaled[0, 4] == 255
    assert scaled[0, 5] == 0
    assert (np.diff(scaled[0, :5].astype(int)) >= 0).all()


def test_rules_are_checked():
    with pytest.raises(ValidationError):
        IntensityRule(low=99, high=1)
    with pytest.raises(ValidationError):
        IntensityRule(kind="bones")
