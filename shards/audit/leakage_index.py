"""What the indices of a dataset say of leakage: equal bytes, pixels and patients, and near hashes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shards.audit.evaluated import Evaluated
from shards.audit.hamming import NearHashes
from shards.builder.plan_files import load_parts, plan_folder
from shards.builder.state import Salt
from shards.dataset import read_index
from shards.schema import ShardInfo, Snapshot
from shards.stores.store import Store
from shards.support.errors import ConfigError

COLUMNS = ("key", "pixel_hash", "dhash64", "patient", "image_size", "image_crc32c", "object")
NEAR_BITS = 7
"""Bits of 64 in which the hashes of copies may differ; see BENCHMARKS.md."""

Source = tuple[str, str]
Kind = Literal["bytes", "pixels", "near", "patient"]


class Hit(NamedTuple):
    """A sample that is one of the images: `kind` is bytes, pixels or patient."""

    kind: Kind
    image: int
    row: int
    key: str


@dataclass(frozen=True)
class Wanted:
    """What is looked for, each with the places of its images.

    Attributes:
        pixels: by pixel hash.
        jpegs: by checksum and size of the file as a shard would hold it, in one number.
        objects: by source, then object of its plan with the same bytes.
        patients: by salted name.
        near: hashes of the images, in all their frames and mirrors.
    """

    pixels: Mapping[str, list[int]]
    jpegs: Mapping[int, list[int]]
    objects: Mapping[Source, Mapping[int, list[int]]]
    patients: Mapping[str, list[int]]
    near: NearHashes


@dataclass(frozen=True)
class States:
    """What private state folders of builds tell: their salts, and which bytes each object had.

    Attributes:
        salts: of the folders.
        identities: by source: digests of bytes, and the object that came from them.
        missing: sources of the dataset that no folder has the plan of.
    """

    salts: Sequence[Salt] = ()
    identities: Mapping[Source, tuple[npt.NDArray[np.bytes_], npt.NDArray[np.int64]]] = field(
        default_factory=dict
    )
    missing: Sequence[str] = ()


def read_states(folders: Sequence[Path], snapshot: Snapshot) -> States:
    """Read the salts and the plans of a dataset's builds.

    Raises:
        ConfigError: a folder is no state folder.
        DataError: a plan is damaged.
    """
    salts = []
    for folder in folders:
        if not (folder / "salt").is_file():
            raise ConfigError(
                "no state folder: it has no salt",
                where=folder,
                fix="name the --state of `frepa shards build`",
            )
        salts.append(Salt((folder / "salt").read_text().strip().encode()))
    identities, missing = {}, []
    for build in snapshot.builds:
        paths = [plan_folder(folder, build.modality, build.source, build.settings) for folder in folders]
        parts = [part for path in paths if path.is_dir() for part in load_parts(path)]
        if not parts:
            missing.append(f"{build.modality}/{build.source}")
            continue
        rows = pa.concat_tables(
            part.objects.select(["identity", "object", "status", "duplicate_of"]) for part in parts
        )
        rows = rows.filter(pc.is_in(rows["status"], pa.array(["image", "duplicate"])))
        objects = np.where(rows["duplicate_of"].to_numpy() >= 0, rows["duplicate_of"], rows["object"])
        names = np.array([value.hex() for value in rows["identity"].to_pylist()], np.bytes_)
        order = np.argsort(names, kind="stable")
        identities[build.modality, build.source] = (names[order], objects[order].astype(np.int64))
    return States(salts, identities, missing)


def make_wanted(images: Sequence[Evaluated], patients: Mapping[int, str], states: States) -> Wanted:
    """Collect what is looked for.

    Args:
        images: the evaluation's.
        patients: names by place of the file; where one is missing, what the file says.
        states: of the dataset's builds.
    """
    pixels, jpegs, salted = defaultdict(list), defaultdict(list), defaultdict(list)
    objects: dict[Source, dict[int, list[int]]] = {source: defaultdict(list) for source in states.identities}
    for place, image in enumerate(images):
        for digest in image.pixel_hashes:
            pixels[digest].append(place)
        if image.jpeg is not None:
            jpegs[int(_one_number(*image.jpeg))].append(place)
        name = patients.get(image.file) or image.patient
        for salt in states.salts if name else ():
            salted[salt.patient(name or "")].append(place)
        for source, (known, numbers) in states.identities.items():
            for identity in image.identities:
                found = np.searchsorted(known, identity.hex().encode())
                if found < len(known) and known[found] == identity.hex().encode():
                    objects[source][int(numbers[found])].append(place)
    hashes = np.array(sorted({value for image in images for value in image.dhashes}), np.uint64)
    return Wanted(dict(pixels), dict(jpegs), objects, dict(salted), NearHashes(hashes, NEAR_BITS))


def scan_index(
    store: Store, shard: ShardInfo, excluded: npt.NDArray[np.int64], wanted: Wanted
) -> tuple[list[Hit], npt.NDArray[np.int64]]:
    """Look through the index of a shard.

    Args:
        store: the dataset.
        shard: of it.
        excluded: rows that no reader sees.
        wanted: what is looked for.

    Returns:
        The samples that are images of the evaluation, and the rows whose hash is near one of theirs.

    Raises:
        DataError, EnvironmentFault: as of `shards.dataset.read_index`.
    """
    table = read_index(store, shard, COLUMNS)
    is_kept = np.ones(table.num_rows, bool)
    is_kept[excluded] = False
    hits: list[Hit] = []

    def add(kind: Kind, rows: npt.NDArray[np.int64], images: Iterable[list[int]]) -> None:
        for row, places in zip(rows.tolist(), images, strict=True):
            if is_kept[row]:
                hits.extend(Hit(kind, place, row, table["key"][row].as_py()) for place in places)

    files = _one_number(table["image_size"].to_numpy(), table["image_crc32c"].to_numpy())
    rows = np.flatnonzero(np.isin(files, np.array(list(wanted.jpegs), np.uint64)))
    add("bytes", rows, (wanted.jpegs[int(files[row])] for row in rows))
    numbers = wanted.objects.get((shard.modality, shard.source), {})
    rows = np.flatnonzero(np.isin(table["object"].to_numpy(), list(numbers)))
    add("bytes", rows, (numbers[table["object"][int(row)].as_py()] for row in rows))
    pixels = _find(table["pixel_hash"], wanted.pixels)
    add("pixels", pixels, (wanted.pixels[table["pixel_hash"][int(row)].as_py()] for row in pixels))
    patients = _find(table["patient"], wanted.patients)
    add("patient", patients, (wanted.patients[table["patient"][int(row)].as_py()] for row in patients))
    is_near = wanted.near.is_near(table["dhash64"].to_numpy()) & is_kept
    return list(dict.fromkeys(hits)), np.flatnonzero(is_near)


def _find(column: pa.ChunkedArray, known: Mapping[str, list[int]]) -> npt.NDArray[np.int64]:
    return np.flatnonzero(pc.is_in(column, pa.array(list(known), pa.string())).to_numpy())


def _one_number(size: npt.ArrayLike, crc32c: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    return (np.asarray(size, np.uint64) << np.uint64(32)) | np.asarray(crc32c, np.uint64)
