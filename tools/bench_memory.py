"""Memory that a training step takes, beside what `frepa cost` and `frepa plan` count for it.

    python tools/bench_memory.py                                        # small networks, CPU, fp32
    python tools/bench_memory.py --configs frepa/vit_b_17m retmae/vit_b --batches 8 32 --precision bf16  # GPU

Each cell is a process of its own: one rank of the trainer that `frepa pretrain` runs, three steps.

On a GPU: `torch.cuda.max_memory_allocated`, tensors at their peak. On the CPU: the bytes of all tensors that
stand between steps, and the most that a step makes beyond them (every operation is followed, forward,
backward and optimizer); beside it how much the process grew, which holds the allocator's slack and libraries'
workspaces too. With one rank ZeRO cuts nothing, so stages differ by masters and buckets alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_train import write_images

from cluster.launch import free_port

SMALL = ("retmae/mae_vit_b", "retmae/vit_b", "frepa/vit_b_17m")
SMALLER = {"method.model.size": "tiny", "method.model.backbone": "vit_tiny"}
MIB = 2**20
STEPS = 3


def standing_bytes() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def process_bytes(name: str) -> int:
    """A size of this process, `VmRSS` or its peak `VmHWM`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def measure_cell(cell: dict[str, Any]) -> dict[str, int]:
    """Take steps of one configuration; bytes counted and measured."""
    from frepa_dist.config import RunConfig
    from frepa_dist.methods.base import StepInfo
    from frepa_dist.models.cost import count_cost
    from frepa_dist.models.counters import LiveBytes
    from frepa_dist.train.engines import process_group
    from frepa_dist.train.loop import Trainer
    from shards.support.settings import load_settings
    from shards.support.telemetry import Telemetry

    os.environ["MASTER_PORT"] = str(free_port())
    config = load_settings(RunConfig, cell["config"], cell["settings"])
    counted = count_cost(config).memory
    found = {"counted standing": sum(counted.values()) - counted["activations"]}
    found["counted activations"] = counted["activations"]
    with process_group() as world:
        empty, small = standing_bytes(), process_bytes("VmRSS")
        trainer = Trainer(config, config.output, world, Telemetry())
        batches = [trainer.to_device(batch) for batch in next(trainer.stream.batches(0, 0))]
        info = StepInfo(step=500, total_steps=1000, seed=0)  # past all warm-ups
        for _ in range(STEPS - 1):
            trainer.stepper.run(batches, info)
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            trainer.stepper.run(batches, info)
            return found | {"measured": torch.cuda.max_memory_allocated()}
        found["process"] = process_bytes("VmHWM") - small
        standing = standing_bytes() - empty
        with LiveBytes() as alive:
            trainer.stepper.run(batches, info)
    return found | {"measured standing": standing, "measured": standing + alive.peak}


def run_cell(cell: dict[str, Any]) -> dict[str, int]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def settings_of(config: str, folder: Path, batch: int, arguments: argparse.Namespace) -> list[str]:
    """Overrides of a cell."""
    settings = [
        f"output={folder / 'run'}",
        f"data.root={folder / 'shards'}",
        "data.num_workers=0",
        "train.epochs=null",
        "train.steps=1000",
        f"train.global_batch_size={batch}",
        f"train.micro_batch_size={batch}",
        f"train.precision={arguments.precision}",
        f"train.zero_stage={arguments.stage}",
    ]
    if arguments.small:
        key = "method.model.backbone" if config.startswith("frepa/") else "method.model.size"
        settings += [f"{key}={SMALLER[key]}", "method.model.image_size=128"]
    return settings + arguments.overrides


def main() -> None:
    """Measure every cell and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", help="shipped configs at full size; default: small ones")
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--stage", type=int, default=1, choices=(0, 1, 2, 3))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.small = arguments.configs is None
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if arguments.cell:
        print(json.dumps(measure_cell(json.loads(arguments.cell))))
        return

    from shards.builder.build import BuildConfig, build_dataset

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_images(folder / "images", 2 * max(arguments.batches), 256)
        build_dataset(
            [folder / "images"], folder / "shards", BuildConfig(modality="fundus", size=256, jobs=1)
        )
        columns = None
        for config in arguments.configs or SMALL:
            for batch in arguments.batches:
                cell = {"config": config, "settings": settings_of(config, folder, batch, arguments)}
                found = run_cell(cell)
                counted = found["counted standing"] + found["counted activations"]
                if columns is None:
                    columns = list(found)
                    print(f"ZeRO {arguments.stage}, {arguments.precision}, MiB\n")
                    print(f"| config | batch | {' | '.join(columns)} | counted / measured |")
                    print(f"|---|---:|{'---:|' * (len(columns) + 1)}", flush=True)
                cells = " | ".join(f"{found[name] / MIB:,.0f}" for name in columns)
                print(f"| {config} | {batch} | {cells} | {counted / found['measured']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
