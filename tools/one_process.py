"""What benchmarks of training share: a process group of one, drawn shards, a trainer, a late step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch

if TYPE_CHECKING:
    from frepa_dist.config import RunConfig
    from frepa_dist.methods.base import StepInfo
    from frepa_dist.train.engines import World
    from frepa_dist.train.loop import Trainer
    from shards.support.telemetry import Telemetry


@contextmanager
def one_process() -> Iterator[World]:
    """A process group of this process alone, on its GPU where there is one."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from cluster.launch import free_port
    from frepa_dist.train.engines import process_group

    os.environ["MASTER_PORT"] = str(free_port())
    with process_group() as world:
        yield world


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def draw_shards(folder: Path, num: int, side: int = 256) -> Path:
    """Build shards of noise over gradients: the content does not change the cost of a step."""
    from shards.builder.build import BuildConfig, build_dataset

    rng = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir()
    for number in range(num):
        coarse = cv2.resize(rng.integers(0, 200, (9, 9, 3), dtype=np.uint8), (side, side))
        noise = rng.integers(0, 40, (side, side, 3), dtype=np.uint8)
        cv2.imwrite(str(images / f"{number}.png"), coarse + noise)
    build_dataset([images], folder / "shards", BuildConfig(modality="fundus", size=side, jobs=1))
    return folder / "shards"


def create_trainer(config: RunConfig, world: World, telemetry: Telemetry | None = None) -> Trainer:
    """The trainer that `frepa pretrain` runs, with its run folder."""
    from frepa_dist.train.loop import Trainer
    from shards.support.telemetry import Telemetry

    config.output.mkdir(exist_ok=True)
    return Trainer(config, config.output, world, telemetry or Telemetry())


def first_batch(trainer: Trainer) -> list[dict[str, Any]]:
    """The micro-batches of a run's first step, on the device."""
    return [trainer.to_device(batch) for batch in next(trainer.stream.batches(0, 0))]


def late_step() -> StepInfo:
    """A step past all warm-ups."""
    from frepa_dist.methods.base import StepInfo

    return StepInfo(step=500, total_steps=1000, seed=0)
