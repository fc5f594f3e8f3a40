"""Started on each rank by test_opponent.py: whole runs of a method with a discriminator.

FOLDER/whole, interrupted (4 steps and back to the checkpoint of 2) and compiled are run folders.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# as frepa_dist.train does
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

import torch

from frepa_dist.config import RunConfig
from frepa_dist.methods.registry import METHODS
from frepa_dist.runs import find_checkpoint
from frepa_dist.train.engines import World, process_group
from frepa_dist.train.loop import Trainer
from shards.dataset import load_snapshot
from shards.support.telemetry import Telemetry
from tests.frepa_dist.train.adversarial_method import Pair, PairConfig

STEPS = 4


def make_config(dataset: Path, output: Path, **changes: object) -> RunConfig:
    train = {
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "steps": STEPS,
        "precision": "bf16",
        "zero_stage": 2,
        "opponent": {"zero_stage": 1},
        "log_every": 1,
        "checkpoint_every": 2,
        **changes,
    }
    data = {"root": str(dataset), "snapshot": load_snapshot(dataset).hash, "num_workers": 0}
    config = RunConfig.model_validate(
        {"output": str(output), "method": {"name": "mae"}, "data": data, "train": train}
    )
    return config.model_copy(update={"method": PairConfig(rests_before=1)})


def create_trainer(config: RunConfig, world: World, telemetry: Telemetry) -> Trainer:
    config.output.mkdir(exist_ok=True)
    return Trainer(config, config.output, world, telemetry)


def main(dataset: Path, folder: Path) -> None:
    METHODS["pair"] = Pair
    with process_group() as world, Telemetry.serve(None) as telemetry:
        torch.set_num_threads(1)
        create_trainer(make_config(dataset, folder / "whole"), world, telemetry).run()
        config = make_config(dataset, folder / "interrupted")
        create_trainer(config, world, telemetry).run()
        trainer = create_trainer(config, world, telemetry)
        trainer.resume(find_checkpoint(config.output, 2))
        trainer.run()
        changes = {"compile": True, "precision": "fp32", "steps": 2}
        create_trainer(make_config(dataset, folder / "compiled", **changes), world, telemetry).run()
        changes["compile"] = False
        create_trainer(make_config(dataset, folder / "eager", **changes), world, telemetry).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
