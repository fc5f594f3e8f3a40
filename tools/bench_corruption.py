"""Corruptions at 512 px: images per second on one core, of Frepa's way, of vectorized NumPy, and of ours.

    python tools/bench_corruption.py [--size 512] [--rounds 15] [--batches 1 8 16]

All ways run in the same process on the same images, in turn within each round, on one thread; the figures are
medians over rounds. A mixture is one half of each kind. "authors' way" is the plain NumPy of
`corruption_reference.py`: loops over tiles, normal numbers for each tile, whole complex transforms. Results
of more than 32 MB, such as those of a batch of 16, are new memory at each call, which costs about 1.5 ms an
image. "transforms alone" is torch's pair of real transforms, image by image.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frepa_dist.corruption import CorruptionConfig, corrupt
from frepa_dist.draws import SampleDraws
from tools import corruption_reference as reference

RATIO, STRENGTH, WIDTH = 0.625, 5e-4, 0.2  # middles of the ranges
TILE, CELL = 32, 16
AUTHORS = "authors' way"


def milliseconds(run: Callable[[], object], num_images: int) -> float:
    """Time one call, in milliseconds of processor time an image: what other processes take counts less."""
    run()  # the allocator's state is that of this way, as in a run, not of the one timed before
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1e3 / num_images


def ours(images: torch.Tensor, mode: str, kind: str, fill: str = "by_mode") -> Callable[[], object]:
    """Corrupt a batch with new draws at each call."""
    config = CorruptionConfig.model_validate(
        {
            "mode": mode,
            "fill": fill,
            "kinds": {kind: 1.0},
            "tile_ratio": (RATIO, RATIO),
            "cell_ratio": (RATIO, RATIO),
            "noise_width": (WIDTH, WIDTH),
        }
    )
    calls = iter(range(1 << 30))

    def run() -> object:
        first = next(calls) * len(images)
        return corrupt(images, SampleDraws(range(first, first + len(images)), "cpu"), config)

    return run


def create_ways(
    images: torch.Tensor, batches: list[int]
) -> dict[tuple[str, str], tuple[Callable[[], object], int]]:
    """List what is timed: (way, kind) -> (a call, how many images it corrupts)."""
    rng = np.random.default_rng(0)
    size = images.shape[-1]
    double = images[0].double().numpy()
    single = images[0].numpy()

    def plain_histogram() -> object:
        grid = size // TILE
        return reference.histogram_masking(double, rng.random((grid, grid)) < RATIO, TILE)

    def plain_frequency() -> object:
        grid = size // CELL
        cells = rng.random((grid, grid)) < RATIO
        cells[grid // 2 - 1 : grid // 2 + 1, grid // 2 - 1 : grid // 2 + 1] = False
        return reference.frequency_masking(double, cells, CELL, STRENGTH, WIDTH)

    ways: dict[tuple[str, str], tuple[Callable[[], object], int]] = {
        (AUTHORS, "histogram"): (plain_histogram, 1),
        (AUTHORS, "frequency"): (plain_frequency, 1),
        ("vectorized NumPy", "histogram"): (
            lambda: reference.vectorized_histogram_masking(single, RATIO, TILE, rng),
            1,
        ),
        ("vectorized NumPy", "frequency"): (
            lambda: reference.vectorized_frequency_masking(single, RATIO, CELL, STRENGTH, WIDTH, rng),
            1,
        ),
    }
    for batch in batches:
        for mode, fill in (("published", "tile"), ("hermitian", "zero"), ("hermitian", "tile")):
            for kind in ("histogram", "frequency"):
                name = f"{mode}, fill {fill}, batch {batch}"
                ways[name, kind] = (ours(images[:batch], mode, kind, fill), batch)
    ways["transforms alone", "frequency"] = (
        lambda: [torch.fft.irfft2(torch.fft.rfft2(image)) for image in images],
        len(images),
    )
    return ways


def main() -> None:
    """Time all ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    args = parser.parse_args()
    if args.size % TILE:
        parser.error(f"--size must be a multiple of {TILE}: the vectorized NumPy knows no cut tiles")
    torch.set_num_threads(1)
    images = torch.rand(
        max(args.batches), 3, args.size, args.size, generator=torch.Generator().manual_seed(0)
    )
    ways = create_ways(images, args.batches)
    times: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for round_ in range(args.rounds + 1):
        for way, (run, num_images) in ways.items():
            elapsed = milliseconds(run, num_images)
            if round_:  # the first round warms up
                times[way].append(elapsed)
    print(f"{args.size} px, 3 channels, one thread, processor time in ms an image, {args.rounds} rounds")
    head = ("way", "histogram", "frequency", "mixture", "images/s")
    print("{:32s} {:>10s} {:>10s} {:>9s} {:>9s}  speed-up".format(*head))
    medians = {way: float(np.median(values)) for way, values in times.items()}
    mixture = {
        name: (medians[name, "histogram"] + medians[name, "frequency"]) / 2
        for name, kind in ways
        if kind == "histogram"
    }
    for name, both in mixture.items():
        print(
            f"{name:32s} {medians[name, 'histogram']:10.2f} {medians[name, 'frequency']:10.2f} {both:9.2f} "
            f"{1e3 / both:9.1f} {mixture[AUTHORS] / both:7.1f}x authors', "
            f"{mixture['vectorized NumPy'] / both:.1f}x NumPy"
        )
    print(f"{'transforms alone':32s} {'':10s} {medians['transforms alone', 'frequency']:10.2f}")


if __name__ == "__main__":
    main()
