"""Adds another version of the HF tokens to a dataset; the pixels are not rewritten.

The version of a shard is a tar of its own beside it (`shards.schema.hf_tar_path`), committed by its index, so
that an interrupted run goes on where it was. A new snapshot names the versions; a stream picks one by digest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

from shards.builder.members import decode_stored, encode_hf_members
from shards.builder.tar import append_members, finish_tar
from shards.dataset import encode_table, file_crc32c, load_snapshot, read_index, write_snapshot
from shards.hf.tokens import HFParams
from shards.schema import (
    HF_INDEX_SCHEMA,
    HFTar,
    ShardInfo,
    Snapshot,
    canonical_json,
    hf_tar_path,
    index_path,
)
from shards.stores.sequential import SequentialReader
from shards.stores.store import MissingFile, Store, open_store
from shards.support.errors import ConfigError, DataError
from shards.support.progress import Progress
from shards.workers.pool import available_cores, run_tasks

_FACTS = b"frepa"


@dataclass(frozen=True)
class RehfReport:
    """What was added.

    Attributes:
        place: the dataset.
        snapshot: its hash now.
        modality: whose tokens these are.
        digest: of the HF parameters; names the version.
        num_shards: of the modality, all of which have the version now.
        num_written: of them now.
        num_reused: of them by a run that did not end.
        num_bytes: of the version's tars, all shards together.
    """

    place: str
    snapshot: str
    modality: str
    digest: str
    num_shards: int
    num_written: int
    num_reused: int
    num_bytes: int

    def lines(self) -> list[str]:
        """The report as text."""
        reused = f", {self.num_reused} were there" if self.num_reused else ""
        done = (
            f"{self.num_written} written{reused}" if self.num_written or self.num_reused else "nothing to do"
        )
        return [
            f"{self.place}: snapshot {self.snapshot}",
            f"  {self.modality}: HF version {self.digest} of {self.num_shards} shards, "
            f"{self.num_bytes / 1e6:.1f} MB; {done}",
        ]


@dataclass(frozen=True)
class RehfTask:
    """All a worker needs to add a version to one shard."""

    store: Store
    shard: ShardInfo
    params: HFParams
    patch_size: int
    map_cell: int

    @property
    def path(self) -> str:
        """Of the tar to be written."""
        return hf_tar_path(self.shard.path, self.params.digest())


def rehf_dataset(place: Store | Path | str, modality: str, params: HFParams, jobs: int = 0) -> RehfReport:
    """Add the HF version of `params` to every shard of a modality that lacks it.

    Args:
        place: the dataset.
        modality: one that it holds.
        params: what the version is.
        jobs: worker processes, 0 for one per available core; it does not change the bytes.

    Raises:
        ConfigError: the dataset has no such modality, or holds these very tokens inside its shards.
        DataError: a shard is damaged.
        EnvironmentFault: the place cannot be reached or written, or is being built.
    """
    store, digest = open_store(place), params.digest()
    _check(load_snapshot(store), store, modality, digest)
    with store.lock(f"rehf {modality} {digest}"):
        before = load_snapshot(store)
        lacking = [s for s in before.shards if s.modality == modality and digest not in s.hf]
        tasks = [RehfTask(store, s, params, before.patch_size, before.map_cell) for s in lacking]
        written: dict[str, HFTar] = {}
        num_reused = 0
        jobs = max(1, min(jobs or available_cores(), len(tasks)))
        with Progress(sum(s.num_samples for s in lacking), f"rehf {modality}") as progress:
            for path, num_samples, version, is_reused in run_tasks(add_version, tasks, jobs):
                written[path] = version
                num_reused += is_reused
                progress.update(num_samples)
        after = _with_versions(before, modality, params, written)
        if after != before:
            write_snapshot(store, after, before)
    own = [shard for shard in after.shards if shard.modality == modality]
    return RehfReport(
        place=store.uri,
        snapshot=after.hash,
        modality=modality,
        digest=digest,
        num_shards=len(own),
        num_written=len(written) - num_reused,
        num_reused=num_reused,
        num_bytes=sum(shard.hf[digest].num_bytes for shard in own),
    )


def _check(snapshot: Snapshot, store: Store, modality: str, digest: str) -> None:
    if modality not in snapshot.modalities:
        raise ConfigError(
            f"the dataset holds no {modality}", where=store.uri, allowed=", ".join(snapshot.modalities)
        )
    if snapshot.hf_digests[modality] == digest:
        raise ConfigError(
            f"these parameters are those of the tokens inside the shards of {modality} ({digest})",
            where=store.uri,
            fix="change a parameter, for example --set hf.cutoff_cycles=20",
        )


def _with_versions(before: Snapshot, modality: str, params: HFParams, written: dict[str, HFTar]) -> Snapshot:
    """The snapshot with the versions in it."""
    digest = params.digest()
    shards = [
        shard.model_copy(update={"hf": {**shard.hf, digest: written[shard.path]}})
        if shard.path in written
        else shard
        for shard in before.shards
    ]
    own = {**before.hf_versions.get(modality, {}), digest: params.model_dump(mode="json")}
    return before.model_copy(update={"shards": shards, "hf_versions": {**before.hf_versions, modality: own}})


def add_version(task: RehfTask) -> tuple[str, int, HFTar, bool]:
    """Write the version of one shard, unless it is there; runs in a worker process.

    Returns:
        Path and number of samples of the shard, the version, and whether it was there.

    Raises:
        DataError: the shard is damaged.
        EnvironmentFault: the store cannot be reached or written.
    """
    committed = _read_committed(task)
    version = committed or _write_version(task)
    return task.shard.path, task.shard.num_samples, version, committed is not None


def _write_version(task: RehfTask) -> HFTar:
    """Write the tar, then its index, which commits both."""
    columns = ["key", "image_offset", "image_size", "image_crc32c", "image_ext", "dtype"]
    rows = read_index(task.store, task.shard, columns).to_pylist()
    reader = SequentialReader(task.store, task.shard.path, task.shard.num_bytes)
    places: list[dict[str, Any]] = []
    with task.store.writing(task.path) as file:
        for row in rows:
            where = f"{task.store.where(task.shard.path)}, sample {row['key']}"
            data = _read_image(reader, row, where)
            try:
                pixels = decode_stored(data, row["image_ext"], row["dtype"])
            except DataError as error:
                raise DataError(error.what, where=where, fix="run frepa shards verify --deep") from error
            members = encode_hf_members(pixels, task.params, task.patch_size, task.map_cell)
            places.append({"key": row["key"], **append_members(file, row["key"], members)})
        num_bytes = finish_tar(file)
        crc32c = file_crc32c(file)
    facts = {"shard_crc32c": task.shard.crc32c, "num_bytes": num_bytes, "crc32c": crc32c}
    table = pa.Table.from_pylist(places, schema=HF_INDEX_SCHEMA)
    index = encode_table(table.replace_schema_metadata({_FACTS: canonical_json(facts)}))
    task.store.write(index_path(task.path), index)
    return HFTar(num_bytes=num_bytes, crc32c=crc32c, index_crc32c=google_crc32c.value(index))


def _read_image(reader: SequentialReader, row: dict[str, Any], where: str) -> bytes:
    """Go forward in the tar to a sample's image, and check its bytes."""
    reader.skip(row["image_offset"] - reader.position)
    is_there = reader.position == row["image_offset"]
    data = reader.take(row["image_size"]) if is_there else b""
    if len(data) != row["image_size"] or google_crc32c.value(data) != row["image_crc32c"]:
        raise DataError(
            "the bytes of image are damaged",
            where=where,
            fix="run frepa shards verify --deep, mend the shard",
        )
    return data


def _read_committed(task: RehfTask) -> HFTar | None:
    """What an earlier run committed for this task, None when it did not."""
    try:
        index = task.store.read(index_path(task.path))
        table = pq.read_table(pa.BufferReader(index), columns=["key"])
        facts = json.loads((table.schema.metadata or {}).get(_FACTS, b"{}"))
    except (MissingFile, pa.ArrowException, ValueError):
        return None
    if facts.get("shard_crc32c") != task.shard.crc32c or table.num_rows != task.shard.num_samples:
        return None
    if task.store.num_bytes(task.path) != facts["num_bytes"]:
        return None
    return HFTar(
        num_bytes=facts["num_bytes"], crc32c=facts["crc32c"], index_crc32c=google_crc32c.value(index)
    )
