"""Trains heads on volumes: one process, one device, the same result for the same seed.

Shapes: B volumes of a batch, n windows of F places of slices, D width, h = w sides of a map, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from frepa_dist.evaluate.scores import Float64, Int64
from frepa_dist.evaluate.volume_data import Load
from frepa_dist.models.volume import ClassificationHead, SliceMixer, VolumeEncoder
from frepa_dist.models.volume_slots import Slots
from shards.read.draws import sample_rng
from shards.support.errors import DivergedError
from shards.support.progress import Progress
from shards.support.settings import Settings

WINDOWS_AT_ONCE = 4  # when nothing is learned
MEASURED = 16  # training volumes whose maps tell mean and spread


class VolumeTraining(Settings):
    """How a head is trained; no public source states these.

    Attributes:
        epochs: times that every training volume is seen.
        batch_volumes: volumes of a step.
        max_windows: windows of a long volume that a step takes, drawn at random: bounds its memory.
        learning_rate: after the warm-up, then half a cosine to zero.
        encoder_learning_rate: that of a 2D encoder which is trained too.
        weight_decay: of weights of more than one dimension.
        warmup_fraction: of the steps.
        clip_norm: largest norm of the gradient.
        seed: of the start, the order and the windows.
    """

    epochs: int = Field(default=50, ge=1)
    batch_volumes: int = Field(default=8, ge=1)
    max_windows: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    encoder_learning_rate: float = Field(default=1e-5, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**63)


Body = SliceMixer | VolumeEncoder
"""(n, F, D, h, w) or (n, F, 3, S, S), and a mask (n, F) -> (n, F, D, h, w)."""


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators at a seed, and as they were afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


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
    run_steps([body, head], loss_of, chosen, config, description)


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


def run_steps(
    modules: Sequence[nn.Module],
    loss_of: Callable[[Int64, np.random.Generator], Tensor],
    chosen: Int64,
    config: VolumeTraining,
    description: str,
) -> None:
    """AdamW over all parameters that learn; the loss is looked at once an epoch.

    Args:
        modules: what learns; a `VolumeEncoder` among them has a rate of its own for its 2D encoder.
        loss_of: of some volumes, with the generator of the step.
        chosen: the volumes.
        config: how.
        description: of the progress bar.

    Raises:
        DivergedError: the loss is no number.
    """
    groups = _parameter_groups(modules, config)
    optimizer = torch.optim.AdamW(groups)
    per_epoch = math.ceil(len(chosen) / config.batch_volumes)
    total = per_epoch * config.epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total, config))
    learning = [parameter for group in groups for parameter in group["params"]]
    for module in modules:
        module.train()
    with Progress(total, description, unit="step") as progress:
        for epoch in range(config.epochs):
            rng = sample_rng(config.seed, epoch, 0, "volumes of an epoch")
            order = rng.permutation(chosen)
            losses = []
            for start in range(0, len(order), config.batch_volumes):
                optimizer.zero_grad(set_to_none=True)
                loss = loss_of(order[start : start + config.batch_volumes], rng)
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(learning, config.clip_norm)
                optimizer.step()
                scheduler.step()
                losses.append(loss.detach())
                progress.update()
            mean = float(torch.stack(losses).mean())
            if not math.isfinite(mean):
                raise DivergedError(
                    f"the loss of the volume head is {mean} in epoch {epoch}", fix="lower the learning rate"
                )
    for module in modules:
        module.eval()


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


def _rate(step: int, total: int, config: VolumeTraining) -> float:
    """Share of the learning rate: linear warm-up, then half a cosine."""
    warmup = round(config.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def _parameter_groups(modules: Sequence[nn.Module], config: VolumeTraining) -> list[dict[str, Any]]:
    """Parameters by rate and decay; biases, norms and the like do not decay."""
    slow = {
        id(parameter)
        for module in modules
        if isinstance(module, VolumeEncoder)
        for parameter in module.encoder.parameters()
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                groups.setdefault((id(parameter) in slow, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.encoder_learning_rate if is_slow else config.learning_rate,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (is_slow, decays), parameters in groups.items()
    ]
