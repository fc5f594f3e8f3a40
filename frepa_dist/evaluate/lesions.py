"""Lesion by lesion: what of them is found at how many false alarms (FROC), and how well their outlines fit.

A lesion is a connected component of the mask (8 neighbors). A candidate is a local maximum of a heat map,
with the heat there as its score. It hits the lesion that it lies in; several hits of one lesion count once,
and a candidate in no lesion is a false positive (the rules of CAMELYON16, Ehteshami Bejnordi et al. 2017).

Shapes: H, W of an image, L its lesions, n its candidates, R rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from scipy.ndimage import distance_transform_edt, maximum_filter
from scipy.optimize import linear_sum_assignment
from scipy.spatial import KDTree

from frepa_dist.evaluate.masks import Mask
from frepa_dist.evaluate.scores import Float64, Int64

RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)  # false positives per image, as of LUNA16
Labels = npt.NDArray[np.int32]


class Candidates(NamedTuple):
    """What a heat map offers in one image.

    Attributes:
        false_scores: (n,) of candidates in no lesion.
        lesion_scores: (L,) the highest of the candidates in each lesion; -inf where there is none.
    """

    false_scores: Float64
    lesion_scores: Float64


def label_lesions(mask: Mask, min_area: int = 1) -> Labels:
    """Number the lesions of a mask (H, W) from 1, 0 elsewhere; those of fewer pixels have no number."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    stays = stats[:, cv2.CC_STAT_AREA] >= min_area
    stays[0] = False
    numbers = np.where(stays, np.cumsum(stays), 0)
    return np.asarray(numbers[labels], np.int32)


def find_candidates(
    heat: npt.NDArray[np.floating[Any]], where: Mask, *, min_distance: int
) -> tuple[Int64, Float64]:
    """Local maxima of a heat map: places where nothing within the distance is hotter.

    A plateau, such as a part of the image that is all black, is one candidate, in its middle.

    Args:
        heat: (H, W).
        where: (H, W), the pixels that count; there are no candidates elsewhere.
        min_distance: least distance of two candidates along an axis, in pixels.

    Returns:
        Places (n, 2) and scores (n,), highest first. A map without any hill has none.
    """
    inside = heat[where]
    if inside.size == 0 or inside.max() == inside.min():
        return np.empty((0, 2), np.int64), np.empty(0)
    lowest = inside.min()
    values = np.where(where, heat, lowest)
    highest_near = maximum_filter(values, size=2 * min_distance + 1, mode="nearest")
    places = _middles((values == highest_near) & (values > lowest))
    places = places[np.argsort(-values[tuple(places.T)], kind="stable")]
    stays = np.ones(len(places), bool)
    # only equally hot ones can be as near as that
    for first, second in sorted(KDTree(places).query_pairs(min_distance, p=np.inf)):
        stays[second] &= ~stays[first]
    places = places[stays]
    return places, values[tuple(places.T)].astype(np.float64)


def _middles(peaks: Mask) -> Int64:
    """Of each connected part of a mask (H, W) the pixel next to its center, (n, 2)."""
    _, labels, _, centers = cv2.connectedComponentsWithStats(peaks.astype(np.uint8), connectivity=8)
    pixels = np.argwhere(peaks)
    numbers = labels[peaks] - 1
    far = np.square(pixels - centers[1:, ::-1][numbers]).sum(axis=1)
    order = np.lexsort((far, numbers))
    return pixels[order[np.flatnonzero(np.diff(numbers[order], prepend=-1))]].astype(np.int64)


def match_candidates(
    places: Int64,
    scores: Float64,
    lesions: Labels,
    tolerance: float = 0.0,
    *,
    ignored: Mask | None = None,
    most_false: int | None = None,
) -> Candidates:
    """Find out which candidates hit which lesions.

    Args:
        places: (n, 2).
        scores: (n,), highest first.
        lesions: (H, W), see `label_lesions`.
        tolerance: pixels that a candidate may lie outside of a lesion.
        ignored: (H, W), where, and so near to which, candidates that hit no lesion are not counted.
        most_false: how many candidates in no lesion are kept, the highest ones; None keeps all.
    """
    rows, columns = places.T
    num = int(lesions.max(initial=0))
    is_false, best = np.ones(len(places), bool), np.full(num + 1, -np.inf)
    if num:
        distance, nearest = distance_transform_edt(lesions == 0, return_indices=True)
        is_false = distance[rows, columns] > tolerance
        np.maximum.at(best, np.where(is_false, 0, lesions[tuple(nearest[:, rows, columns])]), scores)
    if ignored is not None and ignored.any():
        is_false &= distance_transform_edt(~ignored)[rows, columns] > tolerance
    return Candidates(scores[is_false][:most_false], best[1:])


def froc_thresholds(images: Sequence[Candidates], rates: Sequence[float] = RATES) -> Float64:
    """The score that candidates must exceed so that there are at most so many false positives an image, (R,).

    -inf where all candidates together are no more than that. Candidates of one score stand or fall together.
    """
    false = np.sort(np.concatenate([image.false_scores for image in images]))[::-1]
    allowed = [int(np.floor(rate * len(images) + 1e-9)) for rate in rates]
    return np.array([false[num] if num < len(false) else -np.inf for num in allowed])


def froc_recalls(images: Sequence[Candidates], rates: Sequence[float] = RATES) -> Float64:
    """Share of all lesions that are hit at so many false positives an image, (R,); NaN without any lesion."""
    scores = np.concatenate([image.lesion_scores for image in images])
    if scores.size == 0:
        return np.full(len(rates), np.nan)
    return np.array([float(np.mean(scores > least)) for least in froc_thresholds(images, rates)])


def froc_by_image(images: Sequence[Candidates], rates: Sequence[float] = RATES) -> list[float]:
    """Of each image the share of its lesions hit, at the thresholds of all, the mean over rates; else NaN."""
    thresholds = froc_thresholds(images, rates)
    return [
        float(np.mean([np.mean(image.lesion_scores > least) for least in thresholds]))
        if image.lesion_scores.size
        else float("nan")
        for image in images
    ]


def match_outlines(found: Labels, lesions: Labels, least_iou: float = 0.5) -> tuple[Float64, int]:
    """Pair what was found with lesions one to one.

    As many pairs as can be have at least that IoU; among these pairings, the IoUs add up to the most.

    Args:
        found: (H, W), numbered components of the prediction.
        lesions: (H, W).
        least_iou: overlap from which on an outline counts as found.

    Returns:
        IoU of each lesion with its partner, (L,), 0 where it has none, and the number of components found.
    """
    num_found, num_lesions = int(found.max(initial=0)), int(lesions.max(initial=0))
    pairs = np.zeros((num_lesions + 1, num_found + 1))
    np.add.at(pairs, (lesions.ravel(), found.ravel()), 1)
    both = pairs[1:, 1:]
    union = pairs[1:].sum(axis=1)[:, None] + pairs[:, 1:].sum(axis=0)[None, :] - both
    overlaps = both / np.maximum(union, 1)
    best = np.zeros(num_lesions)
    bonus = min(overlaps.shape) + 1  # more than all IoUs together
    rows, columns = linear_sum_assignment(overlaps + bonus * (overlaps >= least_iou), maximize=True)
    best[rows] = overlaps[rows, columns]
    return best, num_found


def outline_measures(
    found: Mask, lesions: Labels, *, least_iou: float = 0.5, ignored: Mask | None = None
) -> dict[str, float]:
    """How well the components of a prediction (H, W) fit the lesions of one image.

    Args:
        found: (H, W).
        lesions: (H, W), see `label_lesions`.
        least_iou: overlap from which on an outline counts as found.
        ignored: (H, W); a component that touches it and no lesion is not counted.

    Returns:
        lesion_iou: mean IoU of the lesions with their partners; lesion_recall and lesion_precision: shares of
        lesions and of components found that have a partner of at least that IoU. NaN where there are none.
    """
    components = label_lesions(found)
    if ignored is not None:
        passed_over = np.setdiff1d(components[ignored], components[lesions > 0])
        components = label_lesions(found & ~np.isin(components, passed_over[passed_over > 0]))
    overlaps, num_found = match_outlines(components, lesions, least_iou)
    hits = int((overlaps >= least_iou).sum())
    return {
        "lesion_iou": float(overlaps.mean()) if overlaps.size else float("nan"),
        "lesion_recall": hits / overlaps.size if overlaps.size else float("nan"),
        "lesion_precision": hits / num_found if num_found else float("nan"),
    }
