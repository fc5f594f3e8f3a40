"""Figures show the numbers they are given."""

from __future__ import annotations

import numpy as np
import pytest

from frepa_dist.evaluate.plots import (
    Line,
    curve_figure,
    intervals_figure,
    lines_figure,
    matrix_figure,
    phases_figure,
    spectra_figure,
)


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


def test_lines_have_their_bands_and_a_legend_only_where_there_are_several():
    first = Line("a", [1, 2, 4], [0.1, 0.5, 0.9], [0, 0.4, 0.8], [0.2, 0.6, 1.0])
    figure = lines_figure([first], xlabel="x", ylabel="y", is_log=True, reference=0.5)
    (axes,) = figure.axes
    line, mark = axes.lines
    np.testing.assert_array_equal(line.get_xydata(), [[1, 0.1], [2, 0.5], [4, 0.9]])
    assert (axes.get_xscale(), len(axes.collections), list(mark.get_ydata())) == ("log", 1, [0.5, 0.5])
    assert not figure.legends
    figure = lines_figure([first, Line("b", [1], [2])], xlabel="x", ylabel="y", limits=(0, 3))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert figure.axes[0].get_ylim() == (0, 3)


def test_a_matrix_has_its_first_row_on_top_and_its_numbers():
    values = np.array([[0.0, 0.25, 1.0], [0.5, 0.75, 0.1]])
    axes, _ = matrix_figure(values, ["r0", "r1"], ["a", "b", "c"], label="CKA").axes
    assert axes.get_ylim() == (1.5, -0.5)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["r0", "r1"]
    assert [text.get_text() for text in axes.texts] == ["0.00", "0.25", "1.00", "0.50", "0.75", "0.10"]
    assert axes.texts[2].get_position() == (2, 0)
