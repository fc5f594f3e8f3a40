"""The on-disk format, version 1: the one place that knows it.

    ROOT/dataset.json                        points to the current snapshot
    ROOT/snapshots/HASH.json                 immutable: what the dataset holds and how it was built
    ROOT/MODALITY/SOURCE-000000.tar          KEY.png|jpg|npy.zst, KEY.hf.npy, KEY.hfmap.npy.zst, KEY.json
    ROOT/MODALITY/SOURCE-000000.index.parquet  a row per sample (`INDEX_SCHEMA`), in the order of the tar
    ROOT/MODALITY/SOURCE-000000.hf-DIGEST.tar  and .index.parquet: another HF version of the same samples
    ROOT/tables/quarantine-CRC.parquet       units that are no samples, each with its reason
    ROOT/tables/duplicates-CRC.parquet       units that repeat another one, or were replaced by a newer one

ROOT is a folder or `s3://bucket/prefix`. A tar is plain WebDataset; the index adds the byte range and the
crc32c of each member, so that a reader needs one `pread` per member and notices damage. A pinned snapshot
stays valid while the dataset grows: nothing is ever rewritten but `dataset.json`, and a snapshot names the
tables that belong to it by their checksums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pydantic import Field

from shards.support.settings import Settings

FORMAT_VERSION = 1
NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]*$"
"""What modalities and sources may be called: safe in paths, and no dot (WebDataset splits keys there)."""

MEMBERS = ("image", "hf", "hfmap", "json")
"""Members of a sample, in the order of the tar; `hf`: uint16 .npy, `hfmap`: uint8 .npy in zstd."""

HF_MEMBERS = ("hf", "hfmap")
"""Members of a sample in the tar of another HF version."""


def _member_fields(members: Sequence[str]) -> list[pa.Field]:
    return [
        field
        for member in members
        for field in (
            pa.field(f"{member}_offset", pa.int64(), nullable=False),
            pa.field(f"{member}_size", pa.int64(), nullable=False),
            pa.field(f"{member}_crc32c", pa.uint32(), nullable=False),
        )
    ]


INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        *_member_fields(MEMBERS),
        pa.field("image_ext", pa.string(), nullable=False),  # "png", "jpg" or "npy.zst"
        pa.field("dtype", pa.string(), nullable=False),  # "uint8", or "int16": Hounsfield units
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

HF_INDEX_SCHEMA = pa.schema(
    [pa.field("key", pa.string(), nullable=False), *_member_fields(HF_MEMBERS)]
)  # rows in the order of the shard's own index

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
        # "bytes": in no shard; in a shard, to be skipped: "pixels", and "superseded" by a newer object
        pa.field("kind", pa.string(), nullable=False),
        pa.field("modality", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("object", pa.int64(), nullable=False),
        pa.field("unit", pa.int32(), nullable=False),
        pa.field("shard", pa.string()),  # its path, where it is in one
        pa.field("row", pa.int32()),  # of the shard's index
    ]
)

TABLES = {"quarantine": QUARANTINE_SCHEMA, "duplicates": DUPLICATES_SCHEMA}


class TableInfo(Settings):
    """A table of a snapshot."""

    path: str = Field(pattern=r"^tables/[a-z]+-[0-9a-f]{8}\.parquet$")
    num_rows: int = Field(ge=0)
    crc32c: int = Field(ge=0)


class HFTar(Settings):
    """Another HF version of a shard's samples."""

    num_bytes: int = Field(gt=0)
    crc32c: int = Field(ge=0)
    index_crc32c: int = Field(ge=0)


class ShardInfo(Settings):
    """One shard of a snapshot; `num_samples` counts index rows, excluded ones included.

    Attributes:
        crc32c: of the whole tar; names it in caches.
        hf: HF versions beside the one in the tar, by digest.
    """

    path: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*/[a-z0-9][a-z0-9_-]*-[0-9]{6}\.tar$")
    modality: str = Field(pattern=NAME_PATTERN)
    source: str = Field(pattern=NAME_PATTERN)
    num_samples: int = Field(gt=0)
    num_bytes: int = Field(gt=0)
    crc32c: int = Field(ge=0)
    index_crc32c: int = Field(ge=0)
    hf: dict[str, HFTar] = Field(default_factory=dict)


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
    """How one source came into the dataset.

    Attributes:
        plan_digests: of each part of the plan (a source that grows has several), keyed with the salt: they
            say whether two plans are equal, and nothing else.
    """

    modality: str = Field(pattern=NAME_PATTERN)
    source: str = Field(pattern=NAME_PATTERN)
    counts: Counts
    plan_digests: list[str]
    settings: dict[str, Any]


class Snapshot(Settings):
    """What a dataset holds at one time; immutable, named by its hash.

    Attributes:
        hf: parameters of the HF version inside the tars, by modality.
        hf_digests: its digest, by modality.
        hf_versions: parameters of further versions, by modality and digest (`ShardInfo.hf`).
        builds: in the order in which the sources were added.
        shards: sorted by path.
        tables: by the names of `TABLES`.
    """

    format_version: int = FORMAT_VERSION
    created_by: str
    modalities: list[str]
    shards: list[ShardInfo]
    hf: dict[str, dict[str, Any]]
    hf_digests: dict[str, str]
    hf_versions: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    size: int
    patch_size: int
    map_cell: int
    counts: Counts
    builds: list[SourceBuild]
    tables: dict[str, TableInfo]

    @property
    def hash(self) -> str:
        """First 16 hex digits of the sha256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.model_dump())).hexdigest()[:16]


def canonical_json(value: Any) -> bytes:
    """Serialize plain data so that equal data give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def index_path(shard_path: str) -> str:
    """Path of the index that belongs to the tar at `shard_path`."""
    return shard_path.removesuffix(".tar") + ".index.parquet"


def hf_tar_path(shard_path: str, digest: str) -> str:
    """Path of the tar that holds HF version `digest` of the shard at `shard_path`."""
    return f"{shard_path.removesuffix('.tar')}.hf-{digest}.tar"
