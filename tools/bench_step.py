"""Step time of RetMAE over MAE: same batch, same model, one process, interleaved rounds of one run.

    python tools/bench_step.py --size base --precision bf16 --batch 16 --rounds 5

The teacher reads 25 % of the tokens; no auxiliary encoder. A step is targets, forward, backward, optimizer,
critic and teacher, by the trainer that `frepa pretrain` runs, after the warm-up of the MI term.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch


def write_images(folder: Path, num: int, side: int) -> None:
    """Noise over gradients: the content does not change the cost of a step."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(num):
        coarse = cv2.resize(rng.integers(0, 200, (9, 9, 3), dtype=np.uint8), (side, side))
        noise = rng.integers(0, 40, (side, side, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), coarse + noise)


def main() -> None:
    """Print median seconds per step of both methods and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny", choices=("tiny", "small", "base", "large"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    from cluster.launch import free_port
    from frepa_dist.config import RunConfig
    from frepa_dist.methods.base import StepInfo
    from frepa_dist.train.engines import process_group
    from frepa_dist.train.loop import Trainer
    from shards.builder.build import BuildConfig, build_dataset
    from shards.support.settings import load_settings
    from shards.support.telemetry import Telemetry

    os.environ["MASTER_PORT"] = str(free_port())
    with tempfile.TemporaryDirectory() as name, process_group() as world:
        folder = Path(name)
        write_images(folder / "images", 2 * arguments.batch, 256)
        build_dataset(
            [folder / "images"], folder / "shards", BuildConfig(modality="fundus", size=256, jobs=1)
        )
        trainers = {}
        for method in ("mae", "retmae"):
            settings = {
                "output": folder / method,
                "data.root": folder / "shards",
                "method.model.size": arguments.size,
                "train.precision": arguments.precision,
                "train.global_batch_size": arguments.batch,
                "train.micro_batch_size": arguments.batch,
                "train.steps": 1000,
                "train.zero_stage": 0,
            }
            config = load_settings(
                RunConfig, f"demo/{method}", [f"{key}={value}" for key, value in settings.items()]
            )
            trainers[method] = Trainer(config, folder / method, world, Telemetry())
        batches = [trainers["mae"].to_device(b) for b in next(trainers["retmae"].stream.batches(0, 0))]
        info = StepInfo(step=500, total_steps=1000, seed=0)  # past the MI term's warm-up
        seconds: dict[str, list[float]] = {method: [] for method in trainers}
        for number in range(arguments.rounds + 1):
            for method, trainer in trainers.items():
                start = time.perf_counter()
                trainer.stepper.run(batches, info)
                if world.device.type == "cuda":
                    torch.cuda.synchronize()
                if number:  # the first warms up
                    seconds[method].append(time.perf_counter() - start)
    medians = {method: statistics.median(values) for method, values in seconds.items()}
    print(
        f"ViT-{arguments.size}, {arguments.precision}, batch {arguments.batch}, {arguments.rounds} rounds: "
        + ", ".join(
            f"{method} {medians[method]:.3f} s ({min(values):.3f}-{max(values):.3f})"
            for method, values in seconds.items()
        )
        + f"; RetMAE / MAE {medians['retmae'] / medians['mae']:.2f}"
    )


if __name__ == "__main__":
    main()
