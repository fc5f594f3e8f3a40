"""What a checkpoint costs training: seconds that it waits, beside the seconds that the write takes.

    python tools/bench_checkpoint.py --size base --precision bf16 --saves 5 --folder /some/disk

One process. A RetMAE run takes a checkpoint, goes on with steps while it is written, and takes the next when
it is there. Training waits for a copy to the host's memory; the first copy also asks the system for that
memory, so it is printed by itself. "Slowed" is what steps beside a write take longer than others.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from bench_train import make_config, synchronize, write_images

MB = 1e6


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from frepa_dist.methods.base import StepInfo
    from frepa_dist.runs import EVENTS, read_json_lines
    from frepa_dist.train.engines import process_group
    from frepa_dist.train.loop import Trainer
    from shards.builder.build import BuildConfig, build_dataset
    from shards.support.telemetry import Telemetry

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, process_group() as world:
        folder = Path(name)
        write_images(folder / "images", 2 * arguments.batch, 256)
        build_dataset(
            [folder / "images"], folder / "shards", BuildConfig(modality="fundus", size=256, jobs=1)
        )
        config = make_config("retmae", folder, arguments)
        (folder / "retmae").mkdir()
        trainer = Trainer(config, folder / "retmae", world, Telemetry())
        batches = [trainer.to_device(batch) for batch in next(trainer.stream.batches(0, 0))]

        def step() -> float:
            synchronize()
            start = time.perf_counter()
            trainer.stepper.run(batches, StepInfo(step=500, total_steps=1000, seed=0))
            synchronize()
            return time.perf_counter() - start

        alone = [step() for _ in range(6)][2:]
        beside: list[float] = []
        for number in range(arguments.saves):
            trainer.step = number + 1
            trainer.save()
            thread = trainer.checkpoints._thread
            while thread is not None and thread.is_alive():
                beside.append(step())
        trainer.checkpoints.finish()
        made = [
            event for event in read_json_lines(folder / "retmae" / EVENTS) if event["event"] == "checkpoint"
        ]
        first, *others = made
        print(f"RetMAE, ViT-{arguments.size}, {arguments.precision}: {first['bytes'] / MB:.0f} MB")
        for title, events in (("first", [first]), ("others", others)):
            waited = statistics.median(event["waited_seconds"] for event in events)
            seconds = statistics.median(event["seconds"] for event in events)
            print(f"{title:<7} waited {waited:.3f} s of {seconds:.2f} s: {waited / seconds:.1%}")
        usual, ratio = statistics.median(alone), statistics.median(beside) / statistics.median(alone)
        print(f"slowed  a step takes {usual:.2f} s alone, {ratio:.2f} times that beside a write")


def main() -> None:
    """Read the command line and join a process group of one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="base", choices=("tiny", "small", "base", "large"))
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the folder for temporary files")
    arguments = parser.parse_args()
    arguments.workers, arguments.compile = 0, False
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from cluster.launch import free_port

    os.environ["MASTER_PORT"] = str(free_port())
    run(arguments)


if __name__ == "__main__":
    main()
