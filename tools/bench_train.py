"""Training steps of MAE, RetMAE and Frepa next to a plain PyTorch loop, in one process.

    python tools/bench_train.py --size base --precision bf16 --batch 16 --rounds 5
    python tools/bench_train.py --size large --batch 128 --rounds 20            # on a GPU

Steps: interleaved rounds on the same batch. A step is targets, forward, backward, optimizer, critic and
teacher, by the trainer that `frepa pretrain` runs, past all warm-ups, ZeRO 0. The plain loop trains the same
masked autoencoder (a test holds it to facebookresearch/mae) in fp32 with fused attention and fused AdamW.

MFU is counted operations x images per second / the matrix peak: `frepa_dist.models.cost` counts matrix
products, convolutions and attention, forward and backward; the peak is the fastest of several square matrix
products in the step's precision, measured here.

`--json FILE` writes the figures for `frepa plan --calibration FILE`.

Loading: then each method reads its batches through the loader, and the share of its time spent waiting for
data is shown, with the seconds of all phases.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from one_process import create_trainer, draw_shards, first_batch, late_step, one_process, synchronize

if TYPE_CHECKING:
    from frepa_dist.config import RunConfig
    from frepa_dist.train.loop import Trainer

CONFIGS = {"mae": "retmae/mae_vit_b", "retmae": "retmae/vit_b", "frepa": "frepa/vit_b_17m"}
SIZE_KEYS = {"mae": "method.model.size={}", "retmae": "method.model.size={}"}
SIZE_KEYS["frepa"] = "method.model.backbone=vit_{}"
PLAIN = "plain fp32 MAE"


def measure_peak(precision: str, device: torch.device) -> float:
    """Operations per second of the fastest square matrix product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best = 0.0
    for side in (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 3072):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        for _ in range(6):
            synchronize()
            start = time.perf_counter()
            a @ b
            synchronize()
            best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def plain_loop(config: RunConfig, batch: dict[str, Any], device: torch.device) -> Callable[[], None]:
    """A step of the same masked autoencoder without anything of ours around it."""
    from frepa_dist.methods.mae import normalize_images
    from frepa_dist.methods.registry import METHODS
    from frepa_dist.models.vit_mae import use_fused_attention

    model = METHODS["mae"].create_student(config.method).to(device)
    use_fused_attention(model, True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    images = normalize_images(batch, config.method.input)

    def step() -> None:
        loss = model(images, batch["mask_noise"], 0.75).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_config(method: str, folder: Path, arguments: argparse.Namespace) -> RunConfig:
    """A method's config at the size asked for, one rank, no accumulation."""
    from frepa_dist.config import RunConfig
    from shards.support.settings import load_settings

    settings = [
        f"output={folder / method}",
        f"data.root={folder / 'shards'}",
        f"data.num_workers={arguments.workers}",
        SIZE_KEYS[method].format(arguments.size),
        f"method.model.image_size={arguments.image_size}",
        f"train.precision={arguments.precision}",
        f"train.compile={arguments.compile}",
        f"train.global_batch_size={arguments.batch}",
        f"train.micro_batch_size={arguments.batch}",
        "train.epochs=null",
        "train.steps=1000",
        "train.zero_stage=0",
    ]
    return load_settings(RunConfig, CONFIGS[method], settings)


def measure_steps(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way's steps, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if number > 1:  # the first two compile and warm up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure_loading(trainer: Trainer, info: Any, rounds: int) -> dict[str, float]:
    """Seconds a step by phase, reading through the loader; `total` by the clock."""
    trainer.timer.take()
    batches = iter(trainer.stream.batches(0, 0))
    start = 0.0
    for number in range(rounds + 2):
        if number == 2:  # the loader has started
            synchronize()
            trainer.timer.take()
            start = time.perf_counter()
        with trainer.timer.phase("data"):
            on_device = [trainer.to_device(batch) for batch in next(batches)]
        trainer.stepper.run(on_device, info)
    synchronize()
    total = time.perf_counter() - start
    return {name: spent / rounds for name, spent in {**trainer.timer.take(), "total": total}.items()}


def describe_device(device: torch.device) -> str:
    """What computes."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU, {torch.get_num_threads()} threads"


def calibration(
    seconds: dict[str, list[float]],
    flops_per_image: dict[str, float],
    peak: float,
    device: str,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The figures as plain data, as `cluster.planning.calibration` reads them.

    Args:
        seconds: of each way's steps.
        flops_per_image: counted operations of the ways that are methods.
        peak: operations per second of the fastest matrix product.
        device: what computed.
        arguments: of the command line.
    """
    ways: dict[str, dict[str, Any]] = {}
    for way, values in seconds.items():
        rate = arguments.batch / statistics.median(values)
        ways[way] = {"seconds": values, "images_per_second": rate}
        if way in flops_per_image:
            ways[way] |= {"flops_per_image": flops_per_image[way]}
            ways[way] |= {"flops_per_second": rate * flops_per_image[way]}
    shape = {
        name: getattr(arguments, name) for name in ("size", "image_size", "precision", "batch", "compile")
    }
    return {"device": device, "torch": torch.__version__, "peak_flops": peak, **shape, "ways": ways}


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from frepa_dist.models.cost import count_cost

    with tempfile.TemporaryDirectory() as name, one_process() as world:
        folder = Path(name)
        draw_shards(folder, arguments.batch * (arguments.rounds + 2), max(256, arguments.image_size))
        peak = measure_peak(arguments.precision, world.device)
        configs = {method: make_config(method, folder, arguments) for method in arguments.methods}
        trainers = {method: create_trainer(config, world) for method, config in configs.items()}
        info = late_step()
        batches = first_batch(next(iter(trainers.values())))
        steps: dict[str, Callable[[], None]] = {
            method: lambda trainer=trainer: trainer.stepper.run(batches, info)
            for method, trainer in trainers.items()
        }
        if "mae" in configs:
            steps[PLAIN] = plain_loop(configs["mae"], batches[0], world.device)
        seconds = measure_steps(steps, arguments.rounds)
        print(
            f"ViT-{arguments.size}, {arguments.image_size} pixels, {arguments.precision}, batch "
            f"{arguments.batch}; matrix peak {peak / 1e12:.2f} TFLOP/s\n"
        )
        flops = {method: count_cost(config).total_flops for method, config in configs.items()}
        if arguments.json is not None:
            data = calibration(seconds, flops, peak, describe_device(world.device), arguments)
            arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print("| way | seconds per step | images/s | of plain | MFU |\n|---|---:|---:|---:|---:|")
        for way, values in seconds.items():
            median = statistics.median(values)
            rate = arguments.batch / median
            ratio = f"{median / statistics.median(seconds[PLAIN]):.2f}" if PLAIN in seconds else ""
            mfu = f"{flops[way] * rate / peak:.0%}" if way in configs else ""
            spread = f"{median:.3f} ({min(values):.3f} to {max(values):.3f})"
            print(f"| {way} | {spread} | {rate:.1f} | {ratio} | {mfu} |", flush=True)
        print()
        for method, trainer in trainers.items():
            phases = measure_loading(trainer, info, arguments.rounds)
            total = phases.pop("total")
            parts = ", ".join(f"{name} {spent:.3f}" for name, spent in phases.items())
            print(f"{method}, loading: waits for data {phases['data'] / total:.1%} of {total:.3f} s; {parts}")
        if world.device.type == "cuda":
            print(f"peak memory of all together: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="tiny", choices=("tiny", "small", "base", "large"))
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, help="file for the figures")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
