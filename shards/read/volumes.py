"""Volumes, rebuilt from the shards over which their slices lie.

The builder gives the units of one object (a NIfTI file, a multi-page TIFF), and the objects of one DICOM
series, a common `volume` and numbers (`slice`). A slice is in its volume whatever it looks like: one whose
pixels repeat another sample's is left out of training on images, and is still this volume's slice. Left out
here are only slices that newer objects replaced. What the builder refused (quarantined, such as a flat slice)
is in no shard: it leaves a gap in the numbers, and gaps are told, never closed. A file that repeats another
one byte by byte is in no shard either, so that its volume is there once, under the first one's labels.
A series of volumes in one file (4D) is one volume: the slices of the first, then those of the second.

Shapes: F slices that are there, H, W height and width as stored, S side of a view in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.read.crops import apply_crop, center_crop
from shards.read.reader import ShardReader
from shards.read.volume_rows import group_volumes, read_slice_rows, shared_labels, split_by_volume
from shards.read.windows import BYTE_WINDOW, CT_WINDOWS, REFERENCE_WINDOW, WindowName
from shards.schema import Snapshot
from shards.stores.store import Store, open_store
from shards.support.errors import ConfigError, DataError

Int = NDArray[np.int64]

READ_AHEAD = 64
"""Slices that are asked for at a time: enough to hide a store's delay, few enough to hold."""

TABLE_SCHEMA = pa.schema(
    [
        pa.field("volume", pa.string(), nullable=False),  # salted
        pa.field("modality", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("patient", pa.string()),  # salted
        pa.field("split", pa.string()),
        pa.field("labels", pa.string(), nullable=False),  # a JSON object: what all slices have in common
        pa.field("num_slices", pa.int32(), nullable=False),
        pa.field("num_missing", pa.int32(), nullable=False),
        pa.field("num_repeated", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume and where its slices lie.

    Attributes:
        name: salted id; the same in every snapshot of a dataset.
        modality: of all its slices.
        source: likewise.
        patient: salted; None where it is not known.
        labels: those that all slices have in common, `split` among them.
        varying: names of the labels that differ among slices.
        slices: (F,) their numbers, ascending.
        shards: (F,) of each its shard, as numbered in `Snapshot.shards`.
        rows: (F,) and the row of the shard's index.
        num_repeated: slices whose pixels another sample has too.
        group: equal for volumes that show the same patient or share pixels: no split may part them.
    """

    name: str
    modality: str
    source: str
    patient: str | None
    labels: dict[str, Any]
    varying: frozenset[str]
    slices: Int
    shards: Int
    rows: Int
    num_repeated: int
    group: int

    @property
    def split(self) -> str | None:
        """The part it belongs to, where its labels say so."""
        return self.labels.get("split")

    @property
    def num_missing(self) -> int:
        """Gaps between its first and its last slice; what is missing beyond them, nothing tells."""
        return int(self.slices[-1] - self.slices[0]) + 1 - len(self.slices)

    def pick(self, places: Int) -> Volume:
        """The same volume with some of its slices: those at `places` among the F."""
        return replace(self, slices=self.slices[places], shards=self.shards[places], rows=self.rows[places])


class VolumePixels(NamedTuple):
    """The slices of a volume.

    Attributes:
        pixels: (F, H, W) or (F, H, W, 3) RGB as stored: uint8, or int16 Hounsfield units.
        window: stored values that become 0 and 1 (`windows.to_unit_range`), the same for all slices.
        slices: (F,) int64, their numbers; two that follow each other differ by more than 1 at a gap.
    """

    pixels: NDArray[Any]
    window: tuple[float, float]
    slices: Int


def list_volumes(place: Store | Path | str, snapshot: Snapshot, modality: str | None = None) -> list[Volume]:
    """Find the volumes of a dataset from its indices; no pixels are read.

    Args:
        place: the dataset.
        snapshot: which of its states.
        modality: the only one to look at, None for all.

    Returns:
        Volumes of two slices or more, sorted by source and name.

    Raises:
        ConfigError: the dataset does not hold the modality.
        DataError: an index is missing or damaged, a number is given twice in a volume, or a volume names two
            patients.
        EnvironmentFault: the place cannot be reached.
    """
    if modality is not None and modality not in snapshot.modalities:
        allowed = ", ".join(snapshot.modalities)
        raise ConfigError(f"the dataset holds no '{modality}'", where="modality", allowed=allowed)
    table = read_slice_rows(open_store(place), snapshot, modality)
    parts = split_by_volume(table)
    groups = group_volumes(table, parts)
    found = [
        _describe(table, part, group, snapshot)
        for part, group in zip(parts, groups, strict=True)
        if len(part) > 1
    ]
    return sorted(found, key=lambda volume: (volume.modality, volume.source, volume.name))


def volume_table(volumes: Sequence[Volume]) -> pa.Table:
    """Show volumes as a table, `TABLE_SCHEMA`, a row each."""
    rows = [
        {"volume": v.name, "modality": v.modality, "source": v.source, "patient": v.patient}
        | {"split": v.split, "labels": json.dumps(v.labels, sort_keys=True), "num_slices": len(v.slices)}
        | {"num_missing": v.num_missing, "num_repeated": v.num_repeated}
        for v in volumes
    ]
    return pa.Table.from_pylist(rows, schema=TABLE_SCHEMA)


def read_volume(
    reader: ShardReader, volume: Volume, *, size: int | None = None, window: WindowName | None = None
) -> VolumePixels:
    """Read the slices of a volume in their order.

    Args:
        reader: of the snapshot that the volume was listed from.
        volume: which.
        size: S: of each slice the largest centered square at this size, as views without augmentation are
            cut, so that slices of unequal size come out alike; None: as stored.
        window: of CT, None for everything between air and hard bone. Ignored for 8-bit slices.

    Raises:
        DataError: a slice is damaged; slices differ in type, or in size where `size` is None.
        EnvironmentFault: the place cannot be reached.
    """
    slices = list(iterate_slices(reader, volume, size=size))
    pixels = np.stack(slices)
    return VolumePixels(pixels, volume_window(pixels.dtype, window), volume.slices.copy())


def iterate_slices(reader: ShardReader, volume: Volume, *, size: int | None = None) -> Iterator[NDArray[Any]]:
    """Read the slices of a volume one by one, holding few at a time; see `read_volume`.

    Yields:
        (H, W) or (H, W, 3), or (S, S) or (S, S, 3): all of one type and shape.

    Raises:
        DataError, EnvironmentFault: as `read_volume`.
    """
    places = list(zip(volume.shards.tolist(), volume.rows.tolist(), strict=True))
    first: NDArray[Any] | None = None
    for start in range(0, len(places), READ_AHEAD):
        for i, found in enumerate(reader.read_many(places[start : start + READ_AHEAD]), start):
            if isinstance(found, DataError):
                raise found
            image = found.image
            if size is not None:
                image = apply_crop(image, center_crop(*image.shape[:2]), size)
            first = image if first is None else first
            if (image.dtype, image.shape) != (first.dtype, first.shape):
                raise _unlike(reader, volume, i, image, first)
            yield image


def volume_window(dtype: np.dtype[Any], window: WindowName | None = None) -> tuple[float, float]:
    """Stored values that become 0 and 1: of CT, the low and high end of a named window."""
    if dtype == np.uint8:
        return BYTE_WINDOW
    if window is None:
        return REFERENCE_WINDOW
    level, width = CT_WINDOWS[window]
    return level - width / 2, level + width / 2


def _unlike(
    reader: ShardReader, volume: Volume, i: int, image: NDArray[Any], first: NDArray[Any]
) -> DataError:
    def words(pixels: NDArray[Any]) -> str:
        return f"{pixels.dtype} {' x '.join(str(n) for n in pixels.shape)}"

    is_size = image.dtype == first.dtype and image.ndim == first.ndim
    return DataError(
        f"slice {volume.slices[i]} of volume {volume.name} is {words(image)}, its first one {words(first)}",
        where=reader.where(int(volume.shards[i]), int(volume.rows[i])),
        allowed="slices of one size" if is_size else "slices of one type, all grey or all in color",
        fix="read the volume with a `size`" if is_size else "build what belongs together as one volume",
    )


def _describe(table: pa.Table, part: Int, group: int, snapshot: Snapshot) -> Volume:
    rows = table.take(pa.array(part))
    shards, slices = rows["shard"].to_numpy(), rows["slice"].to_numpy().astype(np.int64)
    labels, varying = shared_labels(rows["labels"])
    patients = rows["patient"].unique().drop_null()
    info = snapshot.shards[int(shards[0])]
    return Volume(
        name=rows["volume"][0].as_py(),
        modality=info.modality,
        source=info.source,
        patient=patients[0].as_py() if len(patients) else None,
        labels=labels,
        varying=varying,
        slices=slices,
        shards=shards,
        rows=rows["row"].to_numpy(),
        num_repeated=len(rows) - rows["link"].null_count,
        group=group,
    )
