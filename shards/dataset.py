"""Reads and writes the parts of a dataset (`shards.schema`) in a folder or in S3, each checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from shards.schema import (
    FORMAT_VERSION,
    TABLES,
    ShardInfo,
    Snapshot,
    TableInfo,
    canonical_json,
    hf_tar_path,
    index_path,
)
from shards.stores.store import MissingFile, Store, faster_writer, open_store
from shards.support.errors import DataError

_CHUNK_BYTES = 1 << 22


def write_snapshot(store: Store, snapshot: Snapshot, before: Snapshot | None) -> str:
    """Write a snapshot, then make it the current one in the place of `before`; return its hash.

    Raises:
        EnvironmentFault: the destination cannot be written, or its current snapshot is not `before`.
    """
    digest = snapshot.hash
    text = json.dumps(snapshot.model_dump(), sort_keys=True, indent=1, ensure_ascii=False)
    store.write(f"snapshots/{digest}.json", text.encode())
    expected = _pointer(before.hash) if before else None
    if digest != (before.hash if before else None):
        store.replace("dataset.json", _pointer(digest), expected)
    return digest


def check_current(store: Store, snapshot: Snapshot | None) -> None:
    """See that a snapshot is still the current one (None: that there is no dataset); hold the lock first.

    Raises:
        EnvironmentFault: another program has written here since.
    """
    found = store.read("dataset.json") if has_dataset(store) else None
    if found != (_pointer(snapshot.hash) if snapshot else None):
        raise faster_writer(store.where("dataset.json"))


def _pointer(digest: str) -> bytes:
    return canonical_json({"format_version": FORMAT_VERSION, "snapshot": digest}) + b"\n"


def has_dataset(place: Store | Path | str) -> bool:
    """Whether there is a dataset at a place."""
    return open_store(place).num_bytes("dataset.json") is not None


def load_snapshot(place: Store | Path | str, digest: str | None = None) -> Snapshot:
    """Read a snapshot: the current one, or the one named by `digest`.

    Raises:
        DataError: there is no dataset, another format version, no such snapshot, or it is damaged.
        EnvironmentFault: the place cannot be reached.
    """
    store = open_store(place)
    if digest is None:
        digest = str(_read_json(store, "dataset.json", store.uri).get("snapshot"))
    path = f"snapshots/{digest}.json"
    data = _read_json(store, path, store.where(path))
    try:
        snapshot = Snapshot.model_validate(data)
    except ValidationError as error:
        raise DataError(
            f"the snapshot is damaged ({error.error_count()} wrong fields)",
            where=store.where(path),
            fix="restore the file, or build the dataset again",
        ) from error
    if snapshot.hash != digest:
        raise DataError(
            "the snapshot was changed after it was written", where=store.where(path), fix="restore the file"
        )
    return snapshot


def _read_json(store: Store, path: str, where: str) -> Mapping[str, Any]:
    try:
        data = json.loads(store.read(path))
    except MissingFile:
        raise DataError(
            "no such dataset or snapshot", where=where, fix="build one: frepa shards build SOURCE DEST"
        ) from None
    except ValueError as error:
        raise DataError("not valid JSON", where=where, fix="restore the file, or build again") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"format version {version!r} is not known to this program",
            where=where,
            allowed=str(FORMAT_VERSION),
            fix="build the dataset again, or use the version of frepa that wrote it",
        )
    return data  # type: ignore[no-any-return]


def read_index(place: Store | Path | str, shard: ShardInfo, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the index of a shard, in the order of the tar, checked against the snapshot.

    Args:
        place: the dataset.
        shard: one entry of `Snapshot.shards`.
        columns: the columns to read, None for all.

    Raises:
        DataError: the index is missing, damaged, or does not hold the samples that the snapshot counts.
        EnvironmentFault: the place cannot be reached.
    """
    return _read_checked(
        open_store(place), index_path(shard.path), shard.index_crc32c, shard.num_samples, columns
    )


def read_hf_index(place: Store | Path | str, shard: ShardInfo, digest: str) -> pa.Table:
    """Read the index of HF version `digest` of a shard; raises as `read_index`."""
    path = index_path(hf_tar_path(shard.path, digest))
    return _read_checked(open_store(place), path, shard.hf[digest].index_crc32c, shard.num_samples, None)


def read_table(place: Store | Path | str, snapshot: Snapshot, name: str) -> pa.Table:
    """Read a table of a snapshot, "quarantine" or "duplicates".

    Raises:
        DataError: it is missing, damaged, or not what the format says.
        EnvironmentFault: the place cannot be reached.
    """
    info = snapshot.tables[name]
    table = _read_checked(open_store(place), info.path, info.crc32c, info.num_rows, None)
    if not table.schema.equals(TABLES[name]):
        raise DataError("not the columns of this format", where=info.path, fix="build the dataset again")
    return table


def write_table(store: Store, name: str, table: pa.Table) -> TableInfo:
    """Write a table under a name that its content determines.

    Raises:
        EnvironmentFault: the destination cannot be written.
    """
    data = encode_table(table)
    crc = google_crc32c.value(data)
    path = f"tables/{name}-{crc:08x}.parquet"
    store.write(path, data)
    return TableInfo(path=path, num_rows=table.num_rows, crc32c=crc)


def encode_table(table: pa.Table) -> bytes:
    """Encode as parquet; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", compression_level=3, row_group_size=1 << 16)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def file_crc32c(file: BinaryIO) -> int:
    """Checksum of a file from its beginning to its end."""
    file.seek(0)
    checksum = google_crc32c.Checksum()
    while chunk := file.read(_CHUNK_BYTES):
        checksum.update(chunk)
    return int.from_bytes(checksum.digest(), "big")


def _read_checked(
    store: Store, path: str, crc32c: int, num_rows: int, columns: Sequence[str] | None
) -> pa.Table:
    data = store.read(path)
    if google_crc32c.value(data) != crc32c:
        raise DataError(
            "the file is not the one in the snapshot", where=store.where(path), fix="restore the file"
        )
    table = pq.read_table(pa.BufferReader(data), columns=list(columns) if columns is not None else None)
    if table.num_rows != num_rows:
        raise DataError(f"{table.num_rows} rows, the snapshot says {num_rows}", where=store.where(path))
    return table
