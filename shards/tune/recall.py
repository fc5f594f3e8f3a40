"""How much of what matters the kept tokens hold: recall of mask pixels over the best possible.

Shapes: H, W image height and width in pixels; N patches, row-major; n images; K shares kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from shards.formats.common import Pixels
from shards.hf.tokens import HFParams, field_of_view, hf_response, hf_scores, rank_tokens
from shards.tune.masked import MaskedImage

Float64 = npt.NDArray[np.float64]
Respond = Callable[[Pixels], npt.NDArray[np.floating[Any]]]
"""From an image to a response (H, W), exactly 0 outside the field of view."""

DEFAULT, BEST, GRADIENT, RANDOM, IDEAL = "default", "best", "gradient", "random", "best possible"
KEPT_SHARES = tuple(percent / 100 for percent in range(5, 65, 5))


def recall(scores: npt.NDArray[np.floating[Any]], mask: npt.NDArray[np.floating[Any]], keep: float) -> float:
    """Mask pixels in the kept patches over those in the best choice of as many patches.

    Args:
        scores: (N,).
        mask: (N,) mask pixels of each patch, not all zero.
        keep: share of patches kept.
    """
    kept = rank_tokens(scores, keep)
    return float(mask[kept].sum() / np.sort(mask)[mask.size - kept.size :].sum())


def respond_by(params: HFParams) -> Respond:
    """The response whose patch means are the HF scores."""
    return lambda pixels: hf_response(pixels, params)


def respond_by_gradient(params: HFParams) -> Respond:
    """Plain gradient magnitude inside the field of view: what a better definition has to beat."""

    def respond(pixels: Pixels) -> npt.NDArray[np.floating[Any]]:
        channel = pixels
        if pixels.ndim == 3:
            is_green = params.channel == "green"
            channel = (
                np.ascontiguousarray(pixels[:, :, 1])
                if is_green
                else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
            )
        across, down = cv2.Sobel(channel, cv2.CV_32F, 1, 0), cv2.Sobel(channel, cv2.CV_32F, 0, 1)
        return np.asarray(np.hypot(across, down) * field_of_view(pixels, params), np.float32)

    return respond


def measure(images: Sequence[MaskedImage], respond: Respond, patch_size: int, keep: float) -> Float64:
    """Recall on each image and on its two worse copies, (n, 3)."""
    return np.array(
        [
            [
                recall(hf_scores(respond(pixels), patch_size), image.mask, keep)
                for pixels in (image.pixels, *image.worse)
            ]
            for image in images
        ]
    )


def measure_random(images: Sequence[MaskedImage], params: HFParams, patch_size: int, keep: float) -> Float64:
    """Expected recall of patches drawn inside the field of view, (n, 3): thrice the same."""
    values = []
    for image in images:
        num = round(keep * image.mask.size)
        best = float(np.sort(image.mask)[image.mask.size - num :].sum())
        values.append([_expected(image, params, patch_size, num) / best] * 3)
    return np.array(values)


def random_curve(
    images: Sequence[MaskedImage], params: HFParams, patch_size: int, shares: Sequence[float]
) -> Float64:
    """As `recall_curve`, expected of patches drawn inside the field of view, (K,)."""
    curves = [
        [_expected(image, params, patch_size, round(share * image.mask.size)) for share in shares]
        / image.mask.sum()
        for image in images
    ]
    return np.asarray(np.mean(curves, axis=0))


def _expected(image: MaskedImage, params: HFParams, patch_size: int, num: int) -> float:
    """Mask pixels that `num` patches drawn inside the field of view hold on average."""
    view = field_of_view(image.pixels, params).astype(np.float32)
    inside = hf_scores(view, patch_size) > 0
    return float(image.mask[inside].sum() * min(1.0, num / max(1, int(inside.sum()))))


def recall_curve(
    images: Sequence[MaskedImage], respond: Respond | None, patch_size: int, shares: Sequence[float]
) -> Float64:
    """Mean share of all mask pixels that lie in kept patches, for each share kept, (K,).

    Args:
        images: n of them.
        respond: None for the best possible choice of patches.
        patch_size: in pixels.
        shares: of patches kept.
    """
    curves = []
    for image in images:
        scores = image.mask if respond is None else hf_scores(respond(image.pixels), patch_size)
        held = np.cumsum(image.mask[rank_tokens(scores, 1.0)]) / image.mask.sum()
        curves.append([held[max(1, round(share * held.size)) - 1] for share in shares])
    return np.asarray(np.mean(curves, axis=0))


def objective(recalls: Float64, groups: Sequence[str], worse_weight: float) -> float:
    """What a search maximizes: the mean over groups of their mean recall, worse copies by their weight.

    Args:
        recalls: (n, 3).
        groups: n names.
        worse_weight: in [0, 1).
    """
    each = (1 - worse_weight) * recalls[:, 0] + worse_weight * recalls[:, 1:].mean(axis=1)
    names = np.asarray(groups)
    return float(np.mean([each[names == name].mean() for name in dict.fromkeys(groups)]))
