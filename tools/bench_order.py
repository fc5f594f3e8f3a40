"""The order of samples at full size: seconds and memory to plan an epoch, and to begin anywhere in it.

    python tools/bench_order.py [--world-size 256] [--global-batch-size 4096] [--samples-per-shard 2000]

A dataset without pixels: 17.8 M samples in nine modalities with weights, 1 % of them listed in the duplicates
table, snapshot and tables in the format of a real one. The index files are hard links to a few real ones, one
for each number of rows: opened, checked and parsed as any other.

A resumed run is timed from nothing each time: snapshot, exclusions, plan, the slots of a rank's first global
batch, and the index rows of the shards that they are in. "Memory" is the peak of the process.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.dataset import encode_table, load_snapshot, read_index, write_snapshot, write_table
from shards.read.kept import exclusion_rows
from shards.read.order import EpochPlan, OrderConfig, plan_epoch
from shards.schema import DUPLICATES_SCHEMA, INDEX_SCHEMA, Counts, ShardInfo, Snapshot, index_path
from shards.stores.store import LocalStore

SAMPLES = {  # of Frepa's pretraining set, which counts seven modalities
    "ct": 9_973_332,
    "mri": 6_556_603,
    "xray": 601_426,
    "ultrasound": 87_291,
    "oct": 123_608,
    "fundus": 163_291,
    "dermoscopy": 98_397,
    "histopathology": 100_000,
    "endoscopy": 100_000,
}
WEIGHTS = {"fundus": 4.0, "dermoscopy": 3.0, "ultrasound": 2.0, "mri": 0.9}
COLUMNS = [
    "key",
    *(f"{member}_{field}" for member in ("image", "hfmap") for field in ("offset", "size", "crc32c")),
    *("height", "width", "channels", "dtype", "image_ext"),
]
"""What reading a sample needs of its index row."""


def write_dataset(root: Path, samples_per_shard: int) -> None:
    """Write snapshot, tables and indices."""
    store, rng = LocalStore(root), np.random.default_rng(0)
    originals: dict[int, int] = {}  # rows of an index -> its checksum
    shards: list[ShardInfo] = []
    duplicates: dict[str, list[object]] = {name: [] for name in DUPLICATES_SCHEMA.names}
    for modality, num in SAMPLES.items():
        (root / modality).mkdir(parents=True)
        num_shards = -(-num // samples_per_shard)
        for i, rows in enumerate(np.diff(np.arange(num_shards + 1) * num // num_shards).tolist()):
            if rows not in originals:
                data = encode_table(create_index(rows, rng))
                (root / f"{rows}.parquet").write_bytes(data)
                originals[rows] = google_crc32c.value(data)
            path = f"{modality}/{modality}-{i:06d}.tar"
            os.link(root / f"{rows}.parquet", root / index_path(path))
            shards.append(
                ShardInfo(
                    path=path,
                    modality=modality,
                    source=modality,
                    num_samples=rows,
                    num_bytes=rows * 120_000,
                    crc32c=0,
                    index_crc32c=originals[rows],
                )
            )
            excluded = np.flatnonzero(rng.random(rows) < 0.01).tolist()
            for row in excluded:
                key = f"{modality}{i:06d}{row:06d}"
                values = (key, "x" * 16, "pixels", modality, modality, i, row, path, row)
                for column, value in zip(duplicates.values(), values, strict=True):
                    column.append(value)
    table = pa.table(duplicates, schema=DUPLICATES_SCHEMA)
    snapshot = Snapshot(
        created_by="tools/bench_order.py",
        modalities=sorted(SAMPLES),
        shards=sorted(shards, key=lambda shard: shard.path),
        hf={},
        hf_digests={},
        size=512,
        patch_size=16,
        map_cell=4,
        counts=Counts(units=sum(SAMPLES.values()), samples=sum(SAMPLES.values())),
        builds=[],
        tables={"duplicates": write_table(store, "duplicates", table)},
    )
    write_snapshot(store, snapshot, None)


def create_index(rows: int, rng: np.random.Generator) -> pa.Table:
    """Create an index of plausible values."""
    sizes = {"image": 150_000, "hf": 2_176, "hfmap": 9_000, "json": 200}
    columns: dict[str, object] = {"key": [f"{key:016x}" for key in rng.integers(1 << 62, size=rows).tolist()]}
    offset = np.arange(rows) * 170_000
    for member, typical in sizes.items():
        columns[f"{member}_offset"] = offset = offset + 512
        columns[f"{member}_size"] = rng.integers(typical // 2, typical, rows)
        columns[f"{member}_crc32c"] = rng.integers(1 << 32, size=rows).astype(np.uint32)
    texts = {
        "image_ext": "png",
        "dtype": "uint8",
        "labels": '{"grade": 2}',
        "pixel_hash": "",
        "patient": "p",
        "volume": "v",
    }
    for field in INDEX_SCHEMA:
        if field.name in columns:
            continue
        if field.name == "pixel_hash":
            columns[field.name] = [rng.bytes(16).hex() for _ in range(rows)]
        elif field.name in texts:
            columns[field.name] = [texts[field.name]] * rows
        else:
            columns[field.name] = rng.integers(512, size=rows).astype(field.type.to_pandas_dtype())
    return pa.table(columns).select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)


def resume(
    root: Path, config: OrderConfig, share: float, rank: int, world_size: int
) -> tuple[float, float, float, int]:
    """Begin at a place of the epoch, from nothing.

    Returns:
        Seconds; the part of them after snapshot and exclusions are loaded; CPU seconds; how many indices were
        read.
    """
    start, cpu = time.perf_counter(), time.process_time()
    snapshot = load_snapshot(root)
    excluded = exclusion_rows(root, snapshot)
    loaded = time.perf_counter()
    plan = create_plan(snapshot, excluded, config)
    slots = plan.rank_batch(int(share * (plan.num_batches - 1)), rank, world_size)
    touched = np.unique(slots.shard).tolist()
    for shard in touched:
        table = read_index(root, snapshot.shards[shard], COLUMNS)
        wanted = table.take(slots.row[slots.shard == shard])
        assert wanted.num_rows > 0
    end = time.perf_counter()
    return end - start, end - loaded, time.process_time() - cpu, len(touched)


def create_plan(
    snapshot: Snapshot, excluded: Mapping[int, NDArray[np.int64]], config: OrderConfig
) -> EpochPlan:
    """Plan epoch 0."""
    counts = [shard.num_samples for shard in snapshot.shards]
    modalities = [shard.modality for shard in snapshot.shards]
    return plan_epoch(counts, excluded, config, 0, modalities=modalities)


def peak_mib() -> float:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--global-batch-size", type=int, default=4096)
    parser.add_argument("--world-size", type=int, default=256)
    parser.add_argument("--samples-per-shard", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    config = OrderConfig(global_batch_size=args.global_batch_size, modality_weights=WEIGHTS)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "dataset"
        pid = os.fork()  # so that writing does not enter the peak
        if pid == 0:
            write_dataset(root, args.samples_per_shard)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, "writing the dataset failed"
        before = peak_mib()
        report(root, config, args.world_size, args.repeats)
        print(f"peak memory: {peak_mib():.0f} MiB, of it {before:.0f} MiB imports")


def report(root: Path, config: OrderConfig, world_size: int, repeats: int) -> None:
    """Print the figures of one dataset."""
    start = time.perf_counter()
    snapshot = load_snapshot(root)
    loaded = time.perf_counter()
    excluded = exclusion_rows(root, snapshot)
    listed = time.perf_counter()
    plan = create_plan(snapshot, excluded, config)
    planned = time.perf_counter()
    num = sum(shard.num_samples for shard in snapshot.shards)
    print(
        f"{num:,} samples in {len(snapshot.shards):,} shards of "
        f"{len(snapshot.modalities)} modalities, {sum(map(len, excluded.values())):,} excluded, weights "
        f"{config.modality_weights}: an epoch of {plan.num_samples:,} samples, {plan.num_batches:,} batches"
    )
    print(
        f"snapshot {loaded - start:.3f} s, exclusions {listed - loaded:.3f} s, plan {planned - listed:.3f} s"
    )
    places = (0.0, 0.25, 0.5, 0.9, 0.999)
    runs: dict[float, list[tuple[float, float, float, int]]] = {place: [] for place in places}
    for repeat in range(repeats + 1):  # in turn, so that a busy moment of the machine meets all places
        for place in places:
            run = resume(root, config, place, repeat * 37 % world_size, world_size)
            if repeat:  # the first one warms up
                runs[place].append(run)
    whole = {place: statistics.median(run[0] for run in runs[place]) for place in places}
    after = {place: statistics.median(run[1] for run in runs[place]) for place in places}
    cpu = {place: statistics.median(run[2] for run in runs[place]) for place in places}
    for place in places:
        indices = statistics.fmean(run[3] for run in runs[place])
        print(
            f"resumed at {100 * place:.1f} %: first batch of a rank after {whole[place]:.3f} s, of it "
            f"{1000 * after[place]:.0f} ms for the plan and {indices:.1f} indices"
        )
    by_clock, by_cpu = (max(times.values()) / min(times.values()) for times in (whole, cpu))
    print(f"slowest / fastest place: {by_clock:.2f} by the clock, {by_cpu:.2f} in CPU time")
    start = time.perf_counter()
    for k in range(plan.num_batches):
        plan.batch(k)
    print(f"all global batches of the epoch, all ranks: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
