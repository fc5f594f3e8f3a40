"""Classifiers of features: against other implementations, and that they cannot tell what is not there."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from frepa_dist.evaluate import classifiers
from frepa_dist.evaluate.classifiers import (
    LinearTraining,
    allowed_k,
    choose_c,
    choose_k,
    fit,
    fit_classifier,
    fit_linear,
    fit_neighbors,
)
from frepa_dist.evaluate.labelled import LabeledImages
from frepa_dist.evaluate.scores import macro_auroc
from frepa_dist.evaluate.splits import split_parts
from shards.support.errors import DataError

QUICK = LinearTraining(epochs=20, batch_size=64, learning_rate=1e-2)


def blobs(num_per_class, num_classes=2, width=8, distance=2.0, seed=0):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(num_classes), num_per_class)
    x = rng.normal(size=(len(y), width))
    x[np.arange(len(y)), y] += distance
    return x, y


def test_macro_auroc_equals_scikit_learn_and_of_two_classes_the_plain_one():
    x, y = blobs(30, num_classes=4)
    scores = fit(x, y, 0.1).scores(x)
    assert macro_auroc(scores, y) == pytest.approx(roc_auc_score(y, scores, multi_class="ovr"))
    x, y = blobs(30)
    scores = fit(x, y, 0.1).scores(x)
    assert macro_auroc(scores, y) == pytest.approx(roc_auc_score(y, scores[:, 1]))


def test_no_warning_reaches_the_user(monkeypatch):
    monkeypatch.setattr(classifiers, "MAX_ITERATIONS", 1)
    x, y = blobs(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_c(x, y, None, 0)


def test_penalty_is_chosen_by_the_training_part_and_noise_wants_a_strong_one():
    x, y = blobs(40, width=200, distance=1.5)
    c, inner = choose_c(x, y, None, 0)
    assert c < 1
    assert 0.6 < inner < 1


def test_neighbors_vote_as_in_the_definition():
    x, y = blobs(20, num_classes=3, distance=1.0)
    asked = np.random.default_rng(5).normal(size=(7, 8))
    unit, other = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (asked, x))
    for row, cosines in zip(fit_neighbors(x, y, 9)(asked), unit @ other.T, strict=True):
        votes = np.zeros(3)
        for place in sorted(range(len(y)), key=lambda i: -cosines[i])[:9]:
            votes[y[place]] += np.exp(cosines[place] / 0.07)
        np.testing.assert_allclose(row, votes / votes.sum(), atol=1e-9)


def test_neighbors_do_not_overflow_and_are_as_many_as_help():
    x, y = blobs(60, distance=0.7)
    scores = fit_neighbors(1e6 * x, y, 5)(-1e6 * x)
    assert np.isfinite(scores).all()
    k, inner, _ = choose_k(x, y, None, 0)
    assert k >= 5  # single neighbors are noise where classes overlap
    assert 0.5 < inner < 1
    assert allowed_k(20) == (1, 2, 5, 10)
    with pytest.raises(DataError, match="too few"):
        choose_k(x[:61], y[:61], None, 0)


def test_an_edge_is_one_of_what_was_tried():
    """A hundred images would allow 50 neighbors, folds of 80 only 20."""
    x, y = blobs(50, width=4, distance=1.0)
    fitted = fit_classifier("knn", x, y, None, 0, silent=True)
    assert (fitted.chosen, fitted.at_edge) == ({"k": 20}, True)
    x, y = blobs(50, distance=0.7)
    assert choose_k(x, y, None, 1, silent=True)[::2] == (10, False)


def test_the_linear_layer_finds_what_logistic_regression_finds():
    x, y = blobs(200, num_classes=3, distance=1.5)
    held, held_y = blobs(200, num_classes=3, distance=1.5, seed=1)
    shifted = 100 + 7 * x  # standardized, this is nothing
    linear = fit_linear(shifted, y, QUICK)(100 + 7 * held)
    logistic = fit(x, y, 1.0).scores(held)
    assert macro_auroc(linear, held_y) == pytest.approx(macro_auroc(logistic, held_y), abs=0.01)
    assert np.mean(linear.argmax(axis=1) == logistic.argmax(axis=1)) > 0.95
    np.testing.assert_array_equal(fit_linear(shifted, y, QUICK)(100 + 7 * held), linear)


@pytest.mark.parametrize("kind", ["logistic", "linear", "knn"])
def test_labels_without_a_meaning_are_not_told(kind):
    """Two eyes of a patient look the same here, so that any patient on two sides would be told at once."""
    found = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = np.repeat(rng.normal(size=(60, 12)), 2, axis=0) + 1e-3 * rng.normal(size=(120, 12))
        y, groups = np.repeat(rng.permutation(np.arange(60) % 2), 2), np.repeat(np.arange(60), 2)
        labeled = LabeledImages([], [str(k) for k in y], None, None, 0)
        is_test = split_parts(labeled, y, groups, seed, "here")
        part = ~is_test
        fitted = fit_classifier(kind, x[part], y[part], groups[part], seed, QUICK, silent=True)
        found.append(macro_auroc(fitted.scores(x[is_test]), y[is_test]))
        if fitted.inner_auroc is not None:
            assert fitted.inner_auroc < 0.85  # the best of a few that are all about one half
    assert np.mean(found) == pytest.approx(0.5, abs=0.15)
