"""Trains heads on what frozen encoders give: one process, one device, the same result for the same seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from frepa_dist.evaluate.scores import Int64
from shards.read.draws import sample_rng
from shards.support.errors import DivergedError
from shards.support.progress import Progress
from shards.support.settings import Settings


class HeadTraining(Settings):
    """How a head is trained; no public source states these.

    Attributes:
        epochs: times that every training item is seen.
        batch_size: items of a step.
        learning_rate: after the warm-up, then half a cosine to zero.
        encoder_learning_rate: that of an encoder which is trained too.
        weight_decay: of weights of more than one dimension.
        warmup_fraction: of the steps.
        clip_norm: largest norm of the gradient.
        seed: of the start and the order.
    """

    epochs: int = Field(default=50, ge=1)
    batch_size: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    encoder_learning_rate: float = Field(default=1e-5, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**63)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators at a seed, and as they were afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def run_steps(
    modules: Sequence[nn.Module],
    loss_of: Callable[[Int64, np.random.Generator], Tensor],
    chosen: Int64,
    config: HeadTraining,
    description: str,
    *,
    slow: Collection[nn.Module] = (),
    scales: Mapping[int, float] | None = None,
    silent: bool = False,
) -> None:
    """AdamW over all parameters that learn; the loss is looked at once an epoch.

    Args:
        modules: what learns.
        loss_of: of some items, with the generator of the step.
        chosen: the items.
        config: how.
        description: of the progress bar.
        slow: encoders among or inside the modules, which learn at a rate of their own.
        scales: factors of the learning rate, by the `id` of a parameter; 1 for those that are not named.
        silent: show no progress.

    Raises:
        DivergedError: the loss is no number.
    """
    groups = _parameter_groups(modules, slow, config, scales or {})
    optimizer = torch.optim.AdamW(groups)
    per_epoch = math.ceil(len(chosen) / config.batch_size)
    total = per_epoch * config.epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total, config))
    learning = [parameter for group in groups for parameter in group["params"]]
    for module in modules:
        module.train()
    with Progress(total, description, unit="step", silent=silent) as progress:
        for epoch in range(config.epochs):
            # the tag is part of the draws: another one would give other figures
            rng = sample_rng(config.seed, epoch, 0, "volumes of an epoch")
            order = rng.permutation(chosen)
            losses = []
            for start in range(0, len(order), config.batch_size):
                optimizer.zero_grad(set_to_none=True)
                loss = loss_of(order[start : start + config.batch_size], rng)
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(learning, config.clip_norm)
                optimizer.step()
                scheduler.step()
                losses.append(loss.detach())
                progress.update()
            mean = float(torch.stack(losses).mean())
            if not math.isfinite(mean):
                raise DivergedError(
                    f"{description}: the loss is {mean} in epoch {epoch}", fix="lower the learning rate"
                )
    for module in modules:
        module.eval()


def _rate(step: int, total: int, config: HeadTraining) -> float:
    """Share of the learning rate: linear warm-up, then half a cosine."""
    warmup = round(config.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def _parameter_groups(
    modules: Sequence[nn.Module],
    slow: Collection[nn.Module],
    config: HeadTraining,
    scales: Mapping[int, float],
) -> list[dict[str, Any]]:
    """Parameters by rate and decay; biases, norms and the like do not decay."""
    are_slow = {id(parameter) for module in slow for parameter in module.parameters()}
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                kind = (id(parameter) in are_slow, scales.get(id(parameter), 1.0), parameter.ndim > 1)
                groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": scale * (config.encoder_learning_rate if is_slow else config.learning_rate),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (is_slow, scale, decays), parameters in groups.items()
    ]
