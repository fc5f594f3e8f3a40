"""Segmentation with a frozen encoder: a light decoder learns masks (of vessels, of lesions) from its maps.

Images keep their size, or are resized to a short side, and are cut into overlapping tiles of the size that
the encoder was made for; each tile is encoded once, and again mirrored. The decoder is the same for every
encoder: LayerNorm, 1x1 convolution, and doublings of the side until it is the tile's. It is judged on whole
images at their own size.

Shapes: H, W of an image, T tiles, S side of a tile, D width, h = w = S / stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from frepa_dist.evaluate.dense import (
    DenseTraining,
    choose_corners,
    encode_maps,
    predict_image,
    train_on_tiles,
    with_mirrored,
)
from frepa_dist.evaluate.encoder import Encoder
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.heads import seeded
from frepa_dist.evaluate.image_measures import (
    ImageResult,
    mean_over_images,
    name_test,
    shown_places,
    summarize,
)
from frepa_dist.evaluate.leakage import check_split
from frepa_dist.evaluate.masks import mask_measures
from frepa_dist.evaluate.overlays import Gallery, fit_picture, overlay_masks, to_picture
from frepa_dist.evaluate.pairs import (
    Columns,
    MaskedImage,
    load_image,
    load_mask,
    load_truth,
    number_patients,
    read_masked,
    read_patients,
    resize_mask,
)
from frepa_dist.evaluate.tiles import cut_tiles
from frepa_dist.models.volume import DenseHead
from shards.formats.common import Pixels
from shards.support.progress import track

THRESHOLD = 0.5  # least probability of what is found
UNKNOWN = -1.0  # in a tile of a mask: a pixel that does not count


class SegmentResult(ImageResult):
    """What a decoder on a frozen encoder finds; its measures are those of `masks.mask_measures`.

    Attributes:
        observer: the same means of the second observer's masks, where there are some; a mask has no AUROC.
        num_parameters: of the decoder.
        training: how.
    """

    observer: dict[str, float]
    num_parameters: int
    training: DenseTraining

    def describe(self) -> str:
        """A few lines for the terminal."""
        lines = [f"{len(self.names)} test images, {self.num_train} to learn from; mean, 95% interval"]
        for name, mean in self.mean.items():
            human = f"  second observer {self.observer[name]:.3f}" if name in self.observer else ""
            lines.append(f"{name:<12} {mean:.3f}  [{self.low[name]:.3f}, {self.high[name]:.3f}]{human}")
        lines.append(f"leakage: {self.leakage}")
        return "\n".join(lines)


class Tiles(NamedTuple):
    """Training tiles, half of them mirrored.

    Attributes:
        maps: (2 T, D, h, w) float16, of the frozen encoder.
        masks: (2 T, S, S) float32, the share of each pixel that belongs to the mask; -1 does not count.
    """

    maps: Tensor
    masks: Tensor


def run_segment(
    encoder: str,
    images: Path,
    table: Path,
    *,
    columns: Columns | None = None,
    training: DenseTraining | None = None,
    num_resamples: int = 1000,
    device: str | None = None,
    gallery: Gallery | None = None,
    chosen: Sequence[int] | None = None,
    allow_leakage: bool = False,
    states: Sequence[Path] = (),
) -> SegmentResult:
    """Train a decoder on a frozen encoder, and judge it on images it has not seen.

    Args:
        encoder: see `features.SOURCES`.
        images: folder of the images.
        table: which masks they have (see `pairs.read_masked`).
        columns: what the columns of masks are called.
        training: how the decoder is trained.
        num_resamples: of the bootstrap.
        device: where it runs, None takes a GPU if there is one.
        gallery: where pictures of the best, the median and the worst test image (by Dice) are put.
        chosen: places of the test images to put there instead.
        allow_leakage: go on where images were in the run's pretraining data; the result says so.
        states: private folders of the builds of those data, see `leakage.check_leakage`.

    Raises:
        FrepaError: what is wrong with encoder, images or masks.
    """
    training = training or DenseTraining()
    pairs = read_masked(images, table, columns, seed=training.seed)
    split = [(pair.image, pair.is_test) for pair in pairs]
    leakage = check_split(encoder, split, images, table, allow=allow_leakage, states=states)
    loaded = load_encoder(encoder, device)
    head = train_decoder(loaded, [pair for pair in pairs if not pair.is_test], training)
    tests = [pair for pair in pairs if pair.is_test]
    rows, humans = [], []
    for pair in track(tests, total=len(tests), description="segment", unit="image"):
        truth, where = load_truth(pair)
        scores = score_image(loaded, head, pair, training, truth.shape)
        rows.append(mask_measures(scores, truth, where, threshold=THRESHOLD))
        if pair.second is not None:
            human = mask_measures(load_mask(pair.second, truth.shape).astype(float), truth, where)
            humans.append({name: value for name, value in human.items() if name != "auroc"})
    groups = number_patients(read_patients(images, table, [pair.image for pair in tests]))
    measures = summarize(rows, num_resamples, training.seed, groups)
    if gallery is not None:
        for word, place in shown_places(measures["by_image"]["dice"], chosen):
            words = f"{word}Dice {rows[place]['dice']:.3f}"
            gallery.append(draw_masks(loaded, head, tests[place], training, (name_test(place), words)))
    return SegmentResult(
        encoder=loaded.name,
        images=str(images),
        names=[pair.image.name for pair in tests],
        **measures,
        observer=mean_over_images(humans) if humans else {},
        num_train=len(pairs) - len(tests),
        num_parameters=sum(parameter.numel() for parameter in head.parameters()),
        training=training,
        leakage=leakage,
        groups=groups,
    )


def score_image(
    encoder: Encoder,
    head: DenseHead,
    pair: MaskedImage,
    training: DenseTraining,
    shape: tuple[int, int],
) -> npt.NDArray[np.float32]:
    """Probability (H, W) of the mask, at the size of the file, which is the shape."""
    scores = predict_scores(encoder, head, load_image(pair.image, training.short_side))
    return np.asarray(cv2.resize(scores, shape[::-1], interpolation=cv2.INTER_LINEAR), np.float32)


def draw_masks(
    encoder: Encoder, head: DenseHead, pair: MaskedImage, training: DenseTraining, words: tuple[str, str]
) -> list[tuple[Pixels, str]]:
    """An image, and what was found, missed and falsely found in it, with words for each."""
    image, (truth, where) = load_image(pair.image, None), load_truth(pair)
    found = score_image(encoder, head, pair, training, truth.shape) >= THRESHOLD
    drawn = fit_picture(overlay_masks(image, truth, found, where))
    return [(to_picture(image), words[0]), (drawn, words[1])]


def train_decoder(encoder: Encoder, pairs: Sequence[MaskedImage], training: DenseTraining) -> DenseHead:
    """Train the decoder of a mask on the maps of a frozen encoder, by cross-entropy and soft Dice.

    Raises:
        ConfigError: the encoder has no maps.
        DataError: an image or a mask cannot be read.
        DivergedError: the loss is no number.
    """
    shown = track(enumerate(pairs), total=len(pairs), description="encode", unit="image")
    tiling = training.share_tiles(len(pairs))
    parts = [encode_tiles(encoder, pair, tiling, number) for number, pair in shown]
    maps, masks = (torch.cat(column) for column in zip(*parts, strict=True))
    side = masks.shape[-1]
    with seeded(training.seed, encoder.device):
        stride = side // maps.shape[-1]
        head = DenseHead(maps.shape[1], 2, stride, head_width=training.head_width).to(encoder.device)
        train_on_tiles(
            head,
            (maps, masks),
            lambda maps, masks: mask_loss(head(maps, (side, side)), masks),
            training,
            encoder.device,
        )
    return head


def encode_tiles(encoder: Encoder, pair: MaskedImage, training: DenseTraining, number: int) -> Tiles:
    """Tiles of a training image, each also mirrored.

    Args:
        encoder: the frozen encoder.
        pair: the image and its mask.
        training: which tiles, at which size.
        number: of the image: which tiles are drawn depends on it.
    """
    image = load_image(pair.image, training.short_side)
    shape = (image.shape[1], image.shape[2])
    truth, where = load_truth(pair)
    mask = np.where(resize_mask(where, shape) >= 0.5, resize_mask(truth & where, shape), UNKNOWN)
    corners = choose_corners(shape, encoder.image_size, training, number)
    # what is outside of a small image is mirrored for the encoder, and does not count; 0 - 1 is UNKNOWN
    masks = cut_tiles(mask + 1, corners, encoder.image_size, mirror=False) - 1
    maps = encode_maps(encoder, with_mirrored(cut_tiles(image, corners, encoder.image_size)))
    return Tiles(maps.half(), with_mirrored(masks).float())


def predict_logits(encoder: Encoder, head: DenseHead, image: Pixels) -> npt.NDArray[np.float32]:
    """Log odds (H, W) that a pixel of an image (3, H, W) belongs to the mask.

    They rank pixels that a sure decoder gives a probability of exactly 1 all alike.
    """
    size = (encoder.image_size, encoder.image_size)

    def decode(maps: Tensor, _: Tensor) -> Tensor:
        both: Tensor = head(maps, size)
        return both[:, 1:] - both[:, :1]

    logits: npt.NDArray[np.float32] = predict_image(encoder, decode, image)[0]
    return logits


def predict_scores(encoder: Encoder, head: DenseHead, image: Pixels) -> npt.NDArray[np.float32]:
    """Probability (H, W) that a pixel of an image (3, H, W) belongs to the mask."""
    size = (encoder.image_size, encoder.image_size)
    shares: npt.NDArray[np.float32] = predict_image(
        encoder, lambda maps, _: head(maps, size).softmax(dim=1)[:, 1:], image
    )[0]
    return shares


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy plus one minus soft Dice.

    Args:
        logits: (T, 2, S, S) of background and mask.
        masks: (T, S, S), shares in [0, 1]; -1 does not count.

    Returns:
        0-dim float32.
    """
    known = (masks >= 0).float()
    target = masks.clamp(min=0)
    logit = (logits[:, 1] - logits[:, 0]).float()
    entropy = functional.binary_cross_entropy_with_logits(logit, target, weight=known, reduction="sum")
    shares = logit.sigmoid() * known
    dice = (2 * (shares * target).sum() + 1) / ((shares + target).sum() + 1)
    return entropy / known.sum().clamp(min=1) + 1 - dice
