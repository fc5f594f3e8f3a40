"""Schedules as pure functions of the optimizer step: resuming needs one number."""

from __future__ import annotations

import math

from frepa_dist.config import TrainConfig


def peak_learning_rate(config: TrainConfig) -> float:
    """The rate after warm-up: linear scaling with the batch (Goyal 2017; `blr` of facebookresearch/mae)."""
    return config.base_learning_rate * config.global_batch_size / 256


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate used by optimizer step `step` (0-based): linear warm-up, then half a cosine."""
    peak = peak_learning_rate(config)
    warmup = round(config.warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    floor = min(config.min_learning_rate, peak)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def opponent_learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of the discriminators: the student's shape, with a peak of its own."""
    share = learning_rate(config, step, total_steps) / peak_learning_rate(config)
    return config.opponent.learning_rate * share
