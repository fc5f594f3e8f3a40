"""A small run for the tests of planning."""

from __future__ import annotations

from pathlib import Path

from cluster.planning.assumptions import Assumptions, read_assumptions
from frepa_dist.config import RunConfig


def small_config(root: Path | str, **train) -> RunConfig:
    """Frepa's ViT-pico with two views, on a dataset; global batch 8."""
    settings = {"global_batch_size": 8, "micro_batch_size": 2, "steps": 40, "zero_stage": 1}
    return RunConfig.model_validate(
        {
            "output": "unused",
            "method": {
                "name": "frepa",
                "model": {"backbone": "vit_pico", "image_size": 64},
                "consistency": {},
            },
            "data": {"root": str(root), "num_workers": 2, "num_streams": 4},
            "train": {**settings, **train},
        }
    )


def assume(*overrides: str, gpu: str = "h100") -> Assumptions:
    """The defaults, with some others."""
    return read_assumptions(gpu, overrides, {})
