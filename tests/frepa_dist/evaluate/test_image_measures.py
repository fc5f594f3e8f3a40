"""Means and intervals over images that cannot all tell every measure."""

from __future__ import annotations

import math

import numpy as np

from frepa_dist.evaluate.image_measures import (
    intervals_over_images,
    mean_over_images,
    values_by_image,
    worst_middle_best,
)

ROWS = [{"a": 1.0, "b": math.nan, "c": math.nan}, {"a": 3.0, "b": 5.0, "c": math.nan}]


def test_means_leave_out_what_cannot_be_told():
    assert mean_over_images(ROWS) == {"a": 2.0, "b": 5.0}
    assert values_by_image(ROWS) == {"a": [1.0, 3.0], "b": [None, 5.0], "c": [None, None]}


def test_intervals_are_those_of_resampled_means():
    rng = np.random.default_rng(0)
    values = rng.normal(size=60)
    low, high = intervals_over_images([{"a": float(v)} for v in values], 2000, 0)
    means = [rng.choice(values, 60).mean() for _ in range(4000)]
    np.testing.assert_allclose([low["a"], high["a"]], np.percentile(means, [2.5, 97.5]), atol=0.02)
    low, high = intervals_over_images(ROWS, 50, 0)
    assert (low["b"], high["b"]) == (5, 5)
    assert set(low) == {"a", "b"}


def test_images_of_a_patient_are_drawn_together():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 10)
    covered = {"images": 0, "patients": 0}
    for trial in range(100):
        values = 0.1 * rng.normal(size=12)[groups] + 0.03 * rng.normal(size=120)  # the mean is 0
        rows = [{"a": float(value)} for value in values]
        for name, known in (("images", None), ("patients", groups.tolist())):
            low, high = intervals_over_images(rows, 300, trial, known)
            covered[name] += low["a"] <= 0 <= high["a"]
    assert covered["patients"] >= 80 > 65 >= covered["images"]


def test_best_median_and_worst():
    assert worst_middle_best([0.2, None, 0.9, 0.5]) == [("best", 2), ("median", 3), ("worst", 0)]
    assert worst_middle_best([None]) == []
    assert worst_middle_best([0.5, 0.2]) == [("best", 0), ("worst", 1)]
    assert worst_middle_best([0.5]) == [("best", 0)]
