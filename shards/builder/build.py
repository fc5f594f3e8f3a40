"""Build a dataset: plan, shard tasks, tables and snapshot.

Every step is idempotent and ends with one file that appears whole, so that a build killed at any moment and
run again gives the same bytes; what was committed is not done again. A source that has grown, and a further
source, extend the dataset with a new snapshot.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pyarrow.compute as pc

from shards.builder.accounting import PartFacts
from shards.builder.config import BuildConfig
from shards.builder.labels import create_labeler
from shards.builder.live import BuildMetrics, serve_builder
from shards.builder.plan import Plan
from shards.builder.plan_files import drop_parts, keys_path, mark_part
from shards.builder.prepare import Prepared, num_jobs, prepare, run_by_executor
from shards.builder.publish import check_extends, publish_part
from shards.builder.report import ASSUMED_RATE, BuildReport, PlanReport
from shards.builder.scan import count_text
from shards.builder.series_members import SeriesMembers
from shards.builder.sources import Listing, check_labeled, check_places, list_objects
from shards.builder.state import default_state, open_state
from shards.builder.writer import ShardResult, ShardTask, read_committed, write_shard
from shards.dataset import check_current, has_dataset, load_snapshot, read_table
from shards.schema import ShardInfo, Snapshot, index_path
from shards.stores.atomic import remove_temporaries, replace_file
from shards.stores.store import Store, lock_folder, open_store
from shards.support.errors import DataError
from shards.support.progress import Progress

__all__ = ["BuildConfig", "BuildReport", "PlanReport", "build_dataset", "plan_build"]

_THREADS = 16  # that look for committed shards; in S3, each is a request or two


def build_dataset(
    sources: Sequence[Path | str], place: Store | Path | str, config: BuildConfig
) -> BuildReport:
    """Build the objects of `sources` into the dataset at `place`, or go on with it, or extend it.

    Args:
        sources: folders, files, S3 prefixes and listings, see `list_objects`; together they are one source of
            the dataset, named `config.source`. Their order tells their objects apart: name them in the same
            order each time, further ones last.
        place: the destination, a folder or `s3://bucket/prefix`.
        config: the settings.

    Returns:
        What became of the units; `report.snapshot` names the dataset as it is now.

    Raises:
        ConfigError: places or settings that contradict each other or the dataset.
        DataError: no unit became a sample, or the source was built with another state folder.
        EnvironmentFault: a place cannot be reached or written, is in use, or a worker died.
    """
    store = open_store(place)
    state = config.state or default_state(store)
    with serve_builder(config, store) as telemetry, _prepared(sources, store, state, config) as ready:
        if not any(part.num_units for part in ready.parts):
            raise _no_sample(sources, sum((part.reasons() for part in ready.parts), Counter()))
        with store.lock(ready.salt.owner):
            check_current(store, ready.snapshot)  # to plan takes hours: another builder may have been faster
            return _Builder(ready, sources, state, BuildMetrics(telemetry)).build()


def plan_build(sources: Sequence[Path | str], place: Store | Path | str, config: BuildConfig) -> PlanReport:
    """Plan a build and tell what it would do; nothing is written to the destination.

    The plan stays in the state folder, and a build takes it over if the source is then still the same.
    Arguments and errors as of `build_dataset`.
    """
    store = open_store(place)
    state = config.state or default_state(store)
    with _prepared(sources, store, state, config) as ready:
        parts = ready.parts[ready.num_published :]
        units: Counter[str] = Counter()
        reasons: dict[str, Counter[str]] = {"quarantined": Counter(), "excluded": Counter()}
        num_duplicates = 0
        for part in parts:
            units += part.units_by_format()
            for status, counted in reasons.items():
                counted.update(part.reasons(status))
            num_duplicates += part.count_units("duplicate")
        rate = _read_rate(state, config)
        num_shards = sum(part.num_shards for part in parts)
        return PlanReport(
            place=store.uri,
            change=ready.change,
            num_objects=sum(int(pc.sum(pc.equal(p.objects["status"], "image")).as_py() or 0) for p in parts),
            units=units,
            duplicates=num_duplicates,
            quarantined=reasons["quarantined"],
            excluded=reasons["excluded"],
            num_shards=num_shards,
            num_bytes=sum(part.stored_bytes for part in parts),
            rate=rate or ASSUMED_RATE,
            is_measured=rate is not None,
            jobs=num_jobs(config, num_shards),
        )


@contextmanager
def _prepared(
    sources: Sequence[Path | str], store: Store, state: Path, config: BuildConfig
) -> Iterator[Prepared]:
    """List the sources, hold the state folder, and plan."""
    check_places(sources, store, state)
    # settings that do not fit are told before hours of listing; `prepare` looks again, holding the state
    check_extends(load_snapshot(store) if has_dataset(store) else None, config.source_facts())
    listing = _list(sources, config)
    with lock_folder(state, mode=0o700):
        remove_temporaries(state, *(path for path in state.iterdir() if path.is_dir()))
        salt = open_state(state, config.salt)
        yield prepare(sources, listing, store, state, salt, config)


def _list(sources: Sequence[Path | str], config: BuildConfig) -> Listing:
    labeler = create_labeler(config.labels, config.label_columns, config.patient_column)
    listing = list_objects(
        sources, labeler, columns=config.label_columns, patient_column=config.patient_column
    )
    if config.labels not in ("none", "folder"):
        check_labeled(listing, config.labels)
    return listing


class _Builder:
    """Writes and publishes the parts of a plan that a dataset lacks; both places are held."""

    def __init__(
        self, ready: Prepared, sources: Sequence[Path | str], state: Path, metrics: BuildMetrics
    ) -> None:
        self._ready, self._sources, self._state, self._metrics = ready, sources, state, metrics
        self._store, self._config = ready.store, ready.config
        self._spec = ready.config.sample_spec()
        self._num_reused = self._num_written = self._bytes_written = 0

    def build(self) -> BuildReport:
        ready, snapshot = self._ready, self._ready.snapshot
        stored = {item.path: item.num_bytes for item in self._store.list(self._prefix)}
        self._remove_shards(stored, ready.parts[-1].end_shard)
        if snapshot is not None:
            self._mend(snapshot, stored)
        for number in range(ready.num_published, len(ready.parts)):
            part = ready.parts[number]
            mark_part(ready.folder, number, "started")
            self._metrics.begin_part(part)
            results = self._write_part(number, stored)
            if number == 0 and all(result.info is None for result in results):
                self._give_up(part, results)
            facts = PartFacts(
                modality=self._config.modality,
                source=self._config.source,
                salt=ready.salt,
                parts=ready.parts[: number + 1],
                results=results,
            )
            snapshot, _ = publish_part(
                self._store,
                snapshot,
                ready.facts,
                facts,
                ready.digests[: number + 1],
                keys_path(ready.folder, number),
            )
            mark_part(ready.folder, number, "published")
        assert snapshot is not None
        return self._report(snapshot)

    @property
    def _prefix(self) -> str:
        return f"{self._config.modality}/{self._config.source}-"

    def _path(self, shard: int) -> str:
        return f"{self._prefix}{shard:06d}.tar"

    def _write_part(self, number: int, stored: dict[str, int]) -> list[ShardResult]:
        """Write the shards of a part that are not committed yet; return the results of all, in order."""
        part, digest = self._ready.parts[number], self._ready.digests[number]
        shards = range(part.first_shard, part.end_shard)

        def find(shard: int) -> ShardResult | None:
            path = self._path(shard)
            if path not in stored or index_path(path) not in stored:
                return None
            return read_committed(self._store, path, digest, part.num_units_of(shard), stored[path])

        with ThreadPoolExecutor(_THREADS) as pool:
            found = dict(zip(shards, pool.map(find, shards), strict=True))
        missing = [shard for shard, result in found.items() if result is None]
        self._num_reused += len(shards) - len(missing)
        self._write(number, missing, found, {})
        return [result for result in found.values() if result is not None]

    def _write(
        self,
        number: int,
        shards: Sequence[int],
        results: dict[int, ShardResult | None],
        expected: dict[int, ShardInfo],
    ) -> None:
        """Write shards of a part, and put their results where they belong."""
        if not shards:
            return
        ready, config = self._ready, self._config
        part, digest = ready.parts[number], ready.digests[number]
        members = SeriesMembers(ready.parts[: number + 1])
        needs_series = self._spec.intensity.scope == "volume"

        def task_of(shard: int) -> ShardTask:
            objects = part.planned_objects(shard, ready.salt, config.modality, config.source)
            return ShardTask(
                store=self._store,
                path=self._path(shard),
                spec=self._spec,
                plan_digest=digest,
                objects=objects,
                series=members.of(objects) if needs_series else {},
                roots=ready.roots,
                expected=expected.get(shard),
            )

        self._metrics.begin_shards(len(shards))
        shard_of = {self._path(shard): shard for shard in shards}
        num_left = sum(part.num_units_of(shard) for shard in shards)
        num_done = 0 if expected else part.num_units - num_left
        bad: Counter[str] = Counter()
        start = time.monotonic()
        total = num_done + num_left
        try:
            with Progress(total, f"build {config.modality}", unit="image", initial=num_done) as progress:
                for done in run_by_executor(config, write_shard, map(task_of, shards), len(shards)):
                    results[shard_of[done.path]] = done.result
                    self._metrics.end_shard(done.result)
                    bad.update(item.reason for item in done.result.bad)
                    self._bytes_written += done.result.info.num_bytes if done.result.info else 0
                    progress.update(
                        done.num_units, note=f"{self._bytes_written / 1e6:.0f} MB {count_text(bad)}".rstrip()
                    )
        finally:
            if (folder := self._store.local_path(config.modality)) is not None and folder.is_dir():
                remove_temporaries(folder)  # of workers that were ended
        self._num_written += len(shards)
        _save_rate(self._state, config, num_left / (time.monotonic() - start) / num_jobs(config, len(shards)))

    def _mend(self, snapshot: Snapshot, stored: dict[str, int]) -> None:
        """Write published shards again that are missing or cut."""
        shards = {shard.path: shard for shard in snapshot.shards if self._ready.facts.is_of(shard)}
        for number, part in enumerate(self._ready.parts[: self._ready.num_published]):
            expected = {}
            for shard in range(part.first_shard, part.end_shard):
                info = shards.get(self._path(shard))
                if info is not None and (
                    stored.get(info.path) != info.num_bytes or index_path(info.path) not in stored
                ):
                    expected[shard] = info.model_copy(update={"hf": {}})
            self._num_reused += part.num_shards - len(expected)
            self._write(number, list(expected), {}, expected)

    def _remove_shards(self, stored: dict[str, int], start: int) -> None:
        """Delete shards from number `start` on: what an unfinished build of another plan has left."""
        pattern = re.compile(re.escape(self._prefix) + r"(\d{6})\.(?:tar|index\.parquet)")
        for path in list(stored):
            match = pattern.fullmatch(path)
            if match and int(match[1]) >= start:
                self._store.delete(path)
                del stored[path]

    def _give_up(self, part: Plan, results: Sequence[ShardResult]) -> None:
        """Leave nothing of a source without a single sample."""
        stored = {item.path: item.num_bytes for item in self._store.list(self._prefix)}
        self._remove_shards(stored, 0)
        drop_parts(self._ready.folder, 0)
        reasons = part.reasons()
        reasons.update(bad.reason for result in results for bad in result.bad)
        raise _no_sample(self._sources, reasons)

    def _report(self, snapshot: Snapshot) -> BuildReport:
        facts = self._ready.facts
        build = next(item for item in snapshot.builds if facts.is_of(item))
        table = read_table(self._store, snapshot, "quarantine")
        is_mine = pc.and_(
            pc.equal(table["modality"], facts.modality), pc.equal(table["source"], facts.source)
        )
        rows = table.filter(is_mine).group_by(["status", "reason"]).aggregate([([], "count_all")]).to_pylist()
        reasons = {
            status: {row["reason"]: row["count_all"] for row in rows if row["status"] == status}
            for status in ("quarantined", "excluded")
        }
        return BuildReport(
            place=self._store.uri,
            snapshot=snapshot.hash,
            counts=build.counts,
            quarantined=reasons["quarantined"],
            excluded=reasons["excluded"],
            num_shards=self._num_reused + self._num_written,
            num_reused=self._num_reused,
            num_bytes=sum(shard.num_bytes for shard in snapshot.shards if facts.is_of(shard)),
            bytes_written=self._bytes_written,
            change=self._ready.change,
        )


def _read_rate(state: Path, config: BuildConfig) -> float | None:
    """Images per second and core of the last build with these settings' modality; None: never measured."""
    try:
        return float(json.loads((state / "rates.json").read_text())[config.modality])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _save_rate(state: Path, config: BuildConfig, rate: float) -> None:
    try:
        rates = json.loads((state / "rates.json").read_text())
    except (OSError, ValueError):
        rates = {}
    with replace_file(state / "rates.json", mode=0o600) as file:
        file.write(json.dumps({**rates, config.modality: round(rate, 3)}).encode())


def _no_sample(sources: Sequence[Path | str], reasons: Counter[str]) -> DataError:
    counted = ", ".join(f"{reason} {num}" for reason, num in reasons.most_common())
    return DataError(
        f"no image can be used ({counted})",
        where=", ".join(map(str, sources)),
        allowed="PNG, JPEG, TIFF, BMP, WebP, DICOM, NIfTI, HDF5, NPY, NPZ, slides",
        fix="give a place that holds images, or relax min_side or min_std",
    )
