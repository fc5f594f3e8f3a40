"""The on-disk format, version 1: the one place that knows it.

    ROOT/dataset.json                        points to the current snapshot
    ROOT/snapshots/HASH.json                 immutable: what the dataset holds and how it was built
    ROOT/MODALITY/SOURCE-000000.tar          samples: KEY.png|jpg, KEY.hf.npy, KEY.hfmap.npy.zst, KEY.json
    ROOT/MODALITY/SOURCE-000000.index.parquet  a row per sample (`INDEX_SCHEMA`), in the order of the tar
    ROOT/quarantine.parquet                  units that are no samples, each with its reason
    ROOT/duplicates.parquet                  units that repeat another one

A tar is plain WebDataset; the index adds the byte range and the crc32c of each member, so that a reader
needs one `pread` per member and notices damage. A pinned snapshot stays valid while the dataset grows: shards
are never rewritten, and a sample is never made a duplicate of one that came later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from shards.atomic import replace_file
from shards.support.errors import DataError
from shards.support.settings import Settings

FORMAT_VERSION = 1
NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]*$"
"""What modalities and sources may be called: safe in paths, and no dot (WebDataset splits keys there)."""

MEMBERS = ("image", "hf", "hfmap", "json")
"""Members of a sample, in the order of the tar; `hf`: uint16 .npy, `hfmap`: uint8 .npy in zstd."""

_MEMBER_FIELDS = [
    field
    for member in MEMBERS
    for field in (
        pa.field(f"{member}_offset", pa.int64(), nullable=False),
        pa.field(f"{member}_size", pa.int64(), nullable=False),
        pa.field(f"{member}_crc32c", pa.uint32(), nullable=False),
    )
]

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        *_MEMBER_FIELDS,
        pa.field("image_ext", pa.string(), nullable=False),  # "png" or "jpg"
        pa.field("height", pa.int32(), nullable=False),  # canonical, as stored
        pa.field("width", pa.int32(), nullable=False),
        pa.field("channels", pa.int32(), nullable=False),
        pa.field("source_height", pa.int32(), nullable=False),  # as decoded, EXIF rotation applied
        pa.field("source_width", pa.int32(), nullable=False),
        pa.field(
            "pixel_hash", pa.string(), nullable=False
        ),  # 32 hex of sha256 over canonical pixels and shape
        pa.field("dhash64", pa.uint64(), nullable=False),
        pa.field("patient", pa.string()),  # salted
        pa.field("volume", pa.string()),  # salted; units of one object that has several
        pa.field("slice", pa.int32()),
        pa.field("labels", pa.string(), nullable=False),  # a JSON object
        pa.field("object", pa.int64(), nullable=False),
        pa.field("unit", pa.int32(), nullable=False),
    ]
)

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("modality", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("object", pa.int64(), nullable=False),
        pa.field("unit", pa.int32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # "quarantined", or "excluded" by rule
        pa.field("reason", pa.string(), nullable=False),
    ]
)

DUPLICATES_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("duplicate_of", pa.string(), nullable=False),
        pa.field(
            "kind", pa.string(), nullable=False
        ),  # "bytes": in no shard; "pixels": in a shard, to be skipped
        pa.field("modality", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("object", pa.int64(), nullable=False),
        pa.field("unit", pa.int32(), nullable=False),
    ]
)


class ShardInfo(Settings):
    """One shard of a snapshot; `num_samples` counts index rows, pixel duplicates included."""

    path: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*/[a-z0-9][a-z0-9_-]*-[0-9]{6}\.tar$")
    modality: str = Field(pattern=NAME_PATTERN)
    source: str = Field(pattern=NAME_PATTERN)
    num_samples: int = Field(gt=0)
    num_bytes: int = Field(gt=0)
    index_crc32c: int = Field(ge=0)


class Counts(Settings):
    """The accounting of a build: `units = samples + quarantined + excluded + duplicates`."""

    objects: int = 0
    units: int = 0
    samples: int = 0
    quarantined: int = 0
    excluded: int = 0
    duplicates: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: value + getattr(other, name) for name, value in self})

    @property
    def is_closed(self) -> bool:
        """Whether every unit is accounted for."""
        return self.units == self.samples + self.quarantined + self.excluded + self.duplicates


class SourceBuild(Settings):
    """How one source came into the dataset."""

    modality: str = Field(pattern=NAME_PATTERN)
    source: str = Field(pattern=NAME_PATTERN)
    counts: Counts
    plan_digest: str  # keyed with the salt: says whether two plans are equal, and nothing else
    settings: dict[str, Any]


class Snapshot(Settings):
    """What a dataset holds at one time; immutable, named by its hash.

    `builds` is in the order in which the sources were added, `shards` is sorted by path.
    """

    format_version: int = FORMAT_VERSION
    created_by: str
    modalities: list[str]
    shards: list[ShardInfo]
    hf: dict[str, dict[str, Any]]
    hf_digests: dict[str, str]
    size: int
    patch_size: int
    map_cell: int
    counts: Counts
    builds: list[SourceBuild]

    @property
    def hash(self) -> str:
        """First 16 hex digits of the sha256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.model_dump())).hexdigest()[:16]


def canonical_json(value: Any) -> bytes:
    """Serialize plain data so that equal data give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def index_path(root: Path, shard_path: str) -> Path:
    """Where the index of the shard at `shard_path` (relative to `root`) lies."""
    return root / (shard_path.removesuffix(".tar") + ".index.parquet")


def write_snapshot(root: Path, snapshot: Snapshot) -> str:
    """Write a snapshot, then make it the current one; return its hash.

    Raises:
        EnvironmentFault: the destination cannot be written.
    """
    digest = snapshot.hash
    (root / "snapshots").mkdir(exist_ok=True)
    with replace_file(root / "snapshots" / f"{digest}.json") as file:
        file.write(json.dumps(snapshot.model_dump(), sort_keys=True, indent=1, ensure_ascii=False).encode())
    with replace_file(root / "dataset.json") as file:
        file.write(canonical_json({"format_version": FORMAT_VERSION, "snapshot": digest}) + b"\n")
    return digest


def load_snapshot(root: Path, digest: str | None = None) -> Snapshot:
    """Read a snapshot: the current one, or the one named by `digest`.

    Raises:
        DataError: `root` is no dataset, holds another format version, lacks that snapshot, or it is damaged.
    """
    if digest is None:
        digest = str(_read_json(root / "dataset.json", root).get("snapshot"))
    path = root / "snapshots" / f"{digest}.json"
    data = _read_json(path, path)
    try:
        snapshot = Snapshot.model_validate(data)
    except ValidationError as error:
        raise DataError(
            f"the snapshot is damaged ({error.error_count()} wrong fields)",
            where=path,
            fix="restore the file, or build the dataset again",
        ) from error
    if snapshot.hash != digest:
        raise DataError("the snapshot was changed after it was written", where=path, fix="restore the file")
    return snapshot


def _read_json(path: Path, where: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            "no such dataset or snapshot", where=where, fix="build one: frepa shards build SOURCE DEST"
        ) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from error
    except ValueError as error:
        raise DataError("not valid JSON", where=path, fix="restore the file, or build again") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"format version {version!r} is not known to this program",
            where=path,
            allowed=str(FORMAT_VERSION),
            fix="build the dataset again, or use the version of frepa that wrote it",
        )
    return data  # type: ignore[no-any-return]


def read_index(root: Path, shard: ShardInfo, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the index of a shard, in the order of the tar, checked against the snapshot.

    Args:
        root: the dataset.
        shard: one entry of `Snapshot.shards`.
        columns: the columns to read, None for all.

    Raises:
        DataError: the index is missing, damaged, or does not hold the samples that the snapshot counts.
    """
    path = index_path(root, shard.path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path, fix="restore the shard") from error
    if google_crc32c.value(data) != shard.index_crc32c:
        raise DataError("the index is not the one in the snapshot", where=path, fix="restore the shard")
    table = pq.read_table(pa.BufferReader(data), columns=list(columns) if columns is not None else None)
    if table.num_rows != shard.num_samples:
        raise DataError(f"{table.num_rows} rows, the snapshot says {shard.num_samples}", where=path)
    return table


def read_exclusions(root: Path) -> set[str]:
    """Keys of samples that repeat the pixels of another one: in a shard, but left out by the order."""
    path = root / "duplicates.parquet"
    if not path.exists():
        return set()
    table = read_table(path, DUPLICATES_SCHEMA)
    kinds, keys = table["kind"].to_pylist(), table["key"].to_pylist()
    return {key for key, kind in zip(keys, kinds, strict=True) if kind == "pixels"}


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a whole parquet file and check its columns.

    Raises:
        DataError: it cannot be read, or is not what the format says.
    """
    try:
        table = pq.read_table(pa.BufferReader(path.read_bytes()))
    except (OSError, pa.ArrowException) as error:
        raise DataError("cannot be read as parquet", where=path, fix="restore the file") from error
    if not table.schema.equals(schema):
        raise DataError("not the columns of this format", where=path, fix="build the dataset again")
    return table


def write_table(path: Path, table: pa.Table, *, mode: int = 0o644) -> None:
    """Write a parquet file whole or not at all; equal tables give equal bytes.

    Raises:
        EnvironmentFault: the destination cannot be written.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", compression_level=3, row_group_size=1 << 16)
    with replace_file(path, mode=mode) as file:
        file.write(sink.getvalue())
