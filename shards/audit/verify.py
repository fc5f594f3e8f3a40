"""Audits a dataset: is everything there that its snapshot names, whole, and does the accounting close.

Damage is reported, all of it; a store that cannot be reached is an error, since nothing can be said then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pydantic import ValidationError

from shards.audit.findings import Findings, VerifyReport
from shards.audit.keys import Hashes
from shards.audit.verify_shard import ShardCheck, ShardFindings, check_shard
from shards.audit.verify_snapshot import (
    check_accounting,
    check_keys,
    check_originals,
    check_snapshot,
    hf_versions_of,
    list_unnamed,
    read_tables,
)
from shards.dataset import load_snapshot
from shards.hf.tokens import HFParams
from shards.schema import TABLES, Snapshot
from shards.stores.store import Store, is_remote, open_store
from shards.support.errors import DataError
from shards.support.progress import Progress
from shards.workers.pool import available_cores, run_tasks

_REMOTE_ATTEMPTS = 3


def verify_dataset(
    place: Store | Path | str, *, deep: bool = False, snapshot: str | None = None, jobs: int = 0
) -> VerifyReport:
    """Audit a dataset.

    Args:
        place: a folder, or s3://bucket/prefix.
        deep: read every tar, decode every image, compute every HF token afresh; else only what the snapshot,
            the tables, the indices and the sizes of the tars say.
        snapshot: hash of the state to audit, None for the current one.
        jobs: worker processes, 0 for one per available core; of a remote dataset, more than cores pay.

    Raises:
        EnvironmentFault: the place cannot be reached.
    """
    store = open_store(place)
    problems, remarks = Findings(), Findings()
    current = _load(store, None, problems)
    audited = current if snapshot is None else _load(store, snapshot, problems)
    if audited is None:
        return _make_report(store, "", deep, None, problems, remarks)
    check_snapshot(audited, problems, remarks)
    tables = read_tables(store, audited, problems)
    hashes = _check_shards(store, audited, tables, deep, jobs, problems, remarks)
    check_keys(store, audited, hashes, problems)
    if len(tables) == len(TABLES):
        check_accounting(audited, tables, problems)
        check_originals(audited, tables, hashes, problems)
    list_unnamed(store, audited, problems, remarks)
    return _make_report(store, audited.hash, deep, audited, problems, remarks)


def _make_report(
    store: Store, digest: str, deep: bool, audited: Snapshot | None, problems: Findings, remarks: Findings
) -> VerifyReport:
    shards = audited.shards if audited else []
    return VerifyReport(
        place=store.uri,
        snapshot=digest,
        is_deep=deep,
        num_shards=len(shards),
        num_samples=sum(shard.num_samples for shard in shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        problems=tuple(sorted(problems.listed)),
        counts=dict(problems.counts),
        remarks=tuple(sorted(remarks.listed)),
        remark_counts=dict(remarks.counts),
    )


def _load(store: Store, digest: str | None, problems: Findings) -> Snapshot | None:
    try:
        return load_snapshot(store, digest)
    except DataError as error:
        path = "dataset.json" if digest is None else f"snapshots/{digest}.json"
        problems.add("snapshot", path, error.what, fix=error.fix)
        return None


def _known_params(snapshot: Snapshot, remarks: Findings) -> dict[tuple[str, str], HFParams]:
    """HF parameters that this program computes as those who wrote them, by modality and digest."""
    built_in = [(m, "", params) for m, params in snapshot.hf.items()]
    known = {}
    for modality, digest, params in [*built_in, *hf_versions_of(snapshot)]:
        wanted = digest or snapshot.hf_digests.get(modality, "")
        try:
            parsed = HFParams.model_validate(params)
        except ValidationError:
            parsed = None
        if parsed is not None and parsed.digest() == wanted:
            known[modality, digest] = parsed
        else:
            what = f"HF definition {wanted} is not that of this program"
            remarks.add("hf_unknown", modality, what, fix="compare with the version of frepa that built it")
    return known


def _check_shards(
    store: Store,
    snapshot: Snapshot,
    tables: dict[str, pa.Table],
    deep: bool,
    jobs: int,
    problems: Findings,
    remarks: Findings,
) -> list[Hashes]:
    """Audit the shards in parallel; return the hashes of their keys, in the order of the snapshot."""
    results: dict[str, ShardFindings] = {}
    tasks = _make_tasks(
        store, snapshot, tables, deep, _known_params(snapshot, remarks) if deep else {}, problems
    )
    # a process takes a second to start, a shallow look at a shard a few milliseconds
    useful = len(snapshot.shards) if deep else -(-len(snapshot.shards) // 64)
    jobs = max(1, min(jobs or min(available_cores(), useful), len(snapshot.shards)))
    total = sum(shard.num_samples for shard in snapshot.shards)
    with Progress(total, "verify", unit="sample") as progress:
        for result in run_tasks(_check_patiently, tasks, jobs):
            results[result.path] = result
            progress.update(result.num_samples)
    ordered = [results[shard.path] for shard in snapshot.shards]
    for result in ordered:
        problems.extend(result.findings)
    num_rounded = sum(result.num_rounded for result in ordered)
    if num_rounded:
        what = f"{num_rounded} HF members differ by rounding: they were built on another kind of processor"
        remarks.add("hf_rounded", "all shards", what)
    return [result.key_hashes for result in ordered]


def _check_patiently(task: ShardCheck) -> ShardFindings:
    """Audit a shard; of a remote one, again where something is wrong with it, and take the better result.

    A shard is read in parts, whose answers come without a checksum: a byte that was changed on the way looks
    like damage of the shard, but not each time.
    """
    found = check_shard(task)
    for _ in range(_REMOTE_ATTEMPTS - 1 if is_remote(task.store.uri) else 0):
        if not found.findings.counts:
            break
        again = check_shard(task)
        if again.findings.counts.total() < found.findings.counts.total():
            found = again
    return found


def _make_tasks(
    store: Store,
    snapshot: Snapshot,
    tables: dict[str, pa.Table],
    deep: bool,
    known: dict[tuple[str, str], HFParams],
    problems: Findings,
) -> Iterator[ShardCheck]:
    exclusions: dict[str, list[tuple[int, str]]] = defaultdict(list)
    if "duplicates" in tables:
        rows = tables["duplicates"].select(["shard", "row", "key"]).to_pylist()
        for row in rows:
            if row["shard"] is not None:
                exclusions[row["shard"]].append((-1 if row["row"] is None else row["row"], row["key"]))
    for path in exclusions.keys() - {shard.path for shard in snapshot.shards}:
        what = f"the duplicates table excludes {len(exclusions[path])} samples of this shard, which is none"
        problems.add("exclusion", path, what, fix="build again, or merge again")
    # a merged source may have been renamed; what is inside its tars was not
    names = {(b.modality, b.source): b.settings.get("source", b.source) for b in snapshot.builds}
    for shard in snapshot.shards:
        own = [(digest, params) for (modality, digest), params in known.items() if modality == shard.modality]
        yield ShardCheck(
            store=store,
            shard=shard,
            source=names.get((shard.modality, shard.source), shard.source),
            exclusions=exclusions.get(shard.path, []),
            hf=dict(own),
            patch_size=snapshot.patch_size,
            map_cell=snapshot.map_cell,
            is_deep=deep,
        )
