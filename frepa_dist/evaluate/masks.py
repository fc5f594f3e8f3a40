"""How well a predicted mask fits the true one: overlap, centerlines, pixels.

Shapes: H, W of an image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from frepa_dist.evaluate.scores import Bool, Float64, auroc

Mask = npt.NDArray[np.bool_]


def dice(found: Mask, truth: Mask) -> float:
    """Twice the overlap over both areas (Dice 1945); 1 where both are empty."""
    total = int(found.sum()) + int(truth.sum())
    return 2 * int((found & truth).sum()) / total if total else 1.0


def iou(found: Mask, truth: Mask) -> float:
    """The overlap over the union (Jaccard 1901); 1 where both are empty."""
    union = int((found | truth).sum())
    return int((found & truth).sum()) / union if union else 1.0


def centerline_dice(found: Mask, truth: Mask) -> float:
    """Overlap of each mask with the other's centerline, clDice (Shit et al. 2021, arXiv 2003.07311).

    It counts how much of the vessels' length is there, thin ones as much as thick ones. 1 where both are
    empty.
    """
    from skimage.morphology import skeletonize

    if not found.any() and not truth.any():
        return 1.0
    lines_found, lines_truth = skeletonize(found), skeletonize(truth)
    precision = (lines_found & truth).sum() / max(int(lines_found.sum()), 1)
    sensitivity = (lines_truth & found).sum() / max(int(lines_truth.sum()), 1)
    both = precision + sensitivity
    return float(2 * precision * sensitivity / both) if both else 0.0


def mask_measures(
    scores: npt.NDArray[np.floating[Any]], truth: Mask, where: Mask, *, threshold: float = 0.5
) -> dict[str, float]:
    """All measures of one image.

    Args:
        scores: (H, W), the probability of the mask.
        truth: (H, W).
        where: (H, W), the pixels that count: the field of view.
        threshold: least score of what is found.

    Returns:
        dice, iou, cldice, sensitivity, specificity, accuracy and auroc; sensitivity, specificity or the AUROC
        is NaN where no pixel can tell it.
    """
    found, truth = (scores >= threshold) & where, truth & where
    hits, actual, inside = int((found & truth).sum()), int(truth.sum()), int(where.sum())
    empty = inside - actual
    rejected = empty - (int(found.sum()) - hits)
    values: Float64 = scores[where].astype(np.float64)
    positive: Bool = truth[where]
    return {
        "dice": dice(found, truth),
        "iou": iou(found, truth),
        "cldice": centerline_dice(found, truth),
        "sensitivity": hits / actual if actual else float("nan"),
        "specificity": rejected / empty if empty else float("nan"),
        "accuracy": (hits + rejected) / inside if inside else float("nan"),
        "auroc": auroc(values, positive) if actual and empty else float("nan"),
    }
