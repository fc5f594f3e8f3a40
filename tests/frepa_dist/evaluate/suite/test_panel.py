"""Statistics of a suite against closed cases, and how often its tests cry wolf."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from frepa_dist.evaluate.compare import delong, permutation_test
from frepa_dist.evaluate.scores import macro_auroc
from frepa_dist.evaluate.suite.panel import (
    Panel,
    compare_panels,
    interval_over_units,
    macro_auroc_of_many,
    spread_over_seeds,
    stack_panels,
)


def draw_scores(seed, gains, num=60, num_classes=2):
    """A panel of scores, (S, 1, n, K), of images with shared difficulty; `gains` of each seed."""
    rng = np.random.default_rng(seed)
    y = np.arange(num) % num_classes
    common = np.random.default_rng(99).normal(size=(num, num_classes))
    scores = [
        common + rng.normal(size=(num, num_classes)) + gain * (y[:, None] == np.arange(num_classes))
        for gain in gains
    ]
    return Panel(np.array(scores)[:, None], np.arange(num), y)


def draw_values(values, groups=None):
    values = np.array(values, float)
    return Panel(values, np.arange(values.shape[1]) if groups is None else np.array(groups))


def compare(first, second, **given):
    return compare_panels(first, second, **{"num_resamples": 200, "num": 400, "seed": 0, **given})


def test_many_aurocs_are_those_of_one():
    rng = np.random.default_rng(0)
    scores, y = rng.integers(0, 5, (2, 3, 30, 4)).astype(float), np.arange(30) % 4
    expected = [[macro_auroc(one, y) for one in row] for row in scores]
    np.testing.assert_allclose(macro_auroc_of_many(scores, y), expected)


@pytest.mark.parametrize("panel", [draw_scores(0, [1, 1]), draw_values([[1, 2, np.nan], [2, 3, np.nan]])])
def test_identical_encoders_have_no_difference(panel):
    found = compare(panel, panel)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_one_seed_is_the_paired_test_of_two_results():
    first, second = draw_scores(1, [1.5]), draw_scores(2, [0.8])
    known = permutation_test(first.values[0, 0], second.values[0, 0], first.y, None, macro_auroc, num=400)
    found = compare(first, second, num_resamples=400)
    assert (found.value, found.p) == pytest.approx((known.value, known.p))
    # the intervals are of scores and of ranks: of an AUROC drawn anew, nearly the same
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=0.02)


def test_swaps_against_all_of_them():
    gaps = np.array([0.5, 0.1, 0.3, -0.2, 0.4])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1)
    exact = np.mean(np.abs(signs.T @ gaps) >= abs(gaps.sum()) - 1e-12)
    zero = draw_values(np.zeros((1, 5)))
    found = compare(draw_values([gaps]), zero, num=20_000)
    assert found.value == pytest.approx(gaps.mean())
    assert found.p == pytest.approx(exact, abs=0.01)
    # seeds are swapped together: two seeds around the same means are the same test
    both = compare(draw_values([gaps + 1, gaps - 1]), draw_values(np.zeros((2, 5))), num=20_000)
    assert both.p == pytest.approx(found.p)
    # images of one patient change sides together
    one_patient = compare(
        draw_values([gaps], np.zeros(5, int)), draw_values(np.zeros((1, 5)), np.zeros(5, int))
    )
    assert one_patient.p == pytest.approx(1)


def test_images_that_one_cannot_tell_do_not_count():
    first, second = draw_values([[1, 5, np.nan, 3]]), draw_values([[0, np.nan, 7, 2]])
    assert compare(first, second).value == 1
    nothing = compare(draw_values([[1, np.nan]]), draw_values([[np.nan, 1]]))
    assert (nothing.p, nothing.test) == (1, "no image that both can tell")


def test_alike_encoders_have_uniform_p_and_a_real_gain_is_found():
    p = [compare(draw_scores(seed, [1, 1]), draw_scores(1000 + seed, [1, 1]), num=99, num_resamples=2).p
         for seed in range(120)]  # fmt: skip
    assert kstest(p, "uniform").pvalue > 0.01
    assert compare(draw_scores(0, [3, 3]), draw_scores(1, [0, 0])).p < 0.01


def test_other_numbers_of_seeds_are_judged_by_the_bootstrap():
    first, second = draw_scores(1, [1.5]), draw_scores(2, [0.8, 0.8, 0.8])
    found = compare(first, second, num_resamples=1000)
    assert found.test == "bootstrap, normal"
    alone = compare(first, Panel(second.values[:1], second.groups, second.y), num_resamples=1000)
    assert alone.test == "permutation"
    # of one seed each, the bootstrap's p is near DeLong's
    one, other = first.values[0, 0], second.values[0, 0]
    twice = Panel(np.repeat(second.values[:1], 2, axis=0), second.groups, second.y)
    known = delong(one[:, 1] - one[:, 0], other[:, 1] - other[:, 0], first.y == 1)
    assert compare(first, twice, num_resamples=1000).p == pytest.approx(known.p, abs=0.12)
    # of image values, the seeds' means are swapped
    assert compare(draw_values([[1, 2]]), draw_values([[0, 1], [1, 2]])).test == "permutation"


def test_intervals_and_spreads():
    panel = draw_values([[0, 1] * 50, [1, 0] * 50])
    low, high = interval_over_units(panel, 500, 0)
    assert low == high == 0.5  # of every image the mean over seeds is the same
    low, high = interval_over_units(Panel(panel.values[:1], panel.groups), 500, 0)
    assert (low, high) == pytest.approx((0.4, 0.6), abs=0.03)
    spread = spread_over_seeds([1.0, 2.0, 3.0])
    assert (spread.mean, spread.deviation) == (2, 1)
    assert (spread.low, spread.high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)  # t of 2: 4.3027
    assert spread_over_seeds([1.0]) is None


def test_panels_of_other_images_are_not_put_together():
    panel = draw_scores(0, [1])
    assert stack_panels([panel, draw_scores(1, [1, 1])]).values.shape == (3, 1, 60, 2)
    assert stack_panels([panel, draw_scores(1, [1], num=58)]) is None
    assert stack_panels([panel, Panel(panel.values, panel.groups, 1 - panel.y)]) is None
