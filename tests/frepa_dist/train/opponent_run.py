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

from frepa_dist.methods.registry import METHODS
from frepa_dist.runs import find_checkpoint
from frepa_dist.train.engines import process_group
from tests.frepa_dist.train.adversarial_method import Pair, PairConfig
from tests.frepa_dist.train.small_runs import create_trainer, make_config, with_train


def main(dataset: Path, folder: Path) -> None:
    METHODS["pair"] = Pair
    whole = make_config(dataset, folder / "whole", PairConfig(rests_before=1), opponent={"zero_stage": 1})
    with process_group() as world:
        torch.set_num_threads(1)
        create_trainer(whole, world).run()
        config = whole.model_copy(update={"output": folder / "interrupted"})
        create_trainer(config, world).run()
        trainer = create_trainer(config, world)
        trainer.resume(find_checkpoint(config.output, 2))
        trainer.run()
        for name, is_compiled in (("compiled", True), ("eager", False)):
            short = with_train(whole, compile=is_compiled, precision="fp32", steps=2)
            create_trainer(short.model_copy(update={"output": folder / name}), world).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
