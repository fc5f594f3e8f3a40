"""Audits what a snapshot and its tables say against themselves, and what lies beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from shards.audit.findings import Findings
from shards.audit.keys import Hashes, find_repeated_keys, hash_keys
from shards.dataset import load_snapshot, read_table
from shards.schema import TABLES, Counts, Snapshot, hf_tar_path, index_path
from shards.stores.store import BUILD_LOCK, Store
from shards.support.errors import DataError


def check_snapshot(snapshot: Snapshot, problems: Findings, remarks: Findings) -> None:
    """Check what a snapshot says against itself."""
    where, fix = f"snapshots/{snapshot.hash}.json", "restore an earlier snapshot, or build again"
    paths = [shard.path for shard in snapshot.shards]
    if paths != sorted(set(paths)):
        problems.add("snapshot", where, "its shards are not sorted, or one is named twice", fix=fix)
    for shard in snapshot.shards:
        folder, name = shard.path.split("/")
        if folder != shard.modality or name[: -len("-000000.tar")] != shard.source:
            problems.add("snapshot", shard.path, f"is called {shard.modality}/{shard.source}", fix=fix)
        for digest in shard.hf.keys() - snapshot.hf_versions.get(shard.modality, {}).keys():
            problems.add("hf_version", shard.path, f"HF version {digest} is not defined", fix=fix)
    if {shard.modality for shard in snapshot.shards} != set(snapshot.modalities):
        problems.add("snapshot", where, "its modalities are not those of its shards", fix=fix)
    for modality in snapshot.modalities:
        if not {modality} <= snapshot.hf.keys() & snapshot.hf_digests.keys():
            problems.add("snapshot", where, f"no HF parameters of {modality}", fix=fix)
    for modality, digest, _ in hf_versions_of(snapshot):
        lacking = [s.path for s in snapshot.shards if s.modality == modality and digest not in s.hf]
        if lacking:
            what = f"HF version {digest} lacks {len(lacking)} shards, the first one {lacking[0]}"
            remarks.add("hf_incomplete", modality, what, fix="run frepa shards rehf again")


def hf_versions_of(snapshot: Snapshot) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Modality, digest and parameters of the versions beside the shards."""
    for modality, versions in snapshot.hf_versions.items():
        for digest, params in versions.items():
            yield modality, digest, params


def read_tables(store: Store, snapshot: Snapshot, problems: Findings) -> dict[str, pa.Table]:
    """Read the tables of a snapshot that can be read."""
    tables = {}
    for name in TABLES:
        if name not in snapshot.tables:
            problems.add("table", name, "the snapshot names no such table", fix="build again")
            continue
        path = snapshot.tables[name].path
        try:
            tables[name] = read_table(store, snapshot, name)
        except DataError as error:
            problems.add("table", path, error.what, fix=error.fix)
        except pa.ArrowException as error:
            problems.add("table", path, f"cannot be read as parquet ({type(error).__name__})")
    return tables


def check_keys(store: Store, snapshot: Snapshot, hashes: Sequence[Hashes], problems: Findings) -> None:
    """Find keys that two samples of the dataset have; `hashes` are those of its shards, in order."""
    shards = [(store, shard) for shard in snapshot.shards]
    for key, numbers in find_repeated_keys(shards, hashes):
        paths = sorted({snapshot.shards[number].path for number in numbers})
        what = f"names {len(numbers)} samples, in {', '.join(paths)}"
        problems.add("duplicate_key", paths[0], what, key=key, fix="build into a fresh destination")


def check_accounting(snapshot: Snapshot, tables: dict[str, pa.Table], problems: Findings) -> None:
    """Check that each source's units add up, and that the snapshot counts what is in shards and tables."""
    where, fix = f"snapshots/{snapshot.hash}.json", "restore an earlier snapshot, or build again"
    in_shards: Counter[tuple[str, str]] = Counter()
    for shard in snapshot.shards:
        in_shards[shard.modality, shard.source] += shard.num_samples
    bad = _count(tables["quarantine"], "status")
    repeated = _count(tables["duplicates"], "source")
    skipped = _count(tables["duplicates"].filter(tables["duplicates"]["shard"].is_valid()), "source")
    sources = [(build.modality, build.source) for build in snapshot.builds]
    for name in sorted(set(in_shards) - set(sources)):
        problems.add("accounting", where, f"shards of {'/'.join(name)}, which no build accounts for", fix=fix)
    if len(set(sources)) != len(sources):
        problems.add("accounting", where, "a source is accounted for twice", fix=fix)
    for build in snapshot.builds:
        name = build.modality, build.source
        found = {
            "samples": in_shards[name] - skipped[(*name, build.source)],
            "quarantined": bad[(*name, "quarantined")],
            "excluded": bad[(*name, "excluded")],
            "duplicates": repeated[(*name, build.source)],
        }
        if not build.counts.is_closed:
            problems.add("accounting", where, f"units of {'/'.join(name)} do not add up", fix=fix)
        for what, number in found.items():
            claimed = getattr(build.counts, what)
            if number != claimed:
                text = f"{'/'.join(name)}: {number} {what} are found, {claimed} are claimed"
                problems.add("accounting", where, text, fix=fix)
    if sum((build.counts for build in snapshot.builds), Counts()) != snapshot.counts:
        problems.add("accounting", where, "the sources do not add up to the dataset", fix=fix)


def _count(table: pa.Table, column: str) -> Counter[tuple[str, ...]]:
    """Count rows by modality, source and another column."""
    names = ["modality", "source", column]
    return Counter(zip(*(table[name].to_pylist() for name in names), strict=True))


def check_originals(
    snapshot: Snapshot, tables: dict[str, pa.Table], hashes: Sequence[Hashes], problems: Findings
) -> None:
    """Check that what is left out is in no shard, and that what a duplicate repeats is accounted for."""
    if any(len(own) != shard.num_samples for own, shard in zip(hashes, snapshot.shards, strict=True)):
        return  # an index cannot be read: nothing can be said
    in_shards = np.concatenate([np.zeros(0, np.uint64), *hashes])
    left_out = hash_keys(tables["quarantine"]["key"])
    duplicates = tables["duplicates"]
    known = np.concatenate([in_shards, left_out, hash_keys(duplicates["key"])])
    path = snapshot.tables["duplicates"].path
    for number in np.flatnonzero(~np.isin(hash_keys(duplicates["duplicate_of"]), known)).tolist():
        row = duplicates.slice(number, 1).to_pylist()[0]
        what = f"repeats {row['duplicate_of']}, which is nowhere"
        problems.add("accounting", path, what, key=row["key"], fix="build again, or merge again")
    in_none = duplicates["key"].filter(duplicates["shard"].is_null())
    for keys, name in ((tables["quarantine"]["key"], "quarantine"), (in_none, "duplicates")):
        for number in np.flatnonzero(np.isin(hash_keys(keys), in_shards)).tolist():
            what = "is in a shard, though the table says that it is in none"
            key = keys[number].as_py()
            problems.add("accounting", snapshot.tables[name].path, what, key=key, fix="build again")


def list_unnamed(store: Store, audited: Snapshot, problems: Findings, remarks: Findings) -> None:
    """Remark on the files that no snapshot names; a snapshot that cannot be read is a problem."""
    named, others = {"dataset.json", BUILD_LOCK} | _named(audited), []
    for stored in store.list():
        if stored.path.startswith("snapshots/") and stored.path.endswith(".json"):
            digest = stored.path.removeprefix("snapshots/").removesuffix(".json")
            named.add(stored.path)
            if digest != audited.hash:
                try:
                    named |= _named(load_snapshot(store, digest))
                except DataError as error:
                    problems.add("snapshot", stored.path, error.what, fix=error.fix)
        others.append(stored)
    for stored in others:
        if stored.path not in named:
            what = f"no snapshot names these {stored.num_bytes} bytes: of an unfinished build, or not ours"
            remarks.add("unnamed_file", stored.path, what, fix="build again to go on, or delete it")


def _named(snapshot: Snapshot) -> set[str]:
    """Files of a snapshot."""
    tars = [shard.path for shard in snapshot.shards]
    tars += [hf_tar_path(shard.path, digest) for shard in snapshot.shards for digest in shard.hf]
    return {*tars, *map(index_path, tars), *(table.path for table in snapshot.tables.values())}
