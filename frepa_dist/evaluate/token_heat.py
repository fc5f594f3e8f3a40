"""A linear probe of whole images, read token by token: what the tokens themselves hold, and where.

Logistic regression learns from the mean token of each image. It is linear, so the mean of its logits over
the tokens is the logit of the image, and each token's share of it is heat (class activation maps, Zhou et al.
2016). No mask is learned from.

Shapes: n images, T tiles, S side of a tile, D width, h = w = S / stride.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from frepa_dist.evaluate.classifiers import LinearProbe, choose_c, fit
from frepa_dist.evaluate.dense import DenseTraining, encode_maps, predict_image
from frepa_dist.evaluate.encoder import Encoder
from frepa_dist.evaluate.lesions import label_lesions
from frepa_dist.evaluate.pairs import MaskedImage, load_image, load_truth
from frepa_dist.evaluate.scores import Bool, Float64, Int64
from frepa_dist.evaluate.tiles import cut_tiles, tile_corners
from shards.formats.common import Pixels
from shards.support.errors import DataError
from shards.support.progress import track


def embed_image(encoder: Encoder, image: Pixels) -> npt.NDArray[np.float32]:
    """Mean token (D,) over all tiles of an image (3, H, W)."""
    corners = tile_corners(image.shape[1], image.shape[2], encoder.image_size)
    maps = encode_maps(encoder, torch.from_numpy(cut_tiles(image, corners, encoder.image_size)))
    return np.asarray(maps.mean(dim=(0, 2, 3)).numpy(), np.float32)


def embed_pairs(
    encoder: Encoder, pairs: Sequence[MaskedImage], training: DenseTraining, min_area: int
) -> tuple[npt.NDArray[np.float32], Bool]:
    """Mean tokens (n, D), and whether there is a lesion of so many pixels in each image, (n,)."""
    shown = track(pairs, total=len(pairs), description="encode", unit="image")
    features = np.stack([embed_image(encoder, load_image(pair.image, training.short_side)) for pair in shown])
    lesions = [label_lesions(np.logical_and(*load_truth(pair)), min_area) for pair in pairs]
    return features, np.array([bool(labels.any()) for labels in lesions])


def fit_token_probe(
    encoder: Encoder,
    pairs: Sequence[MaskedImage],
    training: DenseTraining,
    min_area: int = 1,
    groups: Sequence[int] | None = None,
) -> LinearProbe:
    """Learn which images hold something, the penalty chosen by cross-validation.

    Args:
        encoder: the frozen encoder.
        pairs: training images.
        training: their size, and the seed.
        min_area: least pixels of a lesion.
        groups: patient of each image, who stays in one fold; None where they are not known.

    Raises:
        DataError: all images hold something, or none does, or too few of either.
    """
    features, is_there = embed_pairs(encoder, pairs, training, min_area)
    if is_there.all() or not is_there.any():
        raise DataError(
            f"{int(is_there.sum())} of {len(is_there)} training images have a lesion: a probe of images has "
            "nothing to tell apart",
            allowed="images with lesions and images without",
            fix="list images without a mask too, or let a decoder learn from the masks",
        )
    y: Int64 = is_there.astype(np.int64)
    c, _ = choose_c(features, y, None if groups is None else np.array(groups), training.seed)
    return fit(features, y, c)


def image_logits(probe: LinearProbe, features: npt.NDArray[np.float32]) -> Float64:
    """Logits (n,) of mean tokens (n, D)."""
    logits: Float64 = probe.scores(features)[:, 1]
    return logits


def predict_heat(encoder: Encoder, probe: LinearProbe, image: Pixels) -> npt.NDArray[np.float32]:
    """Logits (H, W) of an image (3, H, W), bilinear between the middles of tokens."""

    def decode(maps: Tensor, tiles: Tensor) -> Tensor:
        num, _, height, width = maps.shape
        tokens = maps.permute(0, 2, 3, 1).flatten(0, 2).cpu().numpy()
        logits = torch.from_numpy(image_logits(probe, tokens)).float().reshape(num, 1, height, width)
        size = (tiles.shape[-2], tiles.shape[-1])
        return functional.interpolate(logits, size, mode="bilinear", align_corners=False)

    heat: npt.NDArray[np.float32] = predict_image(encoder, decode, image)[0]
    return heat
