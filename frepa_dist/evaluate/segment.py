"""Segmentation with a frozen encoder: a light decoder learns masks (of vessels, of lesions) from its maps.

Images keep their size, or are resized to a short side, and are cut into overlapping tiles of the size that
the encoder was made for; each tile is encoded once, and again mirrored. The decoder is the same for every
encoder: LayerNorm, 1x1 convolution, and doublings of the side until it is the tile's. It is judged on whole
images at their own size.

Shapes: H, W of an image, T tiles, S side of a tile, D width, h = w = S / stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from frepa_dist.evaluate.encoder import Encoder
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.heads import HeadTraining, run_steps, seeded
from frepa_dist.evaluate.leakage import NOT_CHECKED, check_leakage
from frepa_dist.evaluate.masks import Mask, mask_measures
from frepa_dist.evaluate.pairs import Columns, MaskedImage, load_image, load_mask, read_masked, resize_mask
from frepa_dist.evaluate.scores import Int64
from frepa_dist.evaluate.tiles import cut_tiles, merge_tiles, tile_corners
from frepa_dist.models.volume import DenseHead
from shards.read.draws import sample_rng
from shards.support.errors import ConfigError
from shards.support.progress import track
from shards.support.settings import Settings

UNKNOWN = -1.0  # in a tile of a mask: a pixel that does not count
TILES_AT_ONCE = 16


class SegmentTraining(HeadTraining):
    """How the decoder is trained; its items are tiles.

    Attributes:
        short_side: pixels that images are resized to; None keeps their size.
        max_tiles: tiles of a training image, drawn at random where it has more: bounds the memory.
        head_width: channels of the decoder's first layer.
    """

    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    short_side: int | None = Field(default=None, ge=32)
    max_tiles: int = Field(default=32, ge=1)
    head_width: int = Field(default=64, ge=8)


class SegmentResult(Settings):
    """What a decoder on a frozen encoder finds.

    Attributes:
        encoder: what was frozen.
        images: where the images lie.
        names: of the test images.
        by_image: of each measure (`masks.mask_measures`) its values, in the order of `names`; None where an
            image cannot tell it.
        mean: of each measure over the test images that can tell it.
        low, high: 95% bootstrap interval over test images (percentiles).
        observer: the same means of the second observer's masks, where there are some; a mask has no AUROC.
        num_train: training images.
        num_parameters: of the decoder.
        training: how.
        leakage: whether images were in the pretraining data, in words.
    """

    encoder: str
    images: str
    names: list[str]
    by_image: dict[str, list[float | None]]
    mean: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    observer: dict[str, float]
    num_train: int
    num_parameters: int
    training: SegmentTraining
    leakage: str = NOT_CHECKED

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")

    def describe(self) -> str:
        """A few lines for the terminal."""
        lines = [f"{len(self.names)} test images, {self.num_train} to learn from; mean, 95% interval"]
        for name, mean in self.mean.items():
            human = f"  second observer {self.observer[name]:.3f}" if name in self.observer else ""
            lines.append(f"{name:<12} {mean:.3f}  [{self.low[name]:.3f}, {self.high[name]:.3f}]{human}")
        lines.append(f"leakage: {self.leakage}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Tiles:
    """Training tiles.

    Attributes:
        maps: (T, D, h, w) float16, of the frozen encoder.
        masks: (T, S, S) float32, the share of each pixel that belongs to the mask; -1 does not count.
    """

    maps: Tensor
    masks: Tensor


def run_segment(
    encoder: str,
    images: Path,
    table: Path,
    *,
    columns: Columns | None = None,
    training: SegmentTraining | None = None,
    num_resamples: int = 1000,
    device: str | None = None,
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
        allow_leakage: go on where images were in the run's pretraining data; the result says so.
        states: private folders of the builds of those data, see `leakage.check_leakage`.

    Raises:
        FrepaError: what is wrong with encoder, images or masks.
    """
    training = training or SegmentTraining()
    pairs = read_masked(images, table, columns, seed=training.seed)
    leakage = check_leakage(
        encoder,
        [pair.image for pair in pairs],
        images=images,
        allow=allow_leakage,
        states=states,
        tested=[pair.is_test for pair in pairs],
    )
    loaded = load_encoder(encoder, device)
    head = train_decoder(loaded, [pair for pair in pairs if not pair.is_test], training)
    tests = [pair for pair in pairs if pair.is_test]
    rows, humans = [], []
    for pair in track(tests, total=len(tests), description="segment", unit="image"):
        scores = predict_scores(loaded, head, load_image(pair, training.short_side))
        truth, where = _truth(pair)
        resized = cv2.resize(scores, truth.shape[::-1], interpolation=cv2.INTER_LINEAR)
        rows.append(mask_measures(resized, truth, where))
        if pair.second is not None:
            human = mask_measures(load_mask(pair.second, truth.shape).astype(float), truth, where)
            humans.append({name: value for name, value in human.items() if name != "auroc"})
    low, high = _intervals(rows, num_resamples, training.seed)
    return SegmentResult(
        encoder=loaded.name,
        images=str(images),
        names=[pair.image.name for pair in tests],
        by_image={name: [_known(row[name]) for row in rows] for name in rows[0]},
        mean=_means(rows),
        low=low,
        high=high,
        observer=_means(humans) if humans else {},
        num_train=len(pairs) - len(tests),
        num_parameters=sum(parameter.numel() for parameter in head.parameters()),
        training=training,
        leakage=leakage,
    )


def train_decoder(encoder: Encoder, pairs: Sequence[MaskedImage], training: SegmentTraining) -> DenseHead:
    """Train the decoder of a mask on the maps of a frozen encoder, by cross-entropy and soft Dice.

    Raises:
        ConfigError: the encoder has no maps.
        DataError: an image or a mask cannot be read.
        DivergedError: the loss is no number.
    """
    shown = track(enumerate(pairs), total=len(pairs), description="encode", unit="image")
    parts = [encode_tiles(encoder, pair, training, number) for number, pair in shown]
    tiles = Tiles(torch.cat([part.maps for part in parts]), torch.cat([part.masks for part in parts]))
    side = tiles.masks.shape[-1]
    stride = side // tiles.maps.shape[-1]
    with seeded(training.seed, encoder.device):
        head = DenseHead(encoder.width, 2, stride, head_width=training.head_width).to(encoder.device)

        def loss_of(chosen: Int64, _: np.random.Generator) -> Tensor:
            places = torch.from_numpy(chosen)
            maps = tiles.maps[places].to(encoder.device).float()
            return mask_loss(head(maps, (side, side)), tiles.masks[places].to(encoder.device))

        run_steps([head], loss_of, np.arange(len(tiles.maps)), training, "decoder")
    return head


def encode_tiles(encoder: Encoder, pair: MaskedImage, training: SegmentTraining, number: int) -> Tiles:
    """Tiles of a training image, each also mirrored.

    Args:
        encoder: the frozen encoder.
        pair: the image and its mask.
        training: which tiles, at which size.
        number: of the image: which tiles are drawn depends on it.
    """
    image = load_image(pair, training.short_side)
    shape = (image.shape[1], image.shape[2])
    truth, where = _truth(pair)
    mask = np.where(resize_mask(where, shape) >= 0.5, resize_mask(truth & where, shape), UNKNOWN)
    corners = tile_corners(*shape, encoder.image_size)
    if len(corners) > training.max_tiles:
        rng = sample_rng(training.seed, 0, number, "tiles")
        corners = corners[np.sort(rng.choice(len(corners), training.max_tiles, replace=False))]
    # what is outside of a small image is mirrored for the encoder, and does not count; 0 - 1 is UNKNOWN
    masks = cut_tiles(mask + 1, corners, encoder.image_size, mirror=False) - 1
    pixels = cut_tiles(image, corners, encoder.image_size)
    both = [torch.from_numpy(np.concatenate([part, part[..., ::-1]])) for part in (pixels, masks)]
    return Tiles(_encode(encoder, both[0]).half(), both[1].float())


@torch.inference_mode()
def _encode(encoder: Encoder, tiles: Tensor) -> Tensor:
    """Maps (T, D, h, w) of tiles (T, 3, S, S), on the host."""
    if encoder.map is None:
        raise ConfigError("this encoder gives no maps", where=encoder.name, fix="take one that does")
    parts = [encoder.map(encoder.normalize(part)).float().cpu() for part in torch.split(tiles, TILES_AT_ONCE)]
    return torch.cat(parts)


@torch.inference_mode()
def predict_scores(
    encoder: Encoder, head: DenseHead, image: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float32]:
    """Probability (H, W) that a pixel of an image (3, H, W) belongs to the mask."""
    shape, side = (image.shape[1], image.shape[2]), encoder.image_size
    corners = tile_corners(*shape, side)
    maps = _encode(encoder, torch.from_numpy(cut_tiles(image, corners, side)))
    shares = [
        head(part.to(encoder.device), (side, side)).softmax(dim=1)[:, 1:].cpu()
        for part in torch.split(maps, TILES_AT_ONCE)
    ]
    return np.asarray(merge_tiles(torch.cat(shares).numpy(), corners, shape)[0])


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


def _truth(pair: MaskedImage) -> tuple[Mask, Mask]:
    """The mask and the pixels that count, both (H, W) at the size of the file."""
    height, width = load_image(pair, None).shape[1:]
    return load_mask(pair.mask, (height, width)), load_mask(pair.where, (height, width))


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each measure over the images that can tell it."""
    found = {}
    for name in rows[0]:
        values = [row[name] for row in rows if not np.isnan(row[name])]
        if values:
            found[name] = float(np.mean(values))
    return found


def _intervals(
    rows: Sequence[dict[str, float]], num_resamples: int, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """95% percentile intervals of the means over images drawn with replacement."""
    rng = sample_rng(seed, 0, 0, "bootstrap")
    names = list(_means(rows))
    table = np.array([[row[name] for name in names] for row in rows])
    drawn = rng.integers(len(rows), size=(num_resamples, len(rows)))
    with np.errstate(invalid="ignore"):
        means = np.array([np.nanmean(table[places], axis=0) for places in drawn])
    low, high = np.nanpercentile(means, [2.5, 97.5], axis=0)
    return dict(zip(names, low.tolist(), strict=True)), dict(zip(names, high.tolist(), strict=True))
