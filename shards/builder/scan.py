"""Looks at objects for the plan: what each is, by its head; runs in threads, and in worker processes."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.builder.canonical import canonical_size
from shards.builder.objects import IDENTITY_BYTES, UNKNOWN_IDENTITY, content_identity, reading_object
from shards.builder.scan_files import cut_groups, group_path, read_group
from shards.builder.state import write_private
from shards.formats.common import RULES, Header, ReadOptions, Unreadable
from shards.formats.registry import claims_image, read_header
from shards.schema import canonical_json
from shards.stores.blobs import open_blob
from shards.stores.store import is_remote
from shards.support.progress import Progress
from shards.support.settings import Settings
from shards.workers.pool import run_tasks

SCAN_SCHEMA = pa.schema(
    [
        pa.field("identity", pa.binary(IDENTITY_BYTES), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # image, quarantined, excluded
        pa.field("reason", pa.string(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("num_units", pa.int32(), nullable=False),
        pa.field("stored_bytes", pa.int64(), nullable=False),  # estimate
        pa.field("is_volume", pa.bool_(), nullable=False),
        pa.field("series", pa.string()),  # private
        pa.field("place", pa.float64(), nullable=False),
        pa.field("patient", pa.string()),  # private
        pa.field("facts", pa.string(), nullable=False),  # a JSON object
    ]
)

REMOTE_THREADS = 64
LOCAL_THREADS = 4
_MIN_POOL_OBJECTS = 20_000  # fewer are scanned before worker processes have started

# Estimates, of what photographs, MRI and CT slices take at 512 px (tools/bench_codecs.py).
_COLOR_PIXEL, _GREY_PIXEL, _DEEP_PIXEL = 1.1, 0.5, 0.9
_BYTES_PER_PATCH = 2 + 16  # an index, and 4 x 4 cells of the response map
_BYTES_PER_SAMPLE = 4096  # tar headers and padding of four members, JSON

Run = Callable[[Callable[["ScanTask"], "ScanResult"], Iterable["ScanTask"]], Iterator["ScanResult"]]


class ScanOptions(Settings):
    """How objects are looked at.

    Attributes:
        read: how objects are read.
        size: canonical short side, for the estimate of what a unit takes.
        patch_size: likewise.
        keeps_deep: whether deep values are stored as such, likewise.
        roots: local folders that the sources lie in.
    """

    read: ReadOptions
    size: int
    patch_size: int
    keeps_deep: bool
    roots: tuple[str, ...]


@dataclass(frozen=True)
class ScanTask:
    """Some objects, rows of a table with name, uri, num_bytes, version and is_file."""

    number: int
    objects: pa.Table
    options: ScanOptions
    num_threads: int


@dataclass(frozen=True)
class ScanResult:
    """What was found, `SCAN_SCHEMA`, a row per object of the task."""

    number: int
    found: pa.Table


def scan_objects(
    objects: pa.Table, options: ScanOptions, jobs: int, kept: Path, run: Run | None = None
) -> pa.Table:
    """Look at every object; return `SCAN_SCHEMA`, in the order of the objects.

    Args:
        objects: rows of a table with name, uri, num_bytes, version and is_file.
        options: how.
        jobs: worker processes; few objects are looked at in this one.
        kept: folder for what is found of many objects, for the case that this is interrupted.
        run: runs the tasks of many objects elsewhere.

    Raises:
        EnvironmentFault: a place cannot be reached, or a worker died.
    """
    if objects.num_rows == 0:
        return SCAN_SCHEMA.empty_table()
    is_small = objects.num_rows < _MIN_POOL_OBJECTS
    if is_small:
        jobs, run = 1, None
    threads = max(LOCAL_THREADS, REMOTE_THREADS // jobs)
    groups = list(cut_groups(objects["name"]))
    paths: dict[int, Path] = {}
    results: dict[int, pa.Table] = {}
    for number, (start, end) in enumerate(groups if not is_small else ()):
        paths[number] = group_path(kept, objects.slice(start, end - start), options)
        if (found := read_group(paths[number], SCAN_SCHEMA, end - start)) is not None:
            results[number] = found
    tasks = (
        ScanTask(number, objects.slice(start, end - start), options, threads)
        for number, (start, end) in enumerate(groups)
        if number not in results
    )
    counts: Counter[str] = Counter()
    num_known = sum(found.num_rows for found in results.values())
    with Progress(objects.num_rows, "plan", unit="object", initial=num_known) as progress:
        for result in run(scan_group, tasks) if run else run_tasks(scan_group, tasks, jobs):
            results[result.number] = result.found
            if not is_small:
                write_private(paths[result.number], result.found)
            counts.update(reason for reason in result.found["reason"].to_pylist() if reason)
            progress.update(result.found.num_rows, note=count_text(counts))
    return pa.concat_tables(results[number] for number in range(len(groups)))


def count_text(counts: Counter[str]) -> str:
    """The most frequent reasons with their counts, for a line of progress."""
    shown = [f"{reason} {number}" for reason, number in counts.most_common(4)]
    return " ".join(shown + ["..."] * (len(counts) > len(shown)))


def scan_group(task: ScanTask) -> ScanResult:
    """Look at the objects of one task."""
    rows = task.objects.select(["name", "uri", "num_bytes", "version", "is_file"]).to_pylist()
    is_any_remote = any(is_remote(os.fsdecode(row["uri"])) for row in rows)
    num_threads = task.num_threads if is_any_remote else LOCAL_THREADS
    with warnings.catch_warnings(), ThreadPoolExecutor(num_threads) as pool:
        warnings.simplefilter("ignore")  # decoders' remarks on odd files; what matters becomes a reason
        found = list(pool.map(lambda row: _scan(row, task.options), rows))
    return ScanResult(task.number, pa.Table.from_pylist(found, schema=SCAN_SCHEMA))


def _scan(item: dict[str, Any], options: ScanOptions) -> dict[str, Any]:
    name, uri = os.fsdecode(item["name"]), os.fsdecode(item["uri"])
    row: dict[str, Any] = {
        "identity": UNKNOWN_IDENTITY,
        "status": "image",
        "reason": "",
        "format": "",
        "num_units": 1,
        "stored_bytes": 0,
        "is_volume": False,
        "series": None,
        "place": 0.0,
        "patient": None,
        "facts": "{}",
    }
    try:
        if not item["is_file"]:
            raise Unreadable("unreadable_file" if item["num_bytes"] < 0 else "not_an_image")
        blob = open_blob(uri, item["num_bytes"], item["version"])
        with reading_object(uri, options.roots):
            row["identity"] = content_identity(blob, item["version"])
            row |= _describe(read_header(blob, options.read), item["num_bytes"], options)
    except Unreadable as error:
        # a text file beside the images was never meant; a file called .png that is none is a loss to be seen
        is_rule = error.reason in RULES or (
            error.reason in ("zero_bytes", "not_an_image", "unsupported_format") and not claims_image(name)
        )
        row.update(status="excluded" if is_rule else "quarantined", reason=error.reason)
    return row


def _describe(header: Header, num_bytes: int, options: ScanOptions) -> dict[str, Any]:
    return {
        "format": header.format,
        "num_units": header.num_units,
        "stored_bytes": _estimate_stored_bytes(header, num_bytes, options),
        "is_volume": header.is_volume,
        "series": header.series,
        "place": header.place,
        "patient": header.patient,
        "facts": canonical_json(dict(header.facts)).decode(),
    }


def _estimate_stored_bytes(header: Header, num_bytes: int, options: ScanOptions) -> int:
    height, width = canonical_size(header.height, header.width, options.size)
    if header.format == "jpeg" and (height, width) == (header.height, header.width):
        image = num_bytes  # stays as it is
    else:
        per_pixel = _COLOR_PIXEL if header.channels == 3 else _GREY_PIXEL
        image = int(height * width * (_DEEP_PIXEL if header.is_deep and options.keeps_deep else per_pixel))
    tokens = height * width * _BYTES_PER_PATCH // options.patch_size**2
    return header.num_units * (image + tokens + _BYTES_PER_SAMPLE)
