"""A dense head on volumes: a map of classes for each slice. Shards hold no masks, so the tensors are given.

Shapes: N slices of a volume, n windows of F places, S side of a slice, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from frepa_dist.evaluate.heads import run_steps, seeded
from frepa_dist.evaluate.scores import Int64
from frepa_dist.evaluate.volume_training import (
    MEASURED,
    WINDOWS_AT_ONCE,
    VolumeTraining,
    draw_windows,
    some_windows,
    standardize_input,
)
from frepa_dist.models.volume import DenseHead, VolumeEncoder, VolumeSettings
from frepa_dist.models.volume_slots import Slots, cut_slots, merge_slots
from shards.support.errors import ConfigError
from shards.support.settings import Settings

_SMOOTH = 1.0  # pixels added to both sides of Dice, for a class that a batch lacks


@dataclass(frozen=True)
class DenseVolume:
    """A volume with its mask.

    Attributes:
        images: (N, 3, S, S) float32 as the 2D encoder wants them.
        masks: (N, S, S) int64, the class of each pixel; -1 is not known and counts nowhere.
        slices: (N,) numbers of the slices, None for 0, 1, 2, ...
    """

    images: Tensor
    masks: Tensor
    slices: Int64 | None = None

    def slots(self, settings: VolumeSettings) -> Slots:
        """Its windows."""
        numbers = np.arange(len(self.images)) if self.slices is None else self.slices
        return cut_slots(numbers, settings.num_slices, settings.overlap)


class DenseResult(Settings):
    """What a dense head does on volumes it has not seen.

    Attributes:
        dice: of each class but 0, over all pixels of all test volumes together.
        dice_by_volume: their mean over classes, volume by volume; a class that neither mask nor prediction
            has counts 1.
        num_parameters: that learned.
    """

    dice: list[float]
    dice_by_volume: list[float]
    num_parameters: int

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")


def train_dense(
    encoder: nn.Module,
    width: int,
    stride: int,
    volumes: Sequence[DenseVolume],
    test_volumes: Sequence[DenseVolume],
    num_classes: int,
    *,
    settings: VolumeSettings | None = None,
    training: VolumeTraining | None = None,
    train_encoder: bool = False,
    head_width: int = 64,
    device: str | torch.device = "cpu",
) -> tuple[VolumeEncoder, DenseHead, DenseResult]:
    """Train a dense head by cross-entropy and soft Dice, and judge it.

    Args:
        encoder: the 2D encoder, images (n, 3, S, S) -> maps (n, D, h, w); frozen here unless it is trained.
        width: D.
        stride: S / h, a power of two.
        volumes: to learn from.
        test_volumes: of other patients.
        num_classes: K, class 0 the background.
        settings: of the volume encoder.
        training: how.
        train_encoder: whether the 2D encoder learns too.
        head_width: channels of the head's first layer.
        device: where.

    Returns:
        The volume encoder, the head, and what they do on the test volumes.

    Raises:
        ConfigError: images and masks do not fit.
        DivergedError: the loss is no number.
    """
    settings, training = settings or VolumeSettings(), training or VolumeTraining()
    for volume in (*volumes, *test_volumes):
        _check(volume, num_classes)
    where = torch.device(device)
    slots = [volume.slots(settings) for volume in volumes]
    with seeded(training.seed, where):
        body = VolumeEncoder(encoder, width, settings, train_encoder=train_encoder).to(where)
        head = DenseHead(width, num_classes, stride, head_width=head_width).to(where)

        def loss_of(chosen: Int64, rng: np.random.Generator) -> Tensor:
            taken = [
                _take(volumes[number], draw_windows(slots[number], training.max_windows, rng).rows, where)
                for number in chosen.tolist()
            ]
            logits, masks = [], []
            for parts in _alike(taken):  # volumes of one size go through together
                images, mask, is_there = (torch.cat(column) for column in zip(*parts, strict=True))
                maps = body(images, is_there)[is_there]
                logits.append(head(maps, (mask.shape[-2], mask.shape[-1])).flatten(2))
                masks.append(mask[is_there].flatten())
            # pixels in one row, since volumes may differ in size
            flat = torch.cat([part.transpose(0, 1).flatten(1) for part in logits], dim=1)
            return dense_loss(flat[None], torch.cat(masks)[None])

        measured = ((v.images, slot.rows[0]) for v, slot in zip(volumes[:MEASURED], slots, strict=False))
        standardize_input(body, (images[rows[None, rows >= 0]] for images, rows in measured))
        run_steps(
            [body, head], loss_of, np.arange(len(volumes)), training, "dense volume head", slow=[encoder]
        )
    learned = sum(p.numel() for module in (body, head) for p in module.parameters() if p.requires_grad)
    return body, head, _judge(body, head, test_volumes, num_classes, learned)


@torch.no_grad()
def predict_masks(body: VolumeEncoder, head: DenseHead, volume: DenseVolume) -> Tensor:
    """The likeliest class of each pixel, (N, S, S) int64, probabilities averaged where windows overlap."""
    device = next(head.parameters()).device
    slots = volume.slots(body.settings)
    found = []
    for rows, _ in some_windows(slots, WINDOWS_AT_ONCE):
        images, mask, is_there = _take(volume, rows, device)
        maps = body(images, is_there)
        logits = head(maps.flatten(0, 1), (mask.shape[-2], mask.shape[-1]))
        found.append(logits.softmax(dim=1).reshape(*rows.shape, *logits.shape[1:]).cpu())
    return merge_slots(torch.cat(found), slots).argmax(dim=1)


def dense_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy plus one minus soft Dice, the mean over the classes but 0.

    Args:
        logits: (n, K, ...).
        masks: (n, ...) int64, -1 where it is not known.

    Returns:
        0-dim float32.
    """
    logits = logits.float()
    is_known = (masks >= 0).unsqueeze(1)
    # a batch of windows may hold no slice that was annotated
    entropy = functional.cross_entropy(logits, masks, ignore_index=-1, reduction="sum")
    entropy = entropy / is_known.sum().clamp(min=1)
    shares = logits.softmax(dim=1) * is_known
    target = functional.one_hot(masks.clamp(min=0), logits.shape[1]).movedim(-1, 1) * is_known
    dims = [0, *range(2, logits.ndim)]
    both, sums = (shares * target).sum(dim=dims), (shares + target).sum(dim=dims)
    dice = (2 * both + _SMOOTH) / (sums + _SMOOTH)
    return entropy + 1 - dice[1:].mean()


def _judge(
    body: VolumeEncoder, head: DenseHead, volumes: Sequence[DenseVolume], num_classes: int, learned: int
) -> DenseResult:
    both, sums = torch.zeros(len(volumes), num_classes), torch.zeros(len(volumes), num_classes)
    for number, volume in enumerate(volumes):
        found, is_known = predict_masks(body, head, volume), volume.masks >= 0
        for k in range(num_classes):
            mine, theirs = (found == k) & is_known, volume.masks == k
            both[number, k], sums[number, k] = (mine & theirs).sum(), mine.sum() + theirs.sum()
    each = _dice(both, sums)[:, 1:].mean(dim=1)
    whole = _dice(both.sum(dim=0), sums.sum(dim=0))[1:]
    return DenseResult(dice=whole.tolist(), dice_by_volume=each.tolist(), num_parameters=learned)


def _dice(both: Tensor, sums: Tensor) -> Tensor:
    """Of overlaps and the sums of both areas; 1 where both are empty."""
    return torch.where(sums > 0, 2 * both / sums.clamp(min=1), 1)


def _take(volume: DenseVolume, rows: Int64, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Images and masks at the places of windows (n, F), and where a slice is."""
    places = torch.from_numpy(np.maximum(rows, 0))
    images, masks = volume.images[places].to(device), volume.masks[places].to(device)
    return images, masks, torch.from_numpy(rows >= 0).to(device)


def _alike(
    taken: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> Iterable[Sequence[tuple[Tensor, Tensor, Tensor]]]:
    """Group what volumes gave by the size of the slices."""
    groups: dict[tuple[int, ...], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for part in taken:
        groups.setdefault(tuple(part[0].shape[2:]), []).append(part)
    return groups.values()


def _check(volume: DenseVolume, num_classes: int) -> None:
    shape = (len(volume.images), *volume.images.shape[2:])
    if volume.images.ndim != 4 or tuple(volume.masks.shape) != shape or not len(volume.images):
        raise ConfigError(
            f"images {tuple(volume.images.shape)} and masks {tuple(volume.masks.shape)} do not fit",
            allowed="images (N, 3, S, S) and masks (N, S, S)",
        )
    low, high = int(volume.masks.min()), int(volume.masks.max())
    if low < -1 or high >= num_classes:
        raise ConfigError(
            f"a mask holds classes from {low} to {high}", allowed=f"-1 (not known) to {num_classes - 1}"
        )
