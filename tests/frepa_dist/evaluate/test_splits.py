"""Splits: no patient is ever on two sides, every class is on both, and shares are what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frepa_dist.evaluate.labelled import LabeledImages
from frepa_dist.evaluate.splits import cross_validation, draw_share, split_parts, stratified_folds
from shards.support.errors import DataError


def labeled(y, splits=None):
    return LabeledImages([], [str(k) for k in y], splits, None, 0)


def eyes(rng, num_patients, num_classes):
    """Classes of 1 to 3 images of each patient, and who they are; images of one may be of several classes."""
    sizes = rng.integers(1, 4, num_patients)
    groups = np.repeat(rng.permutation(num_patients), sizes)
    return rng.integers(0, num_classes, len(groups)), groups


def test_folds_are_stratified_and_keep_patients_together():
    y = np.repeat([0, 1, 2], [40, 20, 10])
    groups = np.arange(70) // 2
    folds = stratified_folds(y, groups, 5, seed=0)
    assert len(folds) == 5
    for train, test in folds:
        assert not set(groups[train]) & set(groups[test])
        assert set(y[train]) == set(y[test]) == {0, 1, 2}
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(70))
    assert stratified_folds(np.array([0, 0, 1]), None, 5, seed=0) == []


def test_a_split_that_is_made_is_stratified_seeded_and_by_patient():
    y = np.repeat([0, 1], [60, 20])
    made = split_parts(labeled(y), y, None, 0, "here")
    assert np.bincount(y[made]).tolist() == [15, 5]
    np.testing.assert_array_equal(made, split_parts(labeled(y), y, None, 0, "here"))
    assert (made != split_parts(labeled(y), y, None, 1, "here")).any()
    groups = np.arange(80) // 2
    by_patient = split_parts(labeled(y), y, groups, 0, "here")
    assert not set(groups[by_patient]) & set(groups[~by_patient])


def test_splits_that_cannot_be_used():
    y = np.array([0, 0, 0, 1])
    with pytest.raises(DataError, match=r"too few.*0 3, 1 1"):
        split_parts(labeled(y), y, None, 0, "here")
    y = np.array([0, 0, 0, 1, 1])
    with pytest.raises(DataError, match="too few"):
        split_parts(labeled(y, ["train", "train", "test", "train", "train"]), y, None, 0, "here")
    y = np.array([0, 0, 0, 1, 1, 1])
    splits = ["train", "train", "test"] * 2
    with pytest.raises(DataError, match="one part of the split: 6 to learn from, 0 to test on"):
        split_parts(labeled(y, ["train"] * 6), y, None, 0, "here")
    with pytest.raises(DataError, match=r"one patient or volume.*on both sides"):
        split_parts(labeled(y, splits), y, np.array([0, 1, 1, 2, 3, 4]), 0, "here")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(20, 60), st.integers(2, 4))
def test_no_patient_is_on_two_sides_of_anything(seed, num_patients, num_classes):
    y, groups = eyes(np.random.default_rng(seed), num_patients, num_classes)
    try:
        is_test = split_parts(labeled(y), y, groups, seed, "here")
        folds = cross_validation(y[~is_test], groups[~is_test], seed)
    except DataError:
        return  # too few of a class: refused, and that is no leak
    assert not set(groups[is_test]) & set(groups[~is_test])
    mine = groups[~is_test]
    for train, other in folds:
        assert not set(mine[train]) & set(mine[other])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.01, 0.05, 0.1, 0.5]), st.integers(0, 3))
def test_a_share_holds_whole_patients_and_enough_of_each_class(seed, share, draw):
    y, groups = eyes(np.random.default_rng(seed), 120, 3)
    rows = draw_share(y, groups, share, draw, seed)
    assert len(set(rows)) == len(rows)
    assert not set(groups[rows]) & set(np.delete(groups, rows))
    np.testing.assert_array_equal(rows, draw_share(y, groups, share, draw, seed))
    for k in range(3):
        mine = rows[y[rows] == k]
        assert len(mine) >= max(2, round(share * (y == k).sum()))
        assert len(set(groups[mine])) >= 2


def test_a_share_of_independent_images_is_exact_and_all_is_all():
    y = np.repeat([0, 1], [300, 100])
    assert np.bincount(y[draw_share(y, None, 0.1, 0, 0)]).tolist() == [30, 10]
    assert np.bincount(y[draw_share(y, None, 0.001, 0, 0)]).tolist() == [2, 2]
    assert (draw_share(y, None, 0.1, 0, 0) != draw_share(y, None, 0.1, 1, 0)).any()
    np.testing.assert_array_equal(draw_share(y, None, 1.0, 0, 0), np.arange(400))
    small, large = (set(draw_share(y, None, share, 2, 0)) for share in (0.05, 0.1))
    assert small < large
