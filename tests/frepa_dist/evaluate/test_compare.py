"""Paired tests: against the definition, and how often they cry wolf."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from frepa_dist.evaluate.compare import delong, holm, permutation_test
from frepa_dist.evaluate.scores import auroc, macro_auroc


def pair(seed, num=80, gain=0.0, shared=0.7):
    """Two scores of the same images, correlated, the first better by `gain` standard deviations."""
    rng = np.random.default_rng(seed)
    y = np.arange(num) % 2
    common = rng.normal(size=num)
    noise = rng.normal(size=(2, num))
    first, second = shared * common + (1 - shared) * noise + 0.5 * y
    return first + gain * y, second, y


def by_definition(scores, positive):
    """Placement values, image by image."""
    own, others = scores[positive], scores[~positive]
    wins = (own[:, None] > others[None, :]) + 0.5 * (own[:, None] == others[None, :])
    return wins.mean(axis=1), wins.mean(axis=0)


def test_delong_equals_its_definition_with_ties():
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, 6, (2, 70)).astype(float)
    positive = rng.random(70) < 0.4
    found = delong(first, second, positive)
    (v10a, v01a), (v10b, v01b) = by_definition(first, positive), by_definition(second, positive)
    covariance = np.cov(v10a, v10b) / positive.sum() + np.cov(v01a, v01b) / (~positive).sum()
    deviation = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert found.value == pytest.approx(auroc(first, positive) - auroc(second, positive))
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * deviation)


def test_delong_of_alike_encoders_has_uniform_p():
    p = [delong(*pair(seed)[:2], pair(seed)[2] == 1).p for seed in range(300)]
    assert kstest(p, "uniform").pvalue > 0.01


def test_delong_finds_a_real_gain_and_says_nothing_of_equals():
    first, second, y = pair(0, num=400, gain=0.5)
    assert delong(first, second, y == 1).p < 1e-4
    same = delong(first, first, y == 1)
    assert (same.value, same.p) == (0, 1)


def test_delong_cannot_tell_always_right_from_always_wrong():
    found = delong(np.array([0.0, 1, 2, 3]), np.array([3.0, 2, 1, 0]), np.array([0, 0, 1, 1]) == 1)
    assert found.value == 1
    assert np.isnan([found.low, found.high, found.p]).all()


def as_scores(values):
    return np.stack([-values, values], axis=1)


def test_permutation_agrees_with_delong():
    for seed, gain in ((1, 0.0), (2, 0.15), (3, 0.3)):
        first, second, y = pair(seed, num=200, gain=gain)
        exact = delong(first, second, y == 1)
        found = permutation_test(as_scores(first), as_scores(second), y, None, macro_auroc, num=1000)
        assert found.value == pytest.approx(exact.value)
        assert found.p == pytest.approx(exact.p, abs=0.06)


def test_permutation_swaps_patients_whole():
    # 8 copies of each image are no more evidence than one: the p value must not shrink
    first, second, y = pair(5, num=40, gain=0.6)
    alone = permutation_test(as_scores(first), as_scores(second), y, None, macro_auroc, num=1000)
    copies = [np.repeat(values, 8) for values in (first, second, y)]
    patients = np.repeat(np.arange(40), 8)
    args = (as_scores(copies[0]), as_scores(copies[1]), copies[2])
    assert permutation_test(*args, patients, macro_auroc, num=1000).p == pytest.approx(alone.p, abs=0.05)
    assert permutation_test(*args, None, macro_auroc, num=1000).p < alone.p / 2


def test_holm():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1, 1])
