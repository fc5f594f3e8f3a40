"""Measures of classes against scikit-learn's, and their intervals against a known truth."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from frepa_dist.evaluate.scores import (
    accuracy,
    auroc,
    average_precision,
    balanced_accuracy,
    bootstrap_intervals,
    macro_auprc,
    macro_auroc,
    measures,
    members_of,
    quadratic_kappa,
    resamples,
)
from shards.read.draws import sample_rng


def draw(num=300, num_classes=4, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, num_classes, num)
    scores = rng.normal(size=(num, num_classes)) + np.eye(num_classes)[y]
    return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True), y


def test_auroc_equals_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 5, 200).astype(float), rng.random(200) < 0.3
    assert auroc(scores, positive) == pytest.approx(metrics.roc_auc_score(positive, scores))
    expected = metrics.average_precision_score(positive, scores)
    assert average_precision(scores, positive) == pytest.approx(expected)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_measures_equal_scikit_learns(num_classes):
    scores, y = draw(num_classes=num_classes)
    found = scores.argmax(axis=1)
    if num_classes == 2:
        wanted = metrics.roc_auc_score(y, scores[:, 1]), metrics.average_precision_score(y, scores[:, 1])
    else:
        wanted = (
            metrics.roc_auc_score(y, scores, multi_class="ovr"),
            metrics.average_precision_score(np.eye(num_classes)[y], scores, average="macro"),
        )
    assert (macro_auroc(scores, y), macro_auprc(scores, y)) == pytest.approx(wanted)
    assert accuracy(scores, y) == pytest.approx(metrics.accuracy_score(y, found))
    assert balanced_accuracy(scores, y) == pytest.approx(metrics.balanced_accuracy_score(y, found))
    kappa = metrics.cohen_kappa_score(y, found, weights="quadratic")
    assert quadratic_kappa(scores, y) == pytest.approx(kappa)


def test_kappa_of_one_grade_alone_is_no_division_by_zero():
    assert quadratic_kappa(np.tile([0.9, 0.1, 0.0], (5, 1)), np.zeros(5, np.int64)) == 0


def test_kappa_is_for_grades():
    assert "kappa" in measures(5, are_grades=True)
    assert "kappa" not in measures(5)
    assert "kappa" not in measures(2, are_grades=True)


def binary(score):
    return np.stack([-score, score], axis=1)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    # positives one standard deviation above negatives: AUROC = Phi(1 / sqrt(2))
    truth, hits = 0.7602, 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        y = np.repeat([0, 1], 60)
        ((low, high),) = bootstrap_intervals(binary(rng.normal(size=120) + y), y, None, 200, seed)
        hits += low <= truth <= high
    assert 86 <= hits <= 100


def test_interval_over_patients_is_wider_when_their_images_agree():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(60) % 2, 4)
    scores = binary(np.repeat(rng.normal(size=60), 4) + y)
    ((low, high),) = bootstrap_intervals(scores, y, None, 400, 0)
    ((low_by_patient, high_by_patient),) = bootstrap_intervals(scores, y, np.repeat(np.arange(60), 4), 400, 0)
    assert (high_by_patient - low_by_patient) > 1.5 * (high - low)


def test_interval_redraws_what_lacks_a_class():
    y = np.array([0] * 11 + [1])
    assert bootstrap_intervals(binary(np.arange(12.0)), y, None, 50, 0).tolist() == [[1.0, 1.0]]


def test_resamples_keep_units_whole():
    units, y = np.array([7, 7, 3, 3, 3, 9]), np.array([0, 1, 0, 1, 1, 0])
    for drawn in resamples(units, y, 20, 0):
        counts = np.bincount(drawn, minlength=6)
        assert counts[0] == counts[1]
        assert counts[2] == counts[3] == counts[4]
        assert set(y[drawn]) == {0, 1}


def drawn_again(units, y, num, seed):
    """What `resamples` gives where classes are not rare, by the definition."""
    rng = sample_rng(seed, 0, 0, "bootstrap")
    members = [np.flatnonzero(units == unit) for unit in np.unique(units)]
    while num:
        drawn = np.concatenate([members[unit] for unit in rng.integers(len(members), size=len(members))])
        if len(np.unique(y[drawn])) == len(np.unique(y)):
            num -= 1
            yield drawn


@pytest.mark.parametrize("seed", range(3))
def test_draws_are_those_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    units, y = rng.integers(0, 40, 90), np.append(rng.integers(0, 3, 88), [3, 4])
    for found, known in zip(resamples(units, y, 20, seed), drawn_again(units, y, 20, seed), strict=True):
        np.testing.assert_array_equal(found, known)


def test_many_rare_classes_are_drawn_at_once():
    y = np.repeat(np.arange(40), [30] * 10 + [1] * 30)  # one draw in 900,000 holds them all
    drawn = list(resamples(np.arange(len(y)), y, 50, 0))
    counts = np.array([np.bincount(y[rows], minlength=40) for rows in drawn])
    assert counts.min() == 1
    assert counts[:, :10].mean() == pytest.approx(30, abs=1)
    assert counts[:, 10:].mean() == pytest.approx(1 + np.exp(-1), abs=0.1)  # of max(1, Poisson)
    ((low, high),) = bootstrap_intervals(np.eye(40)[y], y, None, 20, 0)
    assert low == high == 1


def test_classes_that_come_together_are_not_taken_for_rare():
    units = np.concatenate([np.repeat([0, 1], 30), np.arange(2, 10)])  # two volumes hold all classes
    y = np.concatenate([np.tile(np.arange(30), 2), np.zeros(8, int)])
    for found, known in zip(resamples(units, y, 50, 0), drawn_again(units, y, 50, 0), strict=True):
        np.testing.assert_array_equal(found, known)
    # twelve volumes of five classes each, of which few draws hold all: a volume is added once for its five
    units = np.concatenate([np.repeat(np.arange(12), 5), np.arange(12, 112)])
    y = np.concatenate([np.arange(60), np.zeros(100, int)])
    counts = np.array([np.bincount(y[rows], minlength=60)[5:] for rows in resamples(units, y, 100, 0)])
    assert counts.min() == 1
    assert counts.mean() == pytest.approx(1 + np.exp(-1), abs=0.1)


def test_members_of_many_units_are_found_at_once():
    units = np.random.default_rng(0).permutation(np.repeat(np.arange(100_000), 2))
    found = members_of(units)  # minutes, unit by unit
    assert len(found) == 100_000
    np.testing.assert_array_equal(found[777], np.flatnonzero(units == 777))
