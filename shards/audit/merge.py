"""Joins datasets: shards are copied as they are, tables and snapshot are made anew.

The result is what building all sources into one destination would have given, but for one thing: patients and
volumes are known by salted ids, so that those of datasets built with different salts cannot be matched.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa

from shards.audit.keys import Hashes, find_repeated_keys
from shards.audit.merge_shards import CopyTask, copy_shard, scan_shard
from shards.audit.merge_tables import Part, find_repeated_pixels, merge_tables, with_more_duplicates
from shards.dataset import has_dataset, load_snapshot, write_snapshot
from shards.schema import NAME_PATTERN, Counts, ShardInfo, Snapshot
from shards.stores.store import Store, open_store
from shards.support.errors import ConfigError, DataError
from shards.support.progress import Progress
from shards.workers.pool import available_cores, run_tasks

T = TypeVar("T")
R = TypeVar("R")

_MAX_NAMED = 3


@dataclass(frozen=True)
class MergeReport:
    """What was joined.

    Attributes:
        place: the destination.
        snapshot: its hash now.
        counts: its accounting now.
        added: sources that came in, each as "PLACE:MODALITY/SOURCE", and its samples.
        present: sources that were in it already.
        num_copied: shards.
        num_reused: shards that an interrupted run had copied.
        num_bytes: of the copied shards.
        num_duplicates: samples that repeat the pixels of an earlier source, and are excluded from now on.
        notes: what the user should know.
    """

    place: str
    snapshot: str
    counts: Counts
    added: dict[str, int] = field(default_factory=dict)
    present: tuple[str, ...] = ()
    num_copied: int = 0
    num_reused: int = 0
    num_bytes: int = 0
    num_duplicates: int = 0
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as text."""
        counts = ", ".join(f"{number} {name}" for name, number in self.counts)
        lines = [f"{self.place}: snapshot {self.snapshot}: {counts}"]
        lines += [f"  added {name}: {number} samples" for name, number in self.added.items()]
        lines += [f"  already there: {name}" for name in self.present]
        reused = f", {self.num_reused} were there" if self.num_reused else ""
        lines.append(f"  {self.num_copied} shards copied ({self.num_bytes / 1e6:.1f} MB){reused}")
        lines.append(f"  {self.num_duplicates} samples repeat the pixels of an earlier source: excluded")
        return lines + [f"  note: {note}" for note in self.notes]


def merge_datasets(
    sources: Sequence[Store | Path | str],
    dest: Store | Path | str,
    *,
    rename: Mapping[str, str] | None = None,
    jobs: int = 0,
) -> MergeReport:
    """Join datasets into a new or an existing one; interrupted, it goes on when called again.

    Args:
        sources: the datasets, in order: of samples with equal pixels, the first one stays.
        dest: where to; what is there comes before all sources.
        rename: new names of sources, by "PLACE:MODALITY/SOURCE", where two datasets use one name.
        jobs: worker processes, 0 for one per available core; it does not change the bytes.

    Raises:
        ConfigError: sizes or HF parameters differ, or names clash.
        DataError: a dataset is missing or damaged, or two hold the same key.
        EnvironmentFault: a place cannot be reached or written, or is being built.
    """
    target, stores = open_store(dest), [open_store(source) for source in sources]
    if target.uri in {store.uri for store in stores}:
        raise ConfigError(
            "the destination is one of the sources", where=target.uri, fix="leave it out of them"
        )
    snapshots = [load_snapshot(store) for store in stores]
    names = _parse_renames(rename or {}, stores, snapshots)
    datasets = list(zip(stores, snapshots, strict=True))
    _prepare(target, datasets, names)  # what can be found wrong is said before anything is written
    # a digest, since the owner may stay in a remote place, and paths of this machine are nobody's business
    owner = hashlib.sha256("\n".join(sorted(store.uri for store in stores)).encode()).hexdigest()[:16]
    with target.lock(f"merge {owner}"):
        return _merge(target, *_prepare(target, datasets, names), jobs)


def _prepare(
    target: Store, sources: Sequence[tuple[Store, Snapshot]], names: Mapping[tuple[str, str, str], str]
) -> tuple[Snapshot | None, list[Part], tuple[str, ...]]:
    """Return what is at the destination, the parts of the result, and the names of those that are there."""
    before = load_snapshot(target) if has_dataset(target) else None
    known = [] if before is None else [(target, before)]
    for store, snapshot in [*known, *sources]:
        accounted = {(build.modality, build.source) for build in snapshot.builds}
        if not {(shard.modality, shard.source) for shard in snapshot.shards} <= accounted:
            raise DataError(
                "it holds shards that no source accounts for", where=store.uri, fix="run frepa shards verify"
            )
    check_alike([*known, *sources])
    return before, *_choose_parts(known, sources, names)


def _merge(
    target: Store, before: Snapshot | None, parts: list[Part], present: tuple[str, ...], jobs: int
) -> MergeReport:
    """Check what the indices say, copy the new shards, then write tables and snapshot."""
    added = [part for part in parts if part.is_new]
    if not added and before is not None:
        return MergeReport(target.uri, before.hash, before.counts, present=present)
    shards = [(part, shard) for part in parts for shard in part.shards]
    places = [(part.store, shard) for part, shard in shards]
    scans = list(_run_in_order(scan_shard, places, [s.num_samples for _, s in shards], "compare", jobs))
    _check_keys(shards, [scan.keys for scan in scans])
    repeated = find_repeated_pixels(parts, scans)
    tasks = [
        CopyTask(part.store, shard, target, part.path_of(shard)) for part, shard in shards if part.is_new
    ]
    copied = list(_run_in_order(copy_shard, tasks, [t.shard.num_samples for t in tasks], "copy", jobs))
    after = _make_snapshot(target, before, parts, repeated)
    write_snapshot(target, after, before)
    fresh = [task for task, is_reused in zip(tasks, copied, strict=True) if not is_reused]
    return MergeReport(
        place=target.uri,
        snapshot=after.hash,
        counts=after.counts,
        added={part.name: sum(shard.num_samples for shard in part.shards) for part in added},
        present=present,
        num_copied=len(fresh),
        num_reused=len(tasks) - len(fresh),
        num_bytes=sum(task.shard.num_bytes for task in fresh),
        num_duplicates=len(repeated),
        notes=_make_notes(shards, [scan.has_patients for scan in scans]),
    )


def check_alike(datasets: Sequence[tuple[Store, Snapshot]]) -> None:
    """Check that datasets can be one: the same sizes, and per modality the same HF tokens.

    Raises:
        ConfigError: names the difference.
    """
    fix = "build both with the same settings"
    hf: dict[str, tuple[Store, Snapshot]] = {}
    for store, snapshot in datasets:
        first_store, first = datasets[0]
        for name in ("size", "patch_size", "map_cell"):
            one, other = getattr(first, name), getattr(snapshot, name)
            if one != other:
                raise ConfigError(
                    f"{name} is {other}, that of {first_store} is {one}", where=store.uri, fix=fix
                )
        for modality in snapshot.modalities:
            known_store, known = hf.setdefault(modality, (store, snapshot))
            if snapshot.hf_digests[modality] != known.hf_digests[modality]:
                one, other = known.hf[modality], snapshot.hf[modality]
                differing = sorted(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))
                said = ", ".join(f"{n} {other.get(n)} and {one.get(n)}" for n in differing)
                raise ConfigError(
                    f"HF tokens of {modality} differ from those of {known_store}: {said or 'their version'}",
                    where=store.uri,
                    fix=fix,
                )


def _parse_renames(
    rename: Mapping[str, str], stores: Sequence[Store], snapshots: Sequence[Snapshot]
) -> dict[tuple[str, str, str], str]:
    """New names by URI, modality and source."""
    names = {}
    present = {
        (store.uri, build.modality, build.source)
        for store, snapshot in zip(stores, snapshots, strict=True)
        for build in snapshot.builds
    }
    allowed = ", ".join(f"{uri}:{modality}/{source}" for uri, modality, source in sorted(present))
    for old, new in rename.items():
        match = re.fullmatch(r"(.+):([^:/]+)/([^:/]+)", old)
        key = (open_store(match[1]).uri, match[2], match[3]) if match else None
        if key is None or key not in present:
            raise ConfigError(f"no source '{old}' to rename", allowed=allowed)
        if not re.fullmatch(NAME_PATTERN, new):
            raise ConfigError(f"'{new}' is no name of a source", allowed="a-z, 0-9, - and _")
        names[key] = new
    return names


def _choose_parts(
    known: Sequence[tuple[Store, Snapshot]],
    sources: Sequence[tuple[Store, Snapshot]],
    names: Mapping[tuple[str, str, str], str],
) -> tuple[list[Part], tuple[str, ...]]:
    """The parts of the result in order, and the names of those that are in the destination already.

    Raises:
        ConfigError: two have the same name.
    """
    parts: dict[tuple[str, str], Part] = {}
    present = []
    for is_new, datasets in ((False, known), (True, sources)):
        for store, snapshot in datasets:
            for build in snapshot.builds:
                source = names.get((store.uri, build.modality, build.source), build.source)
                part = Part(store, snapshot, build, source, is_new)
                taken = parts.setdefault((build.modality, source), part)
                if taken is part:
                    continue
                if taken.content != part.content:
                    raise ConfigError(
                        f"the source {build.modality}/{source} is in {taken.store} too, with other samples",
                        where=store.uri,
                        fix=f"give it another name: --rename {part.name}=NEW",
                    )
                present.append(part.name)
    return list(parts.values()), tuple(present)


def _check_keys(shards: Sequence[tuple[Part, ShardInfo]], hashes: Sequence[Hashes]) -> None:
    repeated = find_repeated_keys([(part.store, shard) for part, shard in shards], hashes)
    found = next(repeated, None)
    if found is not None:
        key, numbers = found
        where = ", ".join(f"{shards[n][0].store}/{shards[n][1].path}" for n in numbers[:_MAX_NAMED])
        num_more = sum(1 for _ in repeated)
        raise DataError(
            f"they hold the same key {key}" + (f" and {num_more} more" if num_more else ""),
            where=where,
            fix="the same objects were built into both with the same state: merge one of them only",
        )


def _run_in_order(
    function: Callable[[T], R], items: Sequence[T], sizes: Sequence[int], description: str, jobs: int
) -> Iterator[R]:
    """Apply a function in parallel; results in the order of the items."""
    results: dict[int, R] = {}
    with Progress(sum(sizes), description, unit="sample") as progress:
        useful = -(-len(items) // 8)  # a process takes a second to start
        jobs = max(1, min(jobs or min(available_cores(), useful), len(items)))
        for number, result in run_tasks(_Numbered(function), enumerate(items), jobs):
            results[number] = result
            progress.update(sizes[number])
    yield from (results[number] for number in range(len(items)))


@dataclass(frozen=True)
class _Numbered(Generic[T, R]):
    """A function of numbered items, for worker processes."""

    function: Callable[[T], R]

    def __call__(self, item: tuple[int, T]) -> tuple[int, R]:
        return item[0], self.function(item[1])


def _make_snapshot(
    target: Store, before: Snapshot | None, parts: Sequence[Part], repeated: pa.Table
) -> Snapshot:
    """Write the tables; return the snapshot of all parts."""
    snapshots = [part.snapshot for part in parts]
    builds = [with_more_duplicates(part, repeated) for part in parts]
    hf = {name: params for snapshot in reversed(snapshots) for name, params in snapshot.hf.items()}
    versions: dict[str, dict[str, dict[str, Any]]] = {}
    for snapshot in snapshots:
        for modality, own in snapshot.hf_versions.items():
            versions.setdefault(modality, {}).update(own)
    shards = [
        shard.model_copy(update={"path": part.path_of(shard), "source": part.source})
        for part in parts
        for shard in part.shards
    ]
    return Snapshot(
        created_by=f"frepa {importlib.metadata.version('frepa')}",
        modalities=sorted({build.modality for build in builds}),
        shards=sorted(shards, key=lambda shard: shard.path),
        hf=hf,
        hf_digests={name: d for snapshot in reversed(snapshots) for name, d in snapshot.hf_digests.items()},
        hf_versions=versions,
        size=snapshots[0].size,
        patch_size=snapshots[0].patch_size,
        map_cell=snapshots[0].map_cell,
        counts=sum((build.counts for build in builds), Counts()),
        builds=builds,
        tables=merge_tables(target, parts, repeated),
    )


def _make_notes(shards: Sequence[tuple[Part, ShardInfo]], has_patients: Sequence[bool]) -> tuple[str, ...]:
    places = {part.store.uri for (part, _), has in zip(shards, has_patients, strict=True) if has}
    if len(places) < 2:
        return ()
    return (
        f"{len(places)} of the datasets know patients, by salted ids: where they were built with different "
        "salts, one patient has several ids, so that a split by patient may have the same one on both sides",
    )
