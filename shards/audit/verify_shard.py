"""Audits one shard: runs in a worker process, and holds one sample and one piece of the tar at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.audit.findings import Findings
from shards.audit.keys import Hashes, hash_keys
from shards.audit.verify_tar import check_layout, walk_tar
from shards.builder.canonical import pixel_hash
from shards.builder.members import Stored, decode_json, decode_npy, decode_npy_zst, decode_stored
from shards.dataset import read_hf_index, read_index
from shards.hf.maps import hf_map
from shards.hf.tokens import HFParams, hf_response, hf_scores
from shards.schema import (
    HF_INDEX_SCHEMA,
    HF_MEMBERS,
    INDEX_SCHEMA,
    MEMBERS,
    ShardInfo,
    hf_tar_path,
    index_path,
)
from shards.stores.sequential import SequentialReader
from shards.stores.store import MissingFile, Store
from shards.support.errors import DataError

RANK_TOLERANCE, MAP_TOLERANCE = 1e-4, 1
"""Another processor rounds otherwise: how far a rank may rise, as a share of the highest score, and by how
much a cell of the response map may differ, in coded steps."""

MAX_LISTED_OF_SHARD = 20

_REBUILD = "restore the shard, or build the dataset again"
_Row = dict[str, Any]


@dataclass(frozen=True)
class ShardCheck:
    """All a worker needs to audit one shard.

    Attributes:
        store: the dataset.
        shard: what the snapshot says of it.
        source: what KEY.json calls its source: the name at the time it was built.
        exclusions: (row, key) of its samples that the duplicates table excludes.
        hf: parameters by digest of the HF versions to compute afresh; "" is the one in the tar.
        patch_size: of the tokens, in pixels.
        map_cell: of the response maps, in pixels.
        is_deep: read the tars, too.
    """

    store: Store
    shard: ShardInfo
    source: str
    exclusions: Sequence[tuple[int, str]]
    hf: Mapping[str, HFParams]
    patch_size: int
    map_cell: int
    is_deep: bool


@dataclass
class ShardFindings:
    """What an audit of a shard found.

    Attributes:
        path: of the shard.
        findings: what is wrong.
        key_hashes: (samples,) of the keys, by `hash_keys`.
        num_rounded: HF members that agree within rounding, but not byte for byte.
    """

    path: str
    num_samples: int
    findings: Findings = field(default_factory=lambda: Findings(MAX_LISTED_OF_SHARD))
    key_hashes: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))
    num_rounded: int = 0


def check_shard(task: ShardCheck) -> ShardFindings:
    """Audit a shard, its index and its HF versions.

    Raises:
        EnvironmentFault: the store cannot be reached.
    """
    found = ShardFindings(task.shard.path, task.shard.num_samples)
    has_tar = _check_file(task.store, task.shard.path, task.shard.num_bytes, found.findings)
    table = _read_index(task, "", found.findings)
    if table is not None:
        found.key_hashes = hash_keys(table["key"])
        _check_exclusions(task, table, found.findings)
    walks = [_walk(task, "", table, found.findings, has_tar)]
    digests = sorted(task.shard.hf)
    for digest in digests:
        version = task.shard.hf[digest]
        path = hf_tar_path(task.shard.path, digest)
        has_tar = _check_file(task.store, path, version.num_bytes, found.findings)
        hf_table = _read_index(task, digest, found.findings)
        if table is not None and hf_table is not None and not hf_table["key"].equals(table["key"]):
            what = "its keys are not those of the shard's own index, in their order"
            found.findings.add("hf_keys", index_path(path), what, fix="delete it and run rehf again")
            hf_table = None
        walks.append(_walk(task, digest, hf_table, found.findings, has_tar))
    if task.is_deep and table is not None:
        _check_samples(task, table, ["", *digests], walks, found)
    for walk in walks:  # to the end of each tar
        for _ in walk:
            pass
    return found


def _check_file(store: Store, path: str, num_bytes: int, findings: Findings) -> bool:
    """Check that a file is there with its size; return whether it is there at all."""
    size = store.num_bytes(path)
    if size is None:
        findings.add("missing_file", path, "there is no such file", fix=_REBUILD)
    elif size != num_bytes:
        findings.add("file_size", path, f"{size} bytes, the snapshot says {num_bytes}", fix=_REBUILD)
    return size is not None


def _read_index(task: ShardCheck, digest: str, findings: Findings) -> pa.Table | None:
    """Read an index and check that its rows fit into the tar; None when it cannot be used."""
    tar = hf_tar_path(task.shard.path, digest) if digest else task.shard.path
    num_bytes = task.shard.hf[digest].num_bytes if digest else task.shard.num_bytes
    members, schema = (HF_MEMBERS, HF_INDEX_SCHEMA) if digest else (MEMBERS, INDEX_SCHEMA)
    path = index_path(tar)
    try:
        if digest:
            table = read_hf_index(task.store, task.shard, digest)
        else:
            table = read_index(task.store, task.shard)
    except MissingFile:
        findings.add("missing_file", path, "there is no such file", fix=_REBUILD)
        return None
    except DataError as error:
        findings.add("index", path, error.what, fix=error.fix)
        return None
    except pa.ArrowException as error:
        findings.add("index", path, f"cannot be read as parquet ({type(error).__name__})", fix=_REBUILD)
        return None
    if not table.schema.equals(schema):
        findings.add("index", path, "not the columns of this format", fix=_REBUILD)
        return None
    layout = check_layout(_matrix(table, members, "offset"), _matrix(table, members, "size"), num_bytes)
    if layout.kind:
        findings.add(layout.kind, path, layout.what, fix=_REBUILD)
    if not layout.is_ordered:
        return None
    return table


def _matrix(table: pa.Table, members: Sequence[str], what: str) -> npt.NDArray[np.int64]:
    """(rows, members) offsets or sizes."""
    return np.stack([table[f"{member}_{what}"].to_numpy() for member in members], axis=1)


def _check_exclusions(task: ShardCheck, table: pa.Table, findings: Findings) -> None:
    for row, key in task.exclusions:
        if not 0 <= row < table.num_rows or table["key"][row].as_py() != key:
            what = f"the duplicates table excludes row {row}, which is not this sample"
            findings.add("exclusion", task.shard.path, what, key=key, fix="build again, or merge again")


def _walk(
    task: ShardCheck, digest: str, table: pa.Table | None, findings: Findings, has_tar: bool
) -> Iterator[dict[str, bytes] | None]:
    """Members of each row from front to back, then the checksum of the whole; nothing unless deep."""
    if not (task.is_deep and has_tar):
        return
    path = hf_tar_path(task.shard.path, digest) if digest else task.shard.path
    info = task.shard.hf[digest] if digest else task.shard
    reader = SequentialReader(task.store, path, info.num_bytes)
    if table is not None:
        members = HF_MEMBERS if digest else MEMBERS
        yield from walk_tar(reader, path, table.to_pylist(), members, info.num_bytes, findings)
    if reader.finish() != info.crc32c:
        findings.add("tar_bytes", path, "the checksum of the whole tar differs", fix=_REBUILD)


def _check_samples(
    task: ShardCheck,
    table: pa.Table,
    digests: Sequence[str],
    walks: Sequence[Iterator[dict[str, bytes] | None]],
    found: ShardFindings,
) -> None:
    """Walk the tar and those of the HF versions side by side, and check what is in the members."""
    for row in table.to_pylist():
        parts = [next(walk, None) for walk in walks]
        pixels = None
        if parts[0] is not None:
            _check_json(task, row, parts[0]["json"], found.findings)
            pixels = _check_image(task, row, parts[0]["image"], found.findings)
        if pixels is None:
            continue
        for digest, part in zip(digests, parts, strict=True):
            params = task.hf.get(digest)
            if part is not None and params is not None:
                path = hf_tar_path(task.shard.path, digest) if digest else task.shard.path
                found.num_rounded += _check_hf(task, path, row["key"], pixels, params, part, found.findings)


def _check_image(task: ShardCheck, row: _Row, data: bytes, findings: Findings) -> Stored | None:
    """Decode an image and compare it with the index; None when it is not what was stored."""

    def add(kind: str, what: str, fix: str = _REBUILD) -> None:
        findings.add(kind, task.shard.path, what, key=row["key"], fix=fix)

    try:
        pixels = decode_stored(data, row["image_ext"], row["dtype"])
    except DataError as error:
        add("image", error.what)
        return None
    shape = (row["height"], row["width"]) + ((row["channels"],) if row["channels"] != 1 else ())
    if pixels.shape != shape or pixels.dtype != row["dtype"]:
        add("image", f"decodes to {pixels.dtype} {pixels.shape}, the index says {row['dtype']} {shape}")
        return None
    if pixel_hash(pixels) != row["pixel_hash"]:
        is_lossy = row["image_ext"] in ("jpg", "webp")
        fix = (
            "its bytes are whole: this machine's decoder differs from the one of the build"
            if is_lossy
            else ""
        )
        add("pixel_hash", "decodes to other pixels than those of the build", fix or _REBUILD)
        return None
    return pixels


_IN_BOTH = frozenset({"modality", "source", "labels", "height", "width", "channels", "object", "unit"})


def _check_json(task: ShardCheck, row: _Row, data: bytes, findings: Findings) -> None:
    """Compare KEY.json with the index: all that the builder writes in both."""
    try:
        facts, labels = decode_json(data), decode_json(row["labels"].encode())
    except DataError as error:
        findings.add("json", task.shard.path, error.what, key=row["key"], fix=_REBUILD)
        return
    known = {**row, "labels": labels, "modality": task.shard.modality, "source": task.source}
    both = (facts.keys() & known.keys()) | _IN_BOTH
    differing = sorted(name for name in both if name not in facts or facts[name] != known[name])
    if differing:
        what = f"KEY.json and the index differ in {', '.join(differing)}"
        findings.add("json", task.shard.path, what, key=row["key"], fix=_REBUILD)


def _check_hf(
    task: ShardCheck,
    path: str,
    key: str,
    pixels: Stored,
    params: HFParams,
    part: Mapping[str, bytes],
    findings: Findings,
) -> int:
    """Compare tokens and map with fresh ones; return how many agree within rounding only."""
    response = hf_response(pixels, params)
    fresh = hf_map(response, task.map_cell)
    try:
        tokens, stored = decode_npy(part["hf"]), decode_npy_zst(part["hfmap"], "uint8")
    except DataError as error:
        findings.add("hf", path, error.what, key=key, fix=_REBUILD)
        return 0
    num_rounded = 0
    for name, is_close, is_equal in (
        ("hf.npy", *compare_ranks(tokens, hf_scores(response, task.patch_size))),
        ("hfmap", *_compare_maps(stored, fresh)),
    ):
        if not is_close:
            what = f"{name} is not what the snapshot's parameters give for these pixels"
            findings.add("hf", path, what, key=key, fix=_REBUILD)
        num_rounded += is_close and not is_equal
    return num_rounded


def compare_ranks(tokens: npt.NDArray[Any], scores: npt.NDArray[np.floating[Any]]) -> tuple[bool, bool]:
    """Whether all patches stand in the order of their scores: within rounding, and exactly."""
    if tokens.dtype != np.uint16 or tokens.shape != scores.shape:
        return False, False
    if not np.array_equal(np.sort(tokens), np.arange(len(scores))):
        return False, False
    if np.array_equal(tokens, np.argsort(-scores, kind="stable")):
        return True, True
    ranked = scores[tokens]
    rises = ranked[1:] - np.minimum.accumulate(ranked)[:-1]
    return bool((rises <= RANK_TOLERANCE * scores.max()).all()), False


def _compare_maps(stored: npt.NDArray[Any], fresh: npt.NDArray[np.uint8]) -> tuple[bool, bool]:
    """Whether two response maps agree: within rounding, and exactly."""
    if stored.shape != fresh.shape:
        return False, False
    difference = np.abs(stored.astype(np.int16) - fresh)
    return bool((difference <= MAP_TOLERANCE).all()), not difference.any()
