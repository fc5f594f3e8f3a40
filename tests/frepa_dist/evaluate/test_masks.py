"""Measures of masks: hand-made cases, and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics

from frepa_dist.evaluate.masks import centerline_dice, dice, iou, mask_measures
from frepa_dist.evaluate.pairs import load_image, load_mask, read_masked


def test_against_scikit_learn_inside_the_field_of_view():
    rng = np.random.default_rng(0)
    scores, truth, where = rng.random((40, 50)), rng.random((40, 50)) < 0.3, rng.random((40, 50)) < 0.7
    found = mask_measures(scores, truth, where)
    y, predicted = truth[where], scores[where] >= 0.5
    assert found["dice"] == pytest.approx(metrics.f1_score(y, predicted))
    assert found["iou"] == pytest.approx(metrics.jaccard_score(y, predicted))
    assert found["sensitivity"] == pytest.approx(metrics.recall_score(y, predicted))
    assert found["specificity"] == pytest.approx(metrics.recall_score(~y, ~predicted))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(y, predicted))
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(y, scores[where]))


def test_what_lies_outside_does_not_count():
    truth, where = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    truth[:, :2], where[:, :4] = True, True
    scores = truth.astype(float)
    scores[:, 6:] = 1.0
    assert mask_measures(scores, truth, where)["dice"] == 1
    assert mask_measures(scores, truth, np.ones_like(where))["dice"] == pytest.approx(2 / 3)


def test_empty_masks():
    nothing, something = np.zeros((4, 4), bool), np.eye(4, dtype=bool)
    assert (dice(nothing, nothing), iou(nothing, nothing), centerline_dice(nothing, nothing)) == (1, 1, 1)
    assert (dice(nothing, something), iou(nothing, something), centerline_dice(nothing, something)) == (
        0,
        0,
        0,
    )
    found = mask_measures(np.zeros((4, 4)), nothing, np.ones((4, 4), bool))
    assert math.isnan(found["sensitivity"])
    assert math.isnan(found["auroc"])
    assert found["specificity"] == 1


def vessels(thick, thin):
    """A thick and a thin vertical vessel, 60 pixels long, either there or not."""
    mask = np.zeros((80, 60), bool)
    if thick:
        mask[10:70, 10:21] = True
    if thin:
        mask[10:70, 40] = True
    return mask


def test_centerlines_count_thin_vessels_as_thick_ones():
    truth, found = vessels(True, True), vessels(True, False)
    assert dice(found, truth) > 0.95
    # of two lines nearly as long, one is found
    assert centerline_dice(found, truth) == pytest.approx(2 * 0.5 / 1.5, abs=0.05)
    assert centerline_dice(truth, truth) == 1
    wider = vessels(True, True)
    wider[10:70, 8:23] = True
    assert centerline_dice(wider, truth) > 0.99 > dice(wider, truth)


@pytest.mark.real_data
def test_the_second_observer_of_drive_is_as_good_as_published(real_data):
    # accuracy .9473 in the field of view: Staal et al., IEEE TMI 2004, "human observer"
    folder = real_data / "fundus" / "drive"
    rows = []
    for pair in read_masked(folder, folder / "labels.csv"):
        if pair.is_test:
            shape = load_image(pair.image, None).shape[1:]
            truth, where = load_mask(pair.mask, shape), load_mask(pair.where, shape)
            rows.append(mask_measures(load_mask(pair.second, shape).astype(float), truth, where))
    assert len(rows) == 20
    assert np.mean([row["accuracy"] for row in rows]) == pytest.approx(0.9473, abs=5e-4)
