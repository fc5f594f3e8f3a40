"""What the runs of these tests have in common: the settings of a few steps, and their trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frepa_dist.config import RunConfig
from frepa_dist.methods.base import MethodSettings
from frepa_dist.train.engines import World
from frepa_dist.train.loop import Trainer
from shards.dataset import load_snapshot
from shards.support.telemetry import Telemetry

TRAIN = {
    "global_batch_size": 4,
    "micro_batch_size": 1,
    "steps": 4,
    "precision": "bf16",
    "zero_stage": 2,
    "log_every": 1,
    "checkpoint_every": 2,
}


def make_config(
    dataset: Path, output: Path, method: Mapping[str, Any] | MethodSettings, **train: Any
) -> RunConfig:
    """The configuration of a small run, pinned as `frepa_dist.train` does.

    Args:
        dataset: what it reads, in its own process.
        output: its folder.
        method: settings of a shipped method, or a method of the tests.
        train: what differs from `TRAIN`.
    """
    is_shipped = isinstance(method, Mapping)
    data = {"root": str(dataset), "snapshot": load_snapshot(dataset).hash, "num_workers": 0}
    settings = {"output": str(output), "data": data, "train": {**TRAIN, **train}}
    config = RunConfig.model_validate({**settings, "method": method if is_shipped else {"name": "mae"}})
    return config if is_shipped else config.model_copy(update={"method": method})


def with_train(config: RunConfig, **changes: Any) -> RunConfig:
    """The same run with other settings of `train`."""
    train = type(config.train).model_validate({**config.train.model_dump(), **changes})
    return config.model_copy(update={"train": train})


def create_trainer(config: RunConfig, world: World, telemetry: Telemetry | None = None) -> Trainer:
    """The trainer of a run, its folder made; all ranks must call it."""
    config.output.mkdir(exist_ok=True)
    return Trainer(config, config.output, world, telemetry or Telemetry())
