"""FROC and outlines: hand-made maps and masks, and a brute-force search over all thresholds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frepa_dist.evaluate.lesions import (
    RATES,
    Candidates,
    find_candidates,
    froc_by_image,
    froc_recalls,
    froc_thresholds,
    label_lesions,
    match_candidates,
    match_outlines,
    outline_measures,
)


def candidates(false, lesions):
    return Candidates(np.array(false, float), np.array(lesions, float))


HAND_MADE = [candidates([0.5], [0.9, 0.4, -np.inf]), candidates([0.8, 0.3], [])]


def test_recalls_of_a_hand_made_case():
    # two images: no false positive is allowed at 1/8 and 1/4, one at 1/2, two at 1, all three from 2 on
    expected = [1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3]
    np.testing.assert_allclose(froc_recalls(HAND_MADE), expected)
    np.testing.assert_allclose(froc_thresholds(HAND_MADE), [0.8, 0.8, 0.5, 0.3, *[-np.inf] * 3])
    of_first, of_second = froc_by_image(HAND_MADE)
    assert of_first == pytest.approx(np.mean(expected))
    assert np.isnan(of_second)


def test_equal_scores_stand_or_fall_together():
    tied = [candidates([0.5, 0.5], [0.5])]
    np.testing.assert_allclose(froc_recalls(tied, (1.0, 2.0)), [0, 1])


def brute_force(images, rate):
    """Best recall of all thresholds whose false positives are few enough."""
    scores = np.concatenate([np.concatenate([i.false_scores, i.lesion_scores]) for i in images])
    best = 0.0
    lesions = np.concatenate([i.lesion_scores for i in images])
    for threshold in scores[np.isfinite(scores)]:
        false = sum(int((i.false_scores >= threshold).sum()) for i in images)
        if false <= rate * len(images) + 1e-9:
            best = max(best, float(np.mean(lesions >= threshold)))
    return best


scores = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), max_size=6)


@given(st.lists(st.tuples(scores, scores), min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_recalls_equal_a_search_over_all_thresholds(parts):
    images = [candidates(*part) for part in [*parts, ([], [0.35, -np.inf])]]
    np.testing.assert_allclose(froc_recalls(images), [brute_force(images, rate) for rate in RATES])
    # image by image, weighted by their lesions, it is the same number
    by_image = [value for value in froc_by_image(images) if not np.isnan(value)]
    weights = [len(image.lesion_scores) for image in images if len(image.lesion_scores)]
    assert np.average(by_image, weights=weights) == pytest.approx(froc_recalls(images).mean())


def test_without_lesions_there_is_no_recall():
    assert np.isnan(froc_recalls([candidates([0.1], [])])).all()


def heat_map():
    heat = np.zeros((20, 20))
    heat[3, 4], heat[10, 12], heat[10, 14], heat[18, 18] = 5, 7, 6, 4
    return heat


def test_candidates_are_the_hills_that_lie_apart():
    everywhere = np.ones((20, 20), bool)
    places, values = find_candidates(heat_map(), everywhere, min_distance=3)
    assert places.tolist() == [[10, 12], [3, 4], [18, 18]]
    assert values.tolist() == [7, 5, 4]
    places, _ = find_candidates(heat_map(), everywhere, min_distance=1)
    assert places.tolist() == [[10, 12], [10, 14], [3, 4], [18, 18]]


def test_a_plateau_is_one_candidate_in_its_middle():
    heat = np.zeros((60, 60), np.float32)
    heat[10:41, 20:51] = 1
    heat[25, 25:30] = 0.5  # its middle is beside this dent
    heat[50:, :9] = heat[50:, 15] = 0.7  # of two equal ones nearer than the distance, the first
    places, scores = find_candidates(heat, np.ones((60, 60), bool), min_distance=11)
    assert places.tolist() == [[25, 35], [54, 4]]
    np.testing.assert_allclose(scores, [1, 0.7])


@given(st.integers(0, 10**6), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_candidates_of_a_map_without_ties_are_those_of_scikit_image(seed, distance):
    from skimage.feature import peak_local_max

    heat = np.random.default_rng(seed).permutation(400).reshape(20, 20).astype(float)
    places, scores = find_candidates(heat, np.ones((20, 20), bool), min_distance=distance)
    expected = peak_local_max(heat, min_distance=distance, threshold_abs=0, exclude_border=False)
    assert places.tolist() == expected.tolist()
    assert scores.tolist() == heat[tuple(expected.T)].tolist()


def test_a_large_lesion_does_not_take_the_room_of_others():
    lesions = np.zeros((200, 200), np.int32)
    lesions[:100], lesions[150:160, 150:160] = 1, 2
    places = np.array([[row, column] for row in range(0, 100, 10) for column in range(0, 200, 20)])
    places = np.concatenate([places, [[120, 5], [155, 155], [170, 5], [180, 5]]])
    found = match_candidates(places, np.linspace(1, 0.5, len(places)), lesions, most_false=2)
    assert np.isfinite(found.lesion_scores).all()
    assert len(found.false_scores) == 2


def test_what_is_ignored_is_neither_found_nor_false():
    lesions, ignored = np.zeros((20, 20), np.int32), np.zeros((20, 20), bool)
    lesions[0:4, 0:4] = 1
    ignored[10:12, 10:12] = True
    places, scores = np.array([[1, 1], [10, 10], [15, 15]]), np.array([3.0, 2.0, 1.0])
    found = match_candidates(places, scores, lesions, ignored=ignored)
    assert (found.lesion_scores.tolist(), found.false_scores.tolist()) == ([3], [1])
    # a tolerance holds for what is ignored too, and a real lesion comes first
    near = match_candidates(np.add(places, [[0, 0], [2, 0], [0, 0]]), scores, lesions, 1, ignored=ignored)
    assert (near.lesion_scores.tolist(), near.false_scores.tolist()) == ([3], [1])
    ignored[4, 0:4] = True
    near = match_candidates(np.array([[4, 2]]), np.array([5.0]), lesions, 1, ignored=ignored)
    assert (near.lesion_scores.tolist(), near.false_scores.tolist()) == ([5], [])
    ignored[4, 0:4] = False
    outlines = ignored.copy()
    outlines[0:4, 0:4] = outlines[9, 10] = outlines[18, 0:3] = True
    measures = outline_measures(outlines, lesions, ignored=ignored)
    assert measures == {"lesion_iou": 1, "lesion_recall": 1, "lesion_precision": 0.5}


def test_a_pair_that_fits_is_kept_where_another_pairing_overlaps_more():
    lesions, found = np.zeros((1, 220), np.int32), np.zeros((1, 220), np.int32)
    lesions[0, 100:200], lesions[0, 68:98] = 1, 2
    found[0, 68:168], found[0, 170:200] = 1, 2
    overlaps, _ = match_outlines(found, lesions)
    np.testing.assert_allclose(overlaps, [68 / 132, 0])
    np.testing.assert_allclose(match_outlines(found, lesions, least_iou=1)[0], [0.3, 0.3])


def test_candidates_lie_where_pixels_count():
    where = np.ones((20, 20), bool)
    where[:, 12] = False
    places, _ = find_candidates(heat_map(), where, min_distance=3)
    assert places.tolist() == [[10, 14], [3, 4], [18, 18]]
    assert len(find_candidates(np.ones((20, 20)), where, min_distance=3)[0]) == 0
    assert len(find_candidates(heat_map(), np.zeros((20, 20), bool), min_distance=3)[0]) == 0


def test_candidates_hit_the_lesion_they_lie_in():
    lesions = np.zeros((20, 20), np.int32)
    lesions[9:12, 11:15] = 1  # two candidates: the higher one is its score
    lesions[0:2, 0:2] = 2  # none
    places, values = find_candidates(heat_map(), np.ones((20, 20), bool), min_distance=1)
    found = match_candidates(places, values, lesions)
    assert found.lesion_scores.tolist() == [7, -np.inf]
    assert sorted(found.false_scores) == [4, 5]
    near = match_candidates(places, values, lesions, tolerance=4)  # (3, 4) is sqrt(4 + 9) from (1, 1)
    assert near.lesion_scores.tolist() == [7, 5]
    assert near.false_scores.tolist() == [4]


def test_lesions_touch_by_their_corners_and_small_ones_are_left_out():
    mask = np.zeros((8, 8), bool)
    mask[0, 0] = mask[1, 1] = mask[2, 2] = True
    mask[5, 5] = True
    mask[7, 0:4] = True
    assert label_lesions(mask).max() == 3
    labels = label_lesions(mask, min_area=2)
    assert labels.max() == 2
    assert labels[5, 5] == 0
    assert labels[0, 0] == labels[2, 2] != labels[7, 0]
    assert sorted(set(labels.ravel().tolist())) == [0, 1, 2]


def test_outlines_are_paired_one_to_one():
    lesions, found = np.zeros((10, 10), np.int32), np.zeros((10, 10), bool)
    lesions[0:2, 0:4], lesions[0:2, 5:9] = 1, 2
    lesions[8, 8] = 3
    found[0:2, 0:8] = True  # one component over both: IoU 8 / 16 with the first, 6 / 18 with the second
    found[5, 0:3] = True  # on nothing
    overlaps, num_found = match_outlines(label_lesions(found), lesions)
    assert overlaps.tolist() == [0.5, 0, 0]
    assert num_found == 2
    measures = outline_measures(found, lesions)
    assert measures == pytest.approx({"lesion_iou": 0.5 / 3, "lesion_recall": 1 / 3, "lesion_precision": 0.5})
    nothing = outline_measures(np.zeros((10, 10), bool), np.zeros((10, 10), np.int32))
    assert all(np.isnan(value) for value in nothing.values())


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_pairs_have_the_largest_sum_of_all_pairings(seed):
    rng = np.random.default_rng(seed)
    lesions, found = (rng.integers(0, 4, (6, 6)) * (rng.random((6, 6)) < 0.7) for _ in range(2))
    lesions, found = (np.unique(x, return_inverse=True)[1].reshape(6, 6) for x in (lesions, found))
    num = max(lesions.max(), found.max())
    table = np.array(
        [
            [
                ((lesions == a) & (found == b)).sum() / max(((lesions == a) | (found == b)).sum(), 1)
                for b in range(1, num + 1)
            ]
            for a in range(1, num + 1)
        ]
    ).reshape(num, num)
    best = max(sum(table[a, b] for a, b in enumerate(order)) for order in itertools.permutations(range(num)))
    overlaps, _ = match_outlines(found.astype(np.int32), lesions.astype(np.int32), least_iou=2)
    assert overlaps.sum() == pytest.approx(best)
