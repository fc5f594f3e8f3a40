"""Trains heads on volumes.

Shapes: B volumes of a batch, n windows of F places of slices, D width, h = w sides of a map, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from frepa_dist.evaluate.heads import HeadTraining, run_steps
from frepa_dist.evaluate.scores import Float64, Int64
from frepa_dist.evaluate.volume_data import Load
from frepa_dist.models.volume import ClassificationHead, SliceMixer, VolumeEncoder
from frepa_dist.models.volume_slots import Slots

WINDOWS_AT_ONCE = 4  # when nothing is learned
MEASURED = 16  # training volumes whose maps tell mean and spread


class VolumeTraining(HeadTraining):
    """How a head on volumes is trained; its items are volumes.

    Attributes:
        max_windows: windows of a long volume that a step takes, drawn at random: bounds its memory.
    """

    max_windows: int = Field(default=2, ge=1)


Body = SliceMixer | VolumeEncoder
"""(n, F, D, h, w) or (n, F, 3, S, S), and a mask (n, F) -> (n, F, D, h, w)."""


def train_classifier(
    body: Body,
    head: ClassificationHead,
    load: Load,
    slots: Sequence[Slots],
    y: Int64,
    chosen: Int64,
    config: VolumeTraining,
    *,
    description: str = "volume head",
) -> None:
    """Train body and head in place, by cross-entropy.

    Args:
        body: the mixer over maps, or the whole encoder over images.
        head: of the classes.
        load: gives what the body works on.
        slots: windows of all volumes.
        y: classes of all volumes.
        chosen: the training volumes.
        config: how.
        description: of the progress bar.

    Raises:
        DivergedError: the loss is no number.
    """
    device = next(head.parameters()).device

    def loss_of(volumes: Int64, rng: np.random.Generator) -> Tensor:
        drawn = [draw_windows(slots[volume], config.max_windows, rng) for volume in volumes]
        pairs = zip(volumes.tolist(), drawn, strict=True)
        inputs = torch.cat([load(volume, part.rows) for volume, part in pairs]).to(device)
        weight = torch.from_numpy(np.concatenate([part.weight for part in drawn])).to(device)
        counts = torch.tensor([len(part.rows) for part in drawn])
        members = torch.eye(len(counts)).repeat_interleave(counts, dim=1).to(device)
        logits = head(head.pool(body(inputs, weight > 0), weight), weight.sum(dim=1), members)
        return functional.cross_entropy(logits, torch.from_numpy(y[volumes]).to(device))

    measured = ((volume, slots[volume].rows[0]) for volume in chosen[:MEASURED].tolist())
    standardize_input(body, (load(volume, rows[None, rows >= 0]) for volume, rows in measured))
    slow = [body.encoder] if isinstance(body, VolumeEncoder) else []
    run_steps([body, head], loss_of, chosen, config, description, slow=slow)


@torch.no_grad()
def standardize_input(body: Body, windows: Iterable[Tensor]) -> None:
    """Standardize what the transformer sees by some training windows, each (1, F, ...)."""
    device = next(body.parameters()).device
    body.eval()
    values = []
    for window in windows:
        found = window.flatten(0, 1).to(device)
        maps = body.encode_slices(found) if isinstance(body, VolumeEncoder) else found
        values.append(maps.transpose(0, 1).flatten(1))
    mixer = body.mixer if isinstance(body, VolumeEncoder) else body
    mixer.standardize_by(torch.cat(values, dim=1))


@torch.no_grad()
def predict_classes(
    body: Body, head: ClassificationHead, load: Load, slots: Sequence[Slots], chosen: Int64
) -> Float64:
    """Probabilities (len(chosen), K) of volumes, all windows of each, a few at a time."""
    device = next(head.parameters()).device
    found = []
    for volume in chosen.tolist():
        sums, totals = [], []
        for rows, weight in some_windows(slots[volume], WINDOWS_AT_ONCE):
            shares = torch.from_numpy(weight).to(device)
            sums.append(head.pool(body(load(volume, rows).to(device), shares > 0), shares))
            totals.append(shares.sum(dim=1))
        merged = torch.cat(totals)
        found.append(head(torch.cat(sums), merged, torch.ones(1, len(merged), device=device)))
    return torch.cat(found).double().softmax(dim=1).cpu().numpy()


def some_windows(slots: Slots, num: int) -> Iterator[Slots]:
    """All windows of a volume, `num` at a time."""
    for start in range(0, len(slots.rows), num):
        part = slice(start, start + num)
        yield Slots(slots.rows[part], slots.weight[part])


def draw_windows(slots: Slots, most: int, rng: np.random.Generator) -> Slots:
    """Some windows of a volume; as many draws whether it is long or short."""
    order = rng.permutation(len(slots.rows))[:most]
    return Slots(slots.rows[order], slots.weight[order])
