"""Building shards: CPU time by stage and kind of source, growth with jobs, and 17.6 M images computed.

    python tools/bench_build.py [--images 200] [--rounds 3] [--cores 64] [--only KIND ...]
        [--jobs 1 2] [--grow KIND ...] [--grow-images 1500]

Sources are synthetic and lie in page cache. Stages are exclusive CPU time of one process, measured by timers
around the functions of the build itself; "other" is what is left of the process' time. With more jobs the
whole command is timed by the clock, the start of its workers and the publication included.

The statement for 17.6 M images takes the measured CPU time per image of three kinds for the modalities that
come in them (uncompressed DICOM for CT, NIfTI for MRI, JPEG for the others), machines of `--cores` cores,
and as limits what is assumed of S3 and the network: see `ASSUMED`.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
from bench_sources import KINDS

import shards.builder.objects
import shards.builder.samples
import shards.builder.series
import shards.builder.writer
import shards.stores.blobs
from shards.builder.build import BuildConfig, build_dataset, plan_build

SALT = "0123456789abcdef"
NUM_IMAGES = {"CT": 9_973_332, "MRI": 6_556_603, "others": 1_074_013}  # of Frepa's seven public modalities
KIND_OF = {"CT": "dicom ct 512", "MRI": "nifti.gz 256x256x40", "others": "jpeg 512"}
ASSUMED = {"network of a machine, Gbit/s": 10.0, "GETs a second on all prefixes": 5500.0}
"""5,500 GETs a second is what AWS's documentation promises for each prefix; a build may read many."""


class Stages:
    """Exclusive CPU time by stage; wraps functions where they are looked up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0
        self._restore: list[Callable[[], None]] = []

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        """Charge the time in `owner.name` to a stage, less what stages inside it take."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._stack.append(stage)
            try:
                return original(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        setattr(owner, name, timed)
        self._restore.append(lambda: setattr(owner, name, original))

    def _switch(self) -> None:
        now = time.process_time()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def end(self) -> None:
        """Put the functions back."""
        for restore in self._restore:
            restore()


def create_stages() -> Stages:
    """Timers around the build's own functions."""
    stages = Stages()
    for owner, name, stage in (
        (shards.stores.blobs.FileBlob, "head", "read"),
        (shards.stores.blobs.FileBlob, "read", "read"),
        (shards.builder.objects, "content_identity", "hash source"),
        (shards.builder.objects, "open_object", "decode"),
        (shards.builder.writer, "_decode", "decode"),
        (shards.builder.series.VolumeWindows, "prepare", "decode"),
        (shards.builder.series.VolumeWindows, "window", "decode"),
        (shards.builder.samples, "to_stored", "intensity, resize"),
        (shards.builder.samples, "resize_to_canonical", "intensity, resize"),
        (shards.builder.samples, "check_pixels", "checks, hashes"),
        (shards.builder.samples, "pixel_hash", "checks, hashes"),
        (shards.builder.samples, "dhash64", "checks, hashes"),
        (shards.builder.samples, "encode_hf_members", "HF"),
        (shards.builder.samples, "_encode", "encode"),
        (shards.builder.writer, "append_members", "write"),
        (shards.builder.writer, "file_crc32c", "write"),
        (shards.builder.writer, "_encode_index", "write"),
    ):
        stages.wrap(owner, name, stage)
    return stages


class Measured(NamedTuple):
    """One build in this process."""

    num_images: int
    plan_seconds: float
    cpu_seconds: float
    stages: dict[str, float]
    source_bytes: int
    stored_bytes: int
    num_objects: int


def build_once(source: Path, modality: str) -> Measured:
    """Build with one job, in this process, with timers."""
    files = [path for path in source.iterdir() if path.is_file()]
    with tempfile.TemporaryDirectory() as name:
        config = BuildConfig(
            modality=modality, salt=SALT, jobs=1, state=Path(name) / "state", shard_bytes=1 << 24
        )
        begin = time.process_time()
        plan_build([source], Path(name) / "dataset", config)
        planned = time.process_time()
        stages = create_stages()
        try:
            report = build_dataset([source], Path(name) / "dataset", config)
        finally:
            stages.end()
        total = time.process_time() - planned
    assert report.counts.samples == report.counts.units, report
    return Measured(
        report.counts.samples,
        planned - begin,
        total,
        dict(stages.seconds),
        sum(path.stat().st_size for path in files),
        report.num_bytes,
        len(files),
    )


def time_jobs(source: Path, modality: str, jobs: int) -> tuple[float, float]:
    """Images per second of the clock, and per CPU-second of all processes, of a whole build."""
    with tempfile.TemporaryDirectory() as name:
        config = BuildConfig(
            modality=modality, salt=SALT, jobs=jobs, state=Path(name) / "state", shard_bytes=1 << 24
        )
        begin, cpu = time.perf_counter(), used_cpu()
        counts = build_dataset([source], Path(name) / "dataset", config).counts
        assert counts.samples == counts.units, counts
        num = counts.samples
        return num / (time.perf_counter() - begin), num / (used_cpu() - cpu)


def used_cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def print_stages(rows: dict[str, Measured]) -> None:
    """Print milliseconds per image by stage."""
    names = ["read", "hash source", "decode", "intensity, resize", "checks, hashes", "HF", "encode", "write"]
    print(f"| source | images/s/core | plan | {' | '.join(names)} | other | KB in | KB stored |")
    print(f"|---|{'---:|' * (len(names) + 5)}")
    for kind, row in rows.items():
        per = 1000 / row.num_images
        parts = [row.stages.get(name, 0.0) for name in names]
        rest = row.cpu_seconds - sum(parts)
        cells = [row.plan_seconds * per, *(part * per for part in parts), rest * per]
        sizes = (
            f"{row.source_bytes / row.num_images / 1000:.0f} | {row.stored_bytes / row.num_images / 1000:.0f}"
        )
        rate = row.num_images / (row.cpu_seconds + row.plan_seconds)
        print(f"| {kind} | {rate:.0f} | {' | '.join(f'{cell:.2f}' for cell in cells)} | {sizes} |")


def print_statement(rows: dict[str, Measured], cores: int) -> None:
    """Print what 17.6 M images would take."""
    if not all(kind in rows for kind in KIND_OF.values()):
        return
    cpu = network = gets = stored = 0.0
    for group, num in NUM_IMAGES.items():
        row = rows[KIND_OF[group]]
        cpu += num * (row.cpu_seconds + row.plan_seconds) / row.num_images
        network += num * row.source_bytes / row.num_images
        stored += num * row.stored_bytes / row.num_images
        gets += 2 * num * row.num_objects / row.num_images  # a header for the plan, and the whole
    print(
        f"\n{sum(NUM_IMAGES.values()):,} images: {cpu / 3600:.0f} core-hours, {network / 1e12:.1f} TB read, "
        f"{stored / 1e12:.1f} TB written, {gets / 1e6:.0f} M GETs; computed, not run"
    )
    print(f"| machines of {cores} cores | CPU h | network h | GETs h | limit |\n|---:|---:|---:|---:|---|")
    rate = ASSUMED["network of a machine, Gbit/s"] / 8 * 1e9
    for machines in (1, 8, 64):
        hours = {
            "CPU": cpu / 3600 / cores / machines,
            "network": (network + stored) / rate / machines / 3600,
            "GETs": gets / ASSUMED["GETs a second on all prefixes"] / 3600,
        }
        limit = max(hours, key=lambda name: hours[name])
        print(f"| {machines} | {' | '.join(f'{value:.2f}' for value in hours.values())} | {limit} |")
    print(f"assumed: {', '.join(f'{name} {value:g}' for name, value in ASSUMED.items())}")


def measure_kind(kind: str, folder: Path, num: int, rounds: int) -> Measured:
    """Measure the stages of one kind: the build of median CPU time."""
    folder.mkdir()
    KINDS[kind].write(folder, num)
    build_once(folder, KINDS[kind].modality)  # imports and caches
    runs = sorted(
        (build_once(folder, KINDS[kind].modality) for _ in range(rounds)), key=lambda run: run.cpu_seconds
    )
    return runs[len(runs) // 2]


def measure_growth(kind: str, folder: Path, num: int, rounds: int, jobs: Sequence[int]) -> None:
    """Print how the whole command grows with jobs."""
    folder.mkdir()
    KINDS[kind].write(folder, num)
    rates: dict[int, list[tuple[float, float]]] = {count: [] for count in jobs}
    loads = []
    for _ in range(rounds):
        for count in jobs:
            loads.append(os.getloadavg()[0])
            rates[count].append(time_jobs(folder, KINDS[kind].modality, count))
    print(
        f"\n{num} images of {kind}, {os.cpu_count()} cores, load before each run "
        f"{min(loads):.1f}-{max(loads):.1f}\n| jobs | images/s by the clock | growth | images/CPU-s |"
        "\n|---:|---:|---:|---:|"
    )
    for count, values in rates.items():
        growth = statistics.median(v[0] / one[0] for v, one in zip(values, rates[jobs[0]], strict=True))
        clock, cpu = (statistics.median(value[i] for value in values) for i in (0, 1))
        print(f"| {count} | {clock:.0f} | {growth:.2f} | {cpu:.0f} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--grow", nargs="*", choices=list(KINDS), default=["dicom ct 512", "png 512"])
    parser.add_argument("--grow-images", type=int, default=1500)
    parser.add_argument("--cores", type=int, default=64, help="of a machine, in the statement")
    parser.add_argument("--only", nargs="*", choices=list(KINDS), default=list(KINDS))
    args = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        rows = {
            kind: measure_kind(kind, Path(name) / f"kind{i}", args.images, args.rounds)
            for i, kind in enumerate(args.only)
        }
        print("\nCPU milliseconds per image by stage, one process")
        print_stages(rows)
        print_statement(rows, args.cores)
        for i, kind in enumerate(args.grow if args.jobs else []):
            measure_growth(kind, Path(name) / f"grow{i}", args.grow_images, args.rounds, args.jobs)


if __name__ == "__main__":
    main()
