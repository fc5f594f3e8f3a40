"""What a checkpoint costs training: seconds that it waits, beside the seconds that the write takes.

    python tools/bench_checkpoint.py --size base --precision bf16 --saves 5 --folder /some/disk

One process. A RetMAE run takes a checkpoint, goes on with steps while it is written, and takes the next when
it is there. Training waits for a copy to the host's memory; the first copy also asks the system for that
memory, so it is printed by itself. "Slowed" is what steps beside a write take longer than others.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from bench_train import make_config
from one_process import create_trainer, draw_shards, first_batch, late_step, one_process, synchronize

MB = 1e6


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from frepa_dist.runs import EVENTS, read_json_lines

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, one_process() as world:
        folder = Path(name)
        draw_shards(folder, 2 * arguments.batch)
        trainer = create_trainer(make_config("retmae", folder, arguments), world)
        batches, info = first_batch(trainer), late_step()

        def step() -> float:
            synchronize()
            start = time.perf_counter()
            trainer.stepper.run(batches, info)
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
    """Read the command line and measure."""
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
    run(arguments)


if __name__ == "__main__":
    main()
