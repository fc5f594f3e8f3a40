"""Figures show the numbers they are given."""

from __future__ import annotations

import numpy as np
import pytest

from frepa_dist.evaluate.plots import curve_figure, intervals_figure, phases_figure, spectra_figure


def test_a_curve_leaves_out_lines_without_the_value():
    records = [{"step": 1, "a": 2.0}, {"step": 2}, {"step": 3, "a": 4.0, "b": None}]
    (axes,) = curve_figure(records, "title", ["a", "b"]).axes
    first, second = axes.lines
    np.testing.assert_array_equal(first.get_xydata(), [[1, 2], [3, 4]])
    assert len(second.get_xydata()) == 0


def test_every_value_of_a_large_group_is_drawn():
    names = [f"v{number}" for number in range(11)]
    (axes,) = curve_figure([{"step": 1, **dict.fromkeys(names, 1.0)}], "title", names).axes
    assert [line.get_label() for line in axes.lines] == names


def test_spectra_leave_out_the_mean():
    spectra = {"original": np.array([9.0, 1.0, 0.5]), "after": np.array([9.0, 2.0, 0.0])}
    (axes,) = spectra_figure(spectra).axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 1.0], [2, 0.5]])
    np.testing.assert_array_equal(axes.lines[1].get_xydata()[0], [1, 2.0])
    assert axes.lines[1].get_ydata()[1] > 0  # a zero has no place on a logarithmic axis
    assert [line.get_label() for line in axes.lines] == ["original", "after"]


def test_axis_of_intervals_grows_to_hold_them():
    figure = intervals_figure(["a", "b"], [0.5, 0.2], [(-0.3, 0.9), None], xlabel="x", limits=(0.0, 1.0))
    (axes,) = figure.axes
    assert axes.get_xlim() == (-0.3, 1.0)
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.2]
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xydata(), [[-0.3, 0], [0.9, 0]])


@pytest.mark.parametrize("seconds", [{"data": 0.5, "forward": 1.5}, {str(i): 1.0 for i in range(12)}])
def test_phases_follow_each_other_without_a_gap(seconds):
    (axes,) = phases_figure(seconds).axes
    ends = np.cumsum(list(seconds.values()))
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == pytest.approx(list(ends))
