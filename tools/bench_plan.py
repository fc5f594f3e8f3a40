"""Planning at full size: seconds and memory to plan, keep and compare a source, and to find pixel duplicates.

    python tools/bench_plan.py [--objects 1000000] [--samples 17600000] [--samples-per-shard 2000]

The first part plans the objects of a source, CT slices in series of 200, in memory; their heads are made up,
and the time that this takes is not counted. The second part looks for samples of equal pixels in the indices
of a dataset without pixels, whose hashes are random but for a thousand repeats; the newest ninth of the
samples are candidates, as after the growth of a dataset. Index files have all columns of a real one, lie in
page cache, and take about 45 bytes of disk per sample below TMPDIR. Each part is a process of its own, and
"peak" is that of its memory, the interpreter and what it imports included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from bench_order import create_index

from shards.builder.growth import Outcomes, PlanContext, compare
from shards.builder.plan_files import load_parts, save_part
from shards.builder.repeats import SampleNumbers, find_repeats
from shards.builder.scan import SCAN_SCHEMA
from shards.builder.series_members import SeriesMembers
from shards.builder.sources import OBJECTS_SCHEMA
from shards.builder.state import Salt
from shards.dataset import encode_table
from shards.schema import ShardInfo, index_path
from shards.stores.store import LocalStore

SERIES_OBJECTS = 200
NUM_REPEATS = 1000
CHUNK_ROWS = 1 << 16  # made at once, so that Python's own objects do not enter the peak of memory
NEW_SHARE = 9  # one of so many samples is a candidate


def create_objects(start: int, stop: int) -> pa.Table:
    """Create the list of a source: DICOM files by patient, study and series."""
    chunks = [_create_chunk(begin, min(begin + CHUNK_ROWS, stop)) for begin in range(start, stop, CHUNK_ROWS)]
    return sort_by_name(pa.concat_tables(chunks))


def _create_chunk(start: int, stop: int) -> pa.Table:
    numbers = range(start, stop)
    names = [
        b"0/patient%07d/study1/series%02d/IM%08d.dcm" % (i // SERIES_OBJECTS, i // SERIES_OBJECTS % 7, i)
        for i in numbers
    ]
    columns = {
        "name": names,
        "uri": [b"s3://hospital-archive/ct/" + name[2:] for name in names],
        "num_bytes": np.full(len(names), 525_000),
        "version": [f"{i:032x}" for i in numbers],
        "is_file": np.ones(len(names), bool),
        "labels": ["{}"] * len(names),
        "patient": [None] * len(names),
    }
    return pa.table(columns, schema=OBJECTS_SCHEMA)


def sort_by_name(objects: pa.Table) -> pa.Table:
    """Sort objects as a listing is."""
    return objects.take(pc.sort_indices(objects["name"])).combine_chunks()


class MadeUpHeads:
    """Says what each object is, as if its head had been read.

    Attributes:
        seconds: what all calls took, which no benchmark counts.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, objects: pa.Table) -> pa.Table:
        """Describe rows of `OBJECTS_SCHEMA` as rows of `SCAN_SCHEMA`."""
        start = time.perf_counter()
        chunks = [
            self._describe(objects.slice(begin, CHUNK_ROWS))
            for begin in range(0, objects.num_rows, CHUNK_ROWS)
        ]
        found = pa.concat_tables([SCAN_SCHEMA.empty_table(), *chunks]).combine_chunks()
        self.seconds += time.perf_counter() - start
        return found

    def _describe(self, objects: pa.Table) -> pa.Table:
        num = objects.num_rows
        numbers = [int(name[-12:-4]) for name in objects["name"].to_pylist()]
        columns = {
            "identity": pa.array([number.to_bytes(16, "big") for number in numbers], pa.binary(16)),
            "status": ["image"] * num,
            "reason": [""] * num,
            "format": ["dicom"] * num,
            "num_units": np.ones(num, np.int32),
            "stored_bytes": np.full(num, 240_000),
            "is_volume": np.zeros(num, bool),
            "series": [f"1.2.840.113619.2.{number // SERIES_OBJECTS}" for number in numbers],
            "place": -np.asarray(numbers, np.float64),
            "patient": [f"P{number // SERIES_OBJECTS:07d}" for number in numbers],
            "facts": ['{"bits":12,"dicom_modality":"CT","slice_thickness_mm":1.0}'] * num,
        }
        return pa.table(columns, schema=SCAN_SCHEMA)


@contextmanager
def timed(what: str, heads: MadeUpHeads | None = None) -> Iterator[None]:
    """Print the seconds of a block, less those in which heads were made up."""
    before = heads.seconds if heads else 0.0
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start - ((heads.seconds if heads else 0.0) - before)
    print(f"{what}: {seconds:.2f} s")


def time_plan(num_objects: int) -> None:
    """Plan a source, write and read the plan, compare the source with it, and begin a task."""
    heads, salt = MadeUpHeads(), Salt(b"x" * 32)
    context = PlanContext(heads, salt, modality="ct", source="images", splits=(), shard_bytes=256 << 20)
    objects = create_objects(0, num_objects)
    print(f"{num_objects:,} objects; peak with their list: {peak_mib():.0f} MiB")
    with timed("plan", heads):
        part = compare(objects, [], Outcomes(), context).part
    assert part is not None
    print(f"  {part.num_units:,} units in {part.num_shards:,} shards; peak: {peak_mib():.0f} MiB")
    with tempfile.TemporaryDirectory() as folder:
        with timed("write the plan"):
            save_part(Path(folder), 0, part)
        with timed("read it"):
            parts = load_parts(Path(folder))
    with timed("compare with a source that has not changed", heads):
        growth = compare(objects, parts, Outcomes(), context)
    assert growth.part is None
    assert growth.num_known == num_objects
    num_more = max(1, num_objects // 100)
    more = sort_by_name(pa.concat_tables([objects, create_objects(num_objects, num_objects + num_more)]))
    with timed("compare with a source that has grown by 1 %", heads):
        assert compare(more, parts, Outcomes(), context).num_new == num_more
    with timed("look up a shard's objects and their series"):
        planned = part.planned_objects(0, salt, "ct", "images")
        assert SeriesMembers([part]).of(planned)
    print(f"peak of all: {peak_mib():.0f} MiB")


def write_indices(folder: Path, num_shards: int, samples_per_shard: int) -> list[ShardInfo]:
    """Write index files; the last hashes repeat the first ones."""
    rng, shards = np.random.default_rng(0), []
    template = create_index(samples_per_shard, rng)
    place = template.schema.get_field_index("pixel_hash")
    repeated = rng.bytes(16 * NUM_REPEATS)
    (folder / "ct").mkdir()
    for i in range(num_shards):
        own = rng.bytes(16 * samples_per_shard)
        if i == 0:
            own = repeated + own[len(repeated) :]
        elif i == num_shards - 1:
            own = own[: -len(repeated)] + repeated
        hashes = pa.array([own[start : start + 16].hex() for start in range(0, len(own), 16)], pa.string())
        data = encode_table(template.set_column(place, template.schema.field(place), hashes))
        path = f"ct/ct-{i:06d}.tar"
        (folder / index_path(path)).write_bytes(data)
        shards.append(
            ShardInfo(
                path=path,
                modality="ct",
                source="ct",
                num_samples=samples_per_shard,
                num_bytes=samples_per_shard * 120_000,
                crc32c=0,
                index_crc32c=google_crc32c.value(data),
            )
        )
    return shards


def time_repeats(folder: Path, shards: list[ShardInfo]) -> None:
    """Find the samples that repeat another one's pixels."""
    numbers = SampleNumbers(shards)
    num = numbers.num_samples
    candidates = np.arange(num - num // NEW_SHARE, num)
    print(f"{num:,} samples in {len(shards):,} shards; peak before: {peak_mib():.0f} MiB")
    with timed(f"find those of equal pixels among {len(candidates):,} new ones"):
        found = find_repeats(LocalStore(folder), numbers, np.zeros(0, np.int64), candidates)
    assert found.row.size == NUM_REPEATS
    print(f"peak of all: {peak_mib():.0f} MiB")


def peak_mib() -> float:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_alone(function: Callable[..., None], *args: Any) -> None:
    """Run a function in a process of its own, so that nothing else enters its peak of memory."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0, f"{function.__name__} failed"


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=17_600_000)
    parser.add_argument("--samples-per-shard", type=int, default=2000)
    args = parser.parse_args()
    num_shards = args.samples // args.samples_per_shard
    if args.samples_per_shard < NUM_REPEATS or num_shards < NEW_SHARE:
        parser.error(f"take shards of {NUM_REPEATS} samples or more, and {NEW_SHARE} shards or more")
    run_alone(time_plan, args.objects)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_indices(Path(folder), num_shards, args.samples_per_shard)
        run_alone(time_repeats, Path(folder), shards)


if __name__ == "__main__":
    main()
