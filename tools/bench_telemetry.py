"""What monitoring costs training: calls of a step, steps with metrics and without, steps under a scraper.

    python tools/bench_telemetry.py --size base --batch 4 --rounds 40
    python tools/bench_telemetry.py --size large --batch 128 --rounds 200        # on a GPU

One process, RetMAE past all warm-ups, without loading. Calls: all that a step tells the telemetry, in a loop
of its own. hf_share and the gauges of a log line are shared out among the steps between two lines. Steps:
pairs of neighbors in one run, with the telemetry served and not, then with another process that asks for all
metrics ten times a second and with it resting: the median of the pairs' ratios, less 1, and its standard
error by bootstrap. By two clocks: that of the wall, and processor time of this process, which other programs
on the machine disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
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
print(len(seconds), size, sorted(seconds)[len(seconds) // 2] if seconds else 0)
"""


SCRAPE_SECONDS = 15  # between two of the shipped Prometheus' scrapes


class Spent(NamedTuple):
    """Seconds by the clock, and of this process's threads on processors."""

    wall: float
    processor: float


def timed(action: Callable[[], Any], times: int = 1) -> Spent:
    """What an action takes, and what it leaves to the device; the mean of some calls in a row."""
    synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(times):
        action()
    synchronize()
    return Spent((time.perf_counter() - wall) / times, (time.process_time() - processor) / times)


def per_call(action: Callable[[], Any], times: int = 200) -> float:
    """Seconds of processors for one of many calls: the median of ten loops."""
    return statistics.median(timed(action, times).processor for _ in range(10))


def compare(pairs: Sequence[tuple[Spent, Spent]]) -> str:
    """By how much the first of pairs take longer: the median, with its standard error, of both clocks."""
    rng, said = np.random.default_rng(0), []
    for clock in Spent._fields:
        ratios = [getattr(one, clock) / getattr(other, clock) for one, other in pairs]
        medians = np.median(rng.choice(ratios, (1000, len(ratios))), axis=1)
        said.append(f"{clock} {statistics.median(ratios) - 1:+.2%} +- {medians.std():.2%}")
    return ", ".join(said)


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


def measure_pairs(
    step: Callable[[], None], switch: Callable[[bool], None], rounds: int
) -> list[tuple[Spent, Spent]]:
    """Steps with something on and off, in turn; each comes first in every second pair."""
    pairs = []
    for number in range(rounds):
        spent = {}
        for is_on in (True, False) if number % 2 else (False, True):
            switch(is_on)
            spent[is_on] = timed(step)
        pairs.append((spent[True], spent[False]))
    return pairs


@contextmanager
def scraper(port: int) -> Iterator[tuple[Callable[[bool], None], list[str]]]:
    """A process that scrapes while it is switched on; the list holds what it says at the end."""
    command = [sys.executable, "-c", SCRAPE, f"http://127.0.0.1:{port}/metrics"]
    said: list[str] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        sending, hearing = process.stdin, process.stdout

        def switch(is_on: bool) -> None:
            sending.write("on\n" if is_on else "off\n")
            sending.flush()
            hearing.readline()

        yield switch, said
        sending.close()
        said.extend(hearing.read().split())


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from frepa_dist.methods.base import StepInfo
    from frepa_dist.methods.mae import masked_detail, normalize_images, reconstruct
    from frepa_dist.train.live import LiveMetrics
    from shards.support.telemetry import MetricsConfig, Telemetry

    with tempfile.TemporaryDirectory() as name, one_process() as world:
        folder = Path(name)
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        draw_shards(folder, 2 * arguments.batch)
        config = make_config("retmae", folder, arguments)
        with Telemetry.serve(MetricsConfig(port=0), "train", {}) as telemetry:
            trainer = create_trainer(config, world, telemetry)
            batches = first_batch(trainer)
            lives = {True: trainer.live, False: LiveMetrics(Telemetry(), world, config.data)}

            def serve(is_on: bool) -> None:
                trainer.live = lives[is_on]
                trainer.timer._heard = trainer.live.spend

            def step() -> None:
                trainer.step = 500  # past all warm-ups
                take_step(trainer, batches)

            for _ in range(3):
                step()
            served = measure_pairs(step, serve, arguments.rounds)
            usual = statistics.median(off.processor for _, off in served)
            calls = {}
            for is_on in (True, False):
                serve(is_on)
                calls[is_on] = per_call(lambda: tell_of_step(trainer, batches))
            serve(True)
            every = config.train.log_every
            trainer._log()
            record = dict(trainer._last_record)
            log = per_call(lambda: trainer.live.log(record))
            images = normalize_images(batches[0], config.method.input)
            output = reconstruct(trainer.submodules.nets["student"], images, batches[0], config.method)
            logged = StepInfo(step=500, total_steps=1000, seed=0, is_logged=True)
            share = per_call(lambda: masked_detail(output, images, config.method, logged), 2)
            assert telemetry.port is not None
            with scraper(telemetry.port) as (switch, said):
                scraped = measure_pairs(step, switch, arguments.rounds)
            with scraper(telemetry.port) as (switch, alone):
                switch(True)
                idle = timed(lambda: time.sleep(3)).processor
        wall = statistics.median(off.wall for _, off in served)
        print(
            f"ViT-{arguments.size}, {arguments.image_size} pixels, batch {arguments.batch}, "
            f"{arguments.precision}, {world.device}: a step takes {wall * 1000:.0f} ms by the clock, "
            f"{usual * 1000:.0f} ms of processors; a log line every {every}"
        )
        for title, spent in (
            ("calls of a step", calls[True]),
            ("calls, not served", calls[False]),
            ("gauges of a log line", log / every),
            ("hf_share", share / every),
        ):
            print(f"{title:<22}{spent * 1e6:9.1f} us a step: {spent / usual:.3%}")
        print(f"steps, served / not     {compare(served)}")
        print(f"steps, scraped / not    {compare(scraped)}")
        each, seconds = idle / int(alone[0]), float(said[2])
        print(
            f"a scrape of {int(said[1]) / 1000:.1f} kB is answered in {seconds * 1000:.1f} ms beside training"
        )
        share = each / SCRAPE_SECONDS
        print(f"it takes {each * 1000:.2f} ms of processors: {share:.3%} of one at one in {SCRAPE_SECONDS} s")


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
    parser.add_argument("--threads", type=int, help="of torch; default: one per core")
    arguments = parser.parse_args()
    arguments.workers, arguments.compile = 0, False
    run(arguments)


if __name__ == "__main__":
    main()
