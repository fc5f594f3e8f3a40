"""The first half of a build: list the sources, compare them with the plan, plan what is new."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from shards.builder.config import BuildConfig
from shards.builder.growth import Growth, Outcomes, PlanContext, compare, refresh, share_left
from shards.builder.listing import is_listing
from shards.builder.plan import PLAN_SCHEMA, Plan
from shards.builder.plan_files import drop_parts, is_marked, load_parts, plan_folder, refresh_parts, save_part
from shards.builder.publish import SourceFacts, check_extends, check_same_plan
from shards.builder.report import SourceChange
from shards.builder.scan import ScanOptions, scan_objects
from shards.builder.scan_files import forget_groups
from shards.builder.sources import Listing
from shards.builder.state import Salt
from shards.dataset import has_dataset, load_snapshot, read_table
from shards.schema import Snapshot, SourceBuild
from shards.stores.store import Store, is_remote
from shards.support.errors import ConfigError, DataError
from shards.workers.pool import available_cores, run_tasks

T = TypeVar("T")
R = TypeVar("R")

_KEPT_SHARE = 0.5
"""A part that was begun goes on while so much of it is still there; else the source is another one."""


@dataclass(frozen=True)
class Prepared:
    """A build that may begin.

    Attributes:
        store: the destination.
        config: the settings.
        facts: what the dataset will say of the source.
        salt: of the state folder.
        folder: of the plan's parts.
        roots: local folders that the sources lie in.
        snapshot: of the dataset, None when it is new.
        parts: of the plan, a new one included.
        digests: of the parts.
        num_published: parts that the dataset holds.
        change: what is new.
    """

    store: Store
    config: BuildConfig
    facts: SourceFacts
    salt: Salt
    folder: Path
    roots: tuple[str, ...]
    snapshot: Snapshot | None
    parts: Sequence[Plan]
    digests: Sequence[str]
    num_published: int
    change: SourceChange


def num_jobs(config: BuildConfig, num_tasks: int) -> int:
    """Worker processes for some tasks."""
    return min(config.jobs or available_cores(), max(1, num_tasks))


def run_by_executor(
    config: BuildConfig, function: Callable[[T], R], tasks: Iterable[T], num_tasks: int
) -> Iterator[R]:
    """Run tasks here or on Ray, as the settings say."""
    if config.executor == "ray":
        from shards.workers.ray_pool import run_tasks_on_ray

        jobs = config.jobs or available_cores()
        return run_tasks_on_ray(function, tasks, jobs, address=config.ray_address)
    return run_tasks(function, tasks, num_jobs(config, num_tasks))


def prepare(
    sources: Sequence[Path | str],
    listing: Listing,
    store: Store,
    state: Path,
    salt: Salt,
    config: BuildConfig,
) -> Prepared:
    """Compare the listed objects with the plan and plan what is new; the state folder is held.

    Raises:
        ConfigError: the settings do not fit the dataset, or the source is not the one built under this name.
        DataError: another state folder, or labels that were changed after they were built.
    """
    facts = config.source_facts()
    snapshot = load_snapshot(store) if has_dataset(store) else None
    build = check_extends(snapshot, facts)
    folder = plan_folder(state, config.modality, config.source, facts.settings)
    parts = load_parts(folder)
    if build is not None:
        check_same_plan(build, [part.digest(salt, facts.settings) for part in parts])
    num_published = len(build.plan_digests) if build is not None else 0
    if num_published and not any(share_left(part, listing.objects) for part in parts[:num_published]):
        raise _another_source(facts)  # said before its objects are read
    roots = _find_roots(sources)
    context = _make_context(config, salt, roots, folder / "scan")

    def outcomes(kept: Sequence[Plan]) -> Outcomes:
        return _read_outcomes(store, snapshot, build, kept[num_published:], retry=config.retry_quarantined)

    parts, growth = _settle(folder, parts, num_published, listing, outcomes, context)
    if num_published and not growth.num_known:
        raise _another_source(facts)
    if growth.part is not None and (parts or growth.part.num_units):
        save_part(folder, len(parts), growth.part)
    forget_groups(folder / "scan")
    if growth.part is not None:
        parts = [*parts, growth.part]
    return Prepared(
        store=store,
        config=config,
        facts=facts,
        salt=salt,
        folder=folder,
        roots=roots,
        snapshot=snapshot,
        parts=parts,
        digests=[part.digest(salt, facts.settings) for part in parts],
        num_published=num_published,
        change=_describe_change(growth, parts[num_published:], listing.num_repeated),
    )


def _another_source(facts: SourceFacts) -> ConfigError:
    """Make the error of a source that shares no object with the one that was built under its name."""
    return ConfigError(
        "the dataset holds a source of this name, and none of its objects is among these",
        where=f"{facts.modality}/{facts.source}",
        fix="build other objects under another name (--source-name), or correct the path of the source",
    )


def _describe_change(growth: Growth, pending: Sequence[Plan], num_repeated: int) -> SourceChange:
    """Compare the objects with what is published: what earlier, interrupted builds have planned is new."""
    rows = pa.concat_tables([part.objects for part in pending] or [PLAN_SCHEMA.empty_table()])
    is_retry = rows["is_retry"].to_numpy()
    is_changed = rows["supersedes"].to_numpy() >= 0
    num_new = int((~is_retry & ~is_changed).sum())
    num_listed = growth.num_new + growth.num_known + growth.num_changed
    return SourceChange(
        num_new=num_new,
        num_known=max(0, num_listed - num_new - int(is_changed.sum())),
        num_changed=int(is_changed.sum()),
        num_vanished=growth.num_vanished,
        num_retried=int(is_retry.sum()),
        num_repeated=num_repeated,
    )


def _settle(
    folder: Path,
    parts: list[Plan],
    num_published: int,
    listing: Listing,
    outcomes: Callable[[Sequence[Plan]], Outcomes],
    context: PlanContext,
) -> tuple[list[Plan], Growth]:
    """Keep the parts that still hold, take over where their objects are now, and compare.

    Published parts are kept whatever happens. A part that was begun is kept with what is done of it, unless
    the source is another one altogether. A part that was only planned is kept if it is still right.
    """
    fixed = num_published
    while fixed < len(parts) and is_marked(folder, fixed, "published"):
        fixed += 1
    begun = fixed
    while begun < len(parts) and is_marked(folder, begun, "started"):
        begun += 1
    if any(share_left(part, listing.objects) < _KEPT_SHARE for part in parts[fixed:begun]):
        begun = fixed
    is_right = all(share_left(part, listing.objects) == 1 for part in parts[begun:])
    growth = compare(listing.objects, parts, outcomes(parts), context) if is_right else None
    if growth is not None and growth.num_relabeled and fixed < len(parts):
        begun, growth = fixed, None
    if growth is None or (growth.part is not None and begun < len(parts)):
        drop_parts(folder, begun)
        parts = parts[:begun]
        growth = compare(listing.objects, parts, outcomes(parts), context)
        if growth.num_relabeled and fixed < len(parts):
            drop_parts(folder, fixed)
            parts = parts[:fixed]
            growth = compare(listing.objects, parts, outcomes(parts), context)
    if growth.num_relabeled:
        raise DataError(
            f"labels or patients of {growth.num_relabeled} objects are not those they were built with",
            where=f"{context.modality}/{context.source}",
            fix="restore the labels, or build under another source name",
        )
    if growth.current is not None:
        current = [refresh(part, growth.current) for part in parts]
        refresh_parts(folder, parts, current)
        parts = current
    return parts, growth


def _make_context(config: BuildConfig, salt: Salt, roots: tuple[str, ...], kept: Path) -> PlanContext:
    options = ScanOptions(
        read=config.read_options(),
        size=config.size,
        patch_size=config.patch_size,
        keeps_deep=config.intensity_rule().kind == "hounsfield",
        roots=roots,
    )

    def scan(objects: Any) -> Any:
        run = None
        if config.executor == "ray":
            run = lambda function, tasks: run_by_executor(config, function, tasks, 0)  # noqa: E731
        return scan_objects(objects, options, config.jobs or available_cores(), kept, run)

    return PlanContext(
        scan=scan,
        salt=salt,
        modality=config.modality,
        source=config.source,
        splits=config.splits,
        shard_bytes=config.shard_bytes,
    )


def _find_roots(sources: Sequence[Path | str]) -> tuple[str, ...]:
    """Local folders that the sources lie in."""
    roots = []
    for source in sources:
        if not is_remote(source) and not is_listing(source):
            path = os.path.abspath(source)
            roots.append(path if os.path.isdir(path) else os.path.dirname(path))
    return tuple(roots)


def _read_outcomes(
    store: Store,
    snapshot: Snapshot | None,
    build: SourceBuild | None,
    pending: Sequence[Plan],
    *,
    retry: bool,
) -> Outcomes:
    """What the dataset says of units of this source that are no samples, and no pending part tries again."""
    if snapshot is None or build is None:
        return Outcomes(retry=retry)
    table = read_table(store, snapshot, "quarantine")
    is_mine = pc.and_(pc.equal(table["modality"], build.modality), pc.equal(table["source"], build.source))
    table = table.filter(pc.and_(is_mine, pc.equal(table["status"], "quarantined")))
    for part in pending:
        table = table.filter(pc.invert(pc.is_in(table["object"], part.objects["object"].combine_chunks())))
    quarantined: dict[int, list[int]] = defaultdict(list)
    lost = set()
    columns = (table[name].to_pylist() for name in ("object", "unit", "reason"))
    for number, unit, reason in zip(*columns, strict=True):
        quarantined[number].append(unit)
        if reason == "changed":
            lost.add(number)
    return Outcomes(retry=retry, quarantined=quarantined, lost=frozenset(lost))
