"""Leakage: images of an evaluation that lie in the pretraining data too, or show a patient who is in them.

First the indices are searched, all of them: for the same bytes, the same pixels, the same patient, and for
samples whose difference hash is near. Then the pixels of the near ones are read and compared
(`shards.audit.patterns`), since hashes of one organ are near much too often. Memory holds the images'
fingerprints (60 KB each) and one block of samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.audit.evaluated import Evaluated, plan_tasks, read_evaluated, readings_of
from shards.audit.leakage_index import Hit, Kind, States, make_wanted, read_states, scan_index
from shards.audit.leakage_report import KINDS, Leak, LeakageReport, merge_reports
from shards.audit.patterns import Patterns, cut_frames, find_matches, make_patterns
from shards.audit.stored import (
    MOST_AT_ONCE,
    StoredImages,
    cut_blocks,
    image_names,
    plan_stored,
    read_samples,
    read_stored,
)
from shards.dataset import load_snapshot
from shards.read.kept import exclusion_rows
from shards.schema import ShardInfo, Snapshot
from shards.stores.store import Store, open_store
from shards.support.errors import ConfigError
from shards.support.progress import Progress
from shards.workers.pool import available_cores, run_tasks

MOST_NEAR = 1_000_000
"""Samples with near hashes that are read at most: 1.5 core-hours of PNG files."""

_SHARDS_AHEAD, _ROWS_AT_ONCE, _IMAGES_AT_ONCE = 64, 128, 2048
_POOL_FROM = 64  # images, below which workers cost more than they save


@dataclass(frozen=True)
class _NearTask:
    """Some samples of a shard whose pixels are to be compared."""

    store: Store
    number: int
    shard: ShardInfo
    rows: npt.NDArray[np.int64]


def find_leakage(
    place: Store | Path | str,
    files: Sequence[Path] | StoredImages,
    *,
    images: Path | str = "",
    snapshot: str | None = None,
    modalities: Collection[str] | None = None,
    states: Sequence[Path] = (),
    patients: Mapping[int, str] | None = None,
    most_near: int = MOST_NEAR,
    jobs: int = 0,
) -> LeakageReport:
    """Look for images of an evaluation in a dataset.

    Args:
        place: the dataset, a folder or `s3://bucket/prefix`.
        files: of the evaluation, pictures or volumes; or samples of another dataset.
        images: what to call them; names in the report are relative to it.
        snapshot: of the dataset, None for the current one.
        modalities: those to search, None for all.
        states: private folders of the builds: with their salt patients can be compared, with their plans the
            bytes of every file.
        patients: names by place of the file, as they were given to the build.
        most_near: how many samples with near hashes are read at most.
        jobs: worker processes, 0 for one per core.

    Raises:
        ConfigError: the dataset has no such modality, or a folder is no state.
        DataError: the dataset is damaged.
        EnvironmentFault: it cannot be reached, or that of the samples.
    """
    if isinstance(files, StoredImages) and len(files) > MOST_AT_ONCE:
        return merge_reports(
            find_leakage(
                place,
                block,
                images=images,
                snapshot=snapshot,
                modalities=modalities,
                states=states,
                most_near=most_near,
                jobs=jobs,
            )
            for block in cut_blocks(files)
        )
    store = open_store(place)
    found = load_snapshot(store, snapshot)
    searched = found.modalities if modalities is None else tuple(modalities)
    for name in searched:
        if name not in found.modalities:
            raise ConfigError(
                f"the dataset holds no '{name}'", where=store.uri, allowed=", ".join(found.modalities)
            )
    jobs = jobs or available_cores()
    known = read_states(states, found)
    evaluated, unreadable = _read_images(files, found, searched, jobs)
    excluded = exclusion_rows(store, found)
    shards = [i for i, shard in enumerate(found.shards) if shard.modality in searched]
    hits, near = _search_indices(store, found, shards, excluded, evaluated, patients or {}, known)
    rows = _choose(near, most_near)
    matches = _compare(store, found, rows, evaluated, jobs)
    names = image_names(files, images)
    num_near = sum(map(len, near.values()))
    num_compared = sum(map(len, rows.values()))
    not_checked = _not_checked(known, states, evaluated, patients or {}, num_near - num_compared)
    if isinstance(files, StoredImages):
        not_checked |= {"patient": "not checked of samples: their names are salted"}
    return LeakageReport(
        dataset=store.uri,
        snapshot=found.hash,
        images=str(images),
        modalities=tuple(searched),
        num_files=len(files),
        num_images=len(evaluated),
        unreadable={names[file]: why for file, why in sorted(unreadable.items())},
        num_plain=sum(not image.patterns[0].any() for image in evaluated),
        num_samples=sum(found.shards[i].num_samples - len(excluded.get(i, ())) for i in shards),
        num_near=num_near,
        num_compared=num_compared,
        unit="samples" if isinstance(files, StoredImages) else "files",
        not_checked=not_checked,
        found=_collect(hits, matches, found, evaluated, names),
    )


def _read_images(
    files: Sequence[Path] | StoredImages, snapshot: Snapshot, modalities: Collection[str], jobs: int
) -> tuple[list[Evaluated], dict[int, str]]:
    images: list[Evaluated] = []
    unreadable: dict[int, str] = {}
    if isinstance(files, StoredImages):
        with Progress(len(files), "evaluation images", unit="sample") as progress:
            for some in run_tasks(read_stored, plan_stored(files), jobs if len(files) >= _POOL_FROM else 1):
                images += some.images
                unreadable |= some.unreadable
                progress.update(len(some.images) + len(some.unreadable))
        return sorted(images, key=lambda image: image.file), unreadable
    tasks = plan_tasks(files, readings_of(snapshot, modalities))
    with Progress(len(files), "evaluation images", unit="file") as progress:
        for result in run_tasks(read_evaluated, tasks, jobs if len(files) >= _POOL_FROM else 1):
            images += result.images
            unreadable |= result.unreadable
            progress.update(len({image.file for image in result.images} | result.unreadable.keys()))
    return sorted(images, key=lambda image: (image.file, image.unit)), unreadable


_Rows = dict[int, npt.NDArray[np.int64]]


def _search_indices(
    store: Store,
    snapshot: Snapshot,
    shards: Sequence[int],
    excluded: Mapping[int, npt.NDArray[np.int64]],
    images: Sequence[Evaluated],
    patients: Mapping[int, str],
    states: States,
) -> tuple[list[tuple[int, Hit]], _Rows]:
    """Samples that are images, each with its shard; and rows with near hashes, by shard."""
    wanted = make_wanted(images, patients, states)
    hits: list[tuple[int, Hit]] = []
    near: _Rows = {}
    none = np.zeros(0, np.int64)

    def scan(number: int) -> tuple[list[Hit], npt.NDArray[np.int64]]:
        return scan_index(store, snapshot.shards[number], excluded.get(number, none), wanted)

    total = sum(snapshot.shards[i].num_samples for i in shards)
    with (
        Progress(total, "indices", unit="sample") as progress,
        ThreadPoolExecutor(available_cores()) as pool,
    ):
        for start in range(0, len(shards), _SHARDS_AHEAD):  # results do not pile up
            chunk = shards[start : start + _SHARDS_AHEAD]
            for number, (found, rows) in zip(chunk, pool.map(scan, chunk), strict=True):
                hits += [(number, hit) for hit in found]
                if len(rows):
                    near[number] = rows
                progress.update(snapshot.shards[number].num_samples)
    return hits, near


def _choose(near: _Rows, most: int) -> _Rows:
    """All rows, or `most` of them, evenly from everywhere."""
    total = sum(map(len, near.values()))
    if total <= most:
        return near
    kept, done = {}, 0
    for number, rows in near.items():
        places = np.arange(done, done + len(rows))
        chosen = rows[places * most // total != (places - 1) * most // total]
        done += len(rows)
        if len(chosen):
            kept[number] = chosen
    return kept


def _compare(
    store: Store, snapshot: Snapshot, near: _Rows, images: Sequence[Evaluated], jobs: int
) -> list[tuple[int, Hit, float, str]]:
    """Read the samples with near hashes and compare their patterns with those of the images."""
    total = sum(map(len, near.values()))
    if not total:
        return []
    given = np.stack([image.patterns for image in images])
    tasks = (
        _NearTask(store, number, snapshot.shards[number], rows[start : start + _ROWS_AT_ONCE])
        for number, rows in near.items()
        for start in range(0, len(rows), _ROWS_AT_ONCE)
    )
    found = []
    with Progress(total, "near samples", unit="sample") as progress:
        for task, keys, patterns in run_tasks(_read_near, tasks, jobs if total >= _POOL_FROM else 1):
            for start in range(0, len(given), _IMAGES_AT_ONCE):
                for match in find_matches(patterns, given[start : start + _IMAGES_AT_ONCE]):
                    row = int(task.rows[match.stored])
                    hit = Hit("near", start + match.given, row, keys[match.stored])
                    found.append((task.number, hit, match.correlation, match.how))
            progress.update(len(task.rows))
    return found


def _read_near(task: _NearTask) -> tuple[_NearTask, list[str], Patterns]:
    rows = list(read_samples(task.store, task.shard, task.rows))
    patterns = np.stack([make_patterns(cut_frames(pixels)) for _, pixels in rows])
    return task, [key for key, _ in rows], patterns


def _collect(
    hits: Sequence[tuple[int, Hit]],
    matches: Sequence[tuple[int, Hit, float, str]],
    snapshot: Snapshot,
    images: Sequence[Evaluated],
    names: Sequence[str],
) -> list[Leak]:
    """One leak of each image and kind; what is equal is not listed as near as well."""
    equal = {(hit.image, shard, hit.row) for shard, hit in hits if hit.kind != "patient"}
    near = [match for match in matches if (match[1].image, match[0], match[1].row) not in equal]
    rows = [*((shard, hit, None, "") for shard, hit in hits), *sorted(near, key=lambda match: -match[2])]
    counts = Counter((hit.image, hit.kind) for _, hit, _, _ in rows)
    leaks: dict[tuple[int, str], Leak] = {}
    for shard, hit, correlation, how in rows:
        image = images[hit.image]
        leaks.setdefault(
            (hit.image, hit.kind),
            Leak(
                file=names[image.file],
                unit=image.unit,
                kind=hit.kind,
                num_samples=counts[hit.image, hit.kind],
                key=hit.key,
                shard=snapshot.shards[shard].path,
                row=hit.row,
                correlation=correlation,
                how=how,
            ),
        )
    order = list(KINDS)
    return sorted(leaks.values(), key=lambda leak: (order.index(leak.kind), leak.file, leak.unit))


def _not_checked(
    known: States,
    states: Sequence[Path],
    images: Sequence[Evaluated],
    patients: Mapping[int, str],
    num_left: int,
) -> dict[Kind, str]:
    found: dict[Kind, str] = {}
    if not states:
        found["bytes"] = "checked for JPEG files that are stored as they came; of all with --state"
        found["patient"] = "not checked: names are salted, name the private folder with --state"
    else:
        if known.missing:
            found["bytes"] = f"not checked for {', '.join(known.missing)}: no --state has its plan"
        if not any(patients.get(image.file) or image.patient for image in images):
            found["patient"] = "not checked: the images name no patients (a column 'patient' in --labels)"
    if num_left:
        found["near"] = f"not checked for {num_left} samples with near hashes (--most-near)"
    return found
