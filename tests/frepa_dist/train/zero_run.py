"""Started on each rank by test_zero.py: whole runs of RetMAE, with all terms, under ZeRO 3.

FOLDER/whole and FOLDER/resumed (from the other's checkpoint of step 2) are run folders. FOLDER holds
aux.safetensors, weights of timm's `test_vit`. FOLDER/export.json says how the exported weights deviate from
those of the engine, and what they compute.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# as frepa_dist.train does
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file

from frepa_dist.config import RunConfig
from frepa_dist.methods.registry import METHODS
from frepa_dist.runs import find_checkpoint
from frepa_dist.train import engines
from frepa_dist.train.engines import process_group
from frepa_dist.train.loop import Trainer
from tests.frepa_dist.methods.steps import make_batch
from tests.frepa_dist.train.small_runs import create_trainer, make_config


def make_run(dataset: Path, folder: Path, name: str) -> RunConfig:
    aux = {"model": "test_vit", "weights": str(folder / "aux.safetensors"), "hidden": 16}
    method = {
        "name": "retmae",
        "model": {"size": "tiny", "image_size": 64},
        "hmi": {"warmup_fraction": 0.0, "ramp_fraction": 0.0, "hidden": 16, "ema_momentum": 0.5},
        "aux": aux,
    }
    train = {"zero_stage": 3, "base_learning_rate": 0.064, "warmup_fraction": 0.0}
    return make_config(dataset, folder / name, method, **train)


def compare_export(trainer: Trainer, config: RunConfig) -> dict[str, float]:
    """The network of the last checkpoint's weights beside that in the engine; all ranks must call it."""
    weights = load_file(find_checkpoint(config.output) / "student.safetensors")
    exported = METHODS[config.method.name].create_student(config.method)
    exported.load_state_dict(weights)
    fixed, inside = trainer.submodules.student.fixed, trainer.submodules.student.module
    masters = {
        n: fixed[n] if n in fixed else safe_get_full_fp32_param(p) for n, p in inside.named_parameters()
    }
    assert masters.keys() == weights.keys()
    batch = make_batch()
    images = batch["image"].float() / 255
    with torch.no_grad():
        ours = float(exported(images, batch["mask_noise"]).loss)
        theirs = float(trainer.submodules.student.call(images, batch["mask_noise"]).loss)
        elsewhere = float(METHODS["retmae"].create_student(config.method)(images, batch["mask_noise"]).loss)
    apart = max(float((weights[name] - value).abs().max()) for name, value in masters.items())
    return {"weights": apart, "exported": ours, "engine": theirs, "untrained": elsewhere}


def main(dataset: Path, folder: Path) -> None:
    engines.PERSISTENT_ELEMENTS = 1000  # so that weights come and go in small networks too
    engines.LIVE_ELEMENTS = engines.PREFETCH_ELEMENTS = 20_000
    with process_group() as world:
        torch.set_num_threads(1)
        whole = create_trainer(make_run(dataset, folder, "whole"), world)
        whole.run()
        comparison = compare_export(whole, whole.config)
        if world.is_main:
            (folder / "export.json").write_text(json.dumps(comparison))
        trainer = create_trainer(make_run(dataset, folder, "resumed"), world)
        trainer.resume(find_checkpoint(whole.config.output, 2))
        trainer.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
