"""What monitoring costs training: calls of a step, steps with metrics and without, steps under a scraper.

    python tools/bench_telemetry.py --size base --batch 4 --rounds 40
    python tools/bench_telemetry.py --size large --batch 128 --rounds 200        # on a GPU

One process, RetMAE past all warm-ups. Calls: all that a step tells the telemetry, in a loop of its own, over
the median step. Steps: pairs of neighbors in one run, in turn with the telemetry served and without; the
median of their ratios and its standard error (by bootstrap) say whether there is a difference. Scraped: the
same, while another process asks for all metrics ten times a second, every second pair. `hf_share` and a log
line are measured by themselves, and shared out among the steps between two lines.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bench_train import make_config
from one_process import create_trainer, draw_shards, first_batch, one_process, synchronize

if TYPE_CHECKING:
    from frepa_dist.train.loop import Trainer

SCRAPE = """
import select, sys, time, urllib.request
is_on, seconds, size = False, [], 0
while True:
    if select.select([sys.stdin], [], [], 0)[0]:
        word = sys.stdin.readline().strip()
        if not word:
            break
        is_on = word == "on"
        print("ok", flush=True)
    if is_on:
        start = time.perf_counter()
        size = len(urllib.request.urlopen(sys.argv[1], timeout=60).read())
        seconds.append(time.perf_counter() - start)
    time.sleep(0.1)
print(len(seconds), size, sorted(seconds)[len(seconds) // 2] if seconds else 0, max(seconds, default=0))
"""


def timed(action: Callable[[], Any]) -> float:
    """Seconds of an action, and of what it left to the device."""
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def per_call(action: Callable[[], Any], times: int = 2000) -> float:
    """Seconds of one of many calls: the median of ten loops."""
    loops = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(times // 10):
            action()
        loops.append((time.perf_counter() - start) / (times // 10))
    return statistics.median(loops)


def describe_ratios(ratios: list[float]) -> str:
    """The median of ratios, as a difference, with its standard error."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (1000, len(ratios))), axis=1)
    return f"{statistics.median(ratios) - 1:+.2%} +- {medians.std():.2%}"


def tell_of_step(trainer: Trainer, batches: list[dict[str, Any]]) -> None:
    """All that the loop tells the telemetry in a step."""
    live = trainer.live
    for batch in batches:
        live.load(batch)  # type: ignore[arg-type]
    for phase in ("data", "targets", "forward", "backward", "opponents", "step", "checkpoint"):
        live.spend(phase, 0.1)
    live.train(len(batches[0]["key"]), trainer.ledger.counts)
    live.end_step(500, 0, 0.1)


def take_step(trainer: Trainer, batches: list[dict[str, Any]]) -> None:
    """A step as the loop takes it, on batches that are there, without a log line."""
    began = time.perf_counter()
    for batch in batches:
        trainer.live.load(batch)  # type: ignore[arg-type]
    trainer._take_step(batches)
    trainer.step = 500
    trainer.live.end_step(trainer.step, trainer.epoch, time.perf_counter() - began)


def measure_pairs(steps: dict[bool, Callable[[], None]], rounds: int) -> dict[bool, list[float]]:
    """Seconds of steps with and without, in turn; each comes first in every second pair."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 2):
        for is_on in (True, False) if number % 2 else (False, True):
            spent = timed(steps[is_on])
            if number > 1:  # the first two warm up
                seconds[is_on].append(spent)
    return seconds


def measure_scraped(step: Callable[[], None], port: int, rounds: int) -> str:
    """Steps while another process scrapes, beside steps while it rests."""
    command = [sys.executable, "-c", SCRAPE, f"http://127.0.0.1:{port}/metrics"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ratios = []
        for number in range(rounds // 2):
            spent = {}
            for is_on in (True, False) if number % 2 else (False, True):
                process.stdin.write("on\n" if is_on else "off\n")
                process.stdin.flush()
                process.stdout.readline()
                spent[is_on] = sum(timed(step) for _ in range(2))
            ratios.append(spent[True] / spent[False])
        process.stdin.close()
        count, size, median, most = process.stdout.read().split()
    return (
        f"{describe_ratios(ratios)} under {count} scrapes of {int(size) / 1000:.1f} kB, each of which took "
        f"{float(median) * 1000:.1f} ms ({float(most) * 1000:.0f} at most)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from frepa_dist.methods.mae import normalize_images, reconstruct, restored_images
    from frepa_dist.spectrum import detail_kept
    from frepa_dist.train.live import LiveMetrics
    from shards.support.telemetry import MetricsConfig, Telemetry

    with tempfile.TemporaryDirectory() as name, one_process() as world:
        folder = Path(name)
        draw_shards(folder, 2 * arguments.batch)
        config = make_config("retmae", folder, arguments)
        with Telemetry.serve(MetricsConfig(port=0), "train", {}) as telemetry:
            trainer = create_trainer(config, world, telemetry)
            batches = first_batch(trainer)
            lives = {True: trainer.live, False: LiveMetrics(Telemetry(), world, config.data)}

            def step(is_on: bool) -> None:
                trainer.live = lives[is_on]
                trainer.timer._heard = trainer.live.spend
                trainer.step = 500  # past all warm-ups
                take_step(trainer, batches)

            seconds = measure_pairs({on: lambda on=on: step(on) for on in (True, False)}, arguments.rounds)
            usual = statistics.median(seconds[False])
            step(True)
            calls = {}
            for is_on in (True, False):
                trainer.live = lives[is_on]
                calls[is_on] = per_call(lambda: tell_of_step(trainer, batches))
            trainer.live = lives[True]
            every = config.train.log_every
            trainer._log()
            record = dict(trainer._last_record)
            log = per_call(lambda: trainer.live.log(record), 200)
            images = normalize_images(batches[0], config.method.input)
            output = reconstruct(trainer.submodules.nets["student"], images, batches[0], config.method)
            share = statistics.median(
                timed(lambda: detail_kept(restored_images(output, images, config.method), images).nanmean())
                for _ in range(10)
            )
            print(
                f"ViT-{arguments.size}, batch {arguments.batch}, {arguments.precision}, {world.device}: ",
                end="",
            )
            print(f"a step takes {usual * 1000:.0f} ms; a log line every {every} steps")
            for title, spent in (
                ("calls of a step", calls[True]),
                ("the same, not served", calls[False]),
                ("a log line's gauges", log / every),
                ("hf_share", share / every),
            ):
                print(f"{title:<22}{spent * 1e6:9.1f} us a step, {spent / usual:.4%}")
            pairs = zip(seconds[True], seconds[False], strict=True)
            print(f"steps, metrics on / off {describe_ratios([on / off for on, off in pairs])}")
            assert telemetry.port is not None
            scraped = measure_scraped(lambda: step(True), telemetry.port, arguments.rounds)
            print(f"steps, scraped / not    {scraped}")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="tiny", choices=("tiny", "small", "base", "large"))
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    arguments.workers, arguments.compile = 0, False
    run(arguments)


if __name__ == "__main__":
    main()
