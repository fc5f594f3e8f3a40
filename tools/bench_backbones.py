"""Seconds per step and peak memory of each backbone, as MAE trains it and as Frepa does.

    python tools/bench_backbones.py                                          # small, on a CPU
    python tools/bench_backbones.py --names vit_base swin_base convnext_base --batch 16 --image-size 512 \
        --precision bf16 --modes plain compile checkpoint                    # full size, on a GPU

A step is that of `frepa pretrain`: targets, forward, backward, optimizer, teacher, with the method's default
settings (Frepa: with consistency, so its student sees every image twice). Each cell of the table is a process
of its own. Memory is the most that torch had allocated on a GPU; on a CPU it is by how much the process grew
from before the trainer was made, at its largest, which also counts what an allocator keeps.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIGS = {"mae": "frepa/mae_vit_b_17m", "frepa": "frepa/vit_b_17m"}
MODES = {
    "plain": [],
    "compile": ["train.compile=true"],
    "checkpoint": ["method.model.activation_checkpointing=true"],
    "channels_last": [],  # weights of convolutions, and with them what comes out of them
}
SMALL_NAMES = ["vit_tiny", "swin_pico", "swinv2_pico", "convnext_twin", "convnextv2_twin", "resnet10"]
FAILED = "CELL FAILED: "


def network_settings(method: str, name: str) -> list[str]:
    """How a method names a backbone: MAE chooses vision transformers by their size."""
    if method == "mae" and name.startswith("vit_"):
        return [f"method.model.size={name.removeprefix('vit_')}"]
    return [f"method.model.backbone={name}"]


def measure_cell(cell: dict[str, Any]) -> dict[str, float]:
    """Train some steps in this process; seconds of each, peak bytes, parameters of the student."""
    import torch
    from one_process import create_trainer, first_batch, late_step, one_process, synchronize

    from frepa_dist.config import RunConfig
    from frepa_dist.methods.registry import METHODS
    from shards.support.settings import load_settings

    config = load_settings(RunConfig, CONFIGS[cell["method"]], cell["settings"])
    with torch.device("meta"):
        student = METHODS[config.method.name].create_student(config.method)
    seconds = []
    with one_process() as world:
        on_gpu = world.device.type == "cuda"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        trainer = create_trainer(config, world)
        if cell["mode"] == "channels_last":
            trainer.submodules.student.module.to(memory_format=torch.channels_last)
        batches, info = first_batch(trainer), late_step()
        for number in range(cell["rounds"] + 2):
            start = time.perf_counter()
            trainer.stepper.run(batches, info)
            synchronize()
            if number > 1:  # the first two compile and warm up
                seconds.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        if on_gpu:
            peak = torch.cuda.max_memory_allocated()
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "peak_bytes": peak,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
    }


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure a cell in a process of its own; what stopped it is its result where it fails."""
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    said = [line for line in done.stderr.splitlines() if line.startswith(FAILED)]
    if not said:
        print(done.stderr, file=sys.stderr)
    return {"error": said[-1].removeprefix(FAILED) if said else f"exit code {done.returncode}"}


def format_row(name: str, method: str, mode: str, result: dict[str, Any]) -> str:
    """A line of the table."""
    if "error" in result:
        return f"| {name} | {method} | {mode} | {result['error'].splitlines()[0]} | | |"
    seconds = f"{result['seconds']:.3f} ({result['fastest']:.3f}-{result['slowest']:.3f})"
    size, memory = result["parameters"] / 1e6, result["peak_bytes"] / 2**20
    return f"| {name} | {method} | {mode} | {seconds} | {memory:,.0f} | {size:.1f} |"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", default=SMALL_NAMES)
    parser.add_argument("--methods", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--modes", nargs="+", default=["plain", "checkpoint"], choices=list(MODES))
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure every cell and print the table."""
    arguments = parse_arguments()
    if arguments.cell:
        try:
            print(json.dumps(measure_cell(json.loads(arguments.cell))))
        except Exception as error:  # the table says it in the cell
            print(f"{FAILED}{type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
            raise
        return

    from one_process import draw_shards

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        draw_shards(folder, 2 * arguments.batch)
        print(f"{arguments.image_size} pixels, batch {arguments.batch}, {arguments.precision}; ", end="")
        print(f"median of {arguments.rounds} steps (fastest-slowest)\n")
        print("| backbone | method | mode | seconds per step | peak memory, MiB | parameters, M |")
        print("|---|---|---|---|---|---|", flush=True)
        for name in arguments.names:
            for method in arguments.methods:
                for mode in arguments.modes:
                    settings = [
                        f"output={folder / 'run'}",
                        f"data.root={folder / 'shards'}",
                        "data.num_workers=0",
                        f"method.model.image_size={arguments.image_size}",
                        f"train.global_batch_size={arguments.batch}",
                        f"train.micro_batch_size={arguments.batch}",
                        f"train.precision={arguments.precision}",
                        "train.zero_stage=0",
                        *network_settings(method, name),
                        *MODES[mode],
                        *arguments.overrides,
                    ]
                    cell = {"method": method, "mode": mode, "settings": settings}
                    cell["rounds"] = arguments.rounds
                    print(format_row(name, method, mode, run_cell(cell)), flush=True)


if __name__ == "__main__":
    main()
