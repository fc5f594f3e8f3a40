"""Pictures to evaluate on, in files or in shards, each with a name and a digest of its content.

Shapes: n pictures, B of a batch, S side of a view.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow.compute as pc

from frepa_dist.evaluate.views import (
    Grid,
    View,
    center_view,
    list_images,
    read_pixels,
    stream_config,
    view_of_file,
)
from shards.audit.stored import StoredImages
from shards.dataset import has_dataset, load_snapshot, read_index
from shards.formats.common import Pixels
from shards.hf.modalities import find_modality
from shards.read.crops import apply_crop, center_crop
from shards.read.kept import Place, exclusion_rows
from shards.read.reader import Sample, ShardReader
from shards.read.views import three_planes
from shards.read.volume_rows import read_duplicates
from shards.read.windows import to_bytes
from shards.stores.store import is_remote
from shards.support.errors import ConfigError, DataError
from shards.support.progress import track

T = TypeVar("T")
_COLUMNS = ("key", "pixel_hash", "dtype", "labels", "patient", "volume")


class Pictures(Protocol):
    """Pictures by number; may be pickled, to be read by other processes."""

    @property
    def names(self) -> list[str]:
        """Of each: of a file its path below the folder, of a sample its key."""

    @property
    def where(self) -> str:
        """The folder or the dataset."""

    def digests(self) -> list[str]:
        """A hash of the content of each: of a file's bytes, of a sample's pixels."""

    def pixels(self, numbers: Sequence[int], size: int) -> Pixels:
        """Views (B, 3, S, S) uint8, the center square.

        Raises:
            DataError: a picture cannot be read.
        """

    def views(self, numbers: Sequence[int], grid: Grid) -> list[View]:
        """Views with their patches ranked by high frequency.

        Raises:
            ConfigError: which patches are high-frequency is not known.
            DataError: a picture cannot be read.
        """

    def hf_version(self) -> str:
        """What decides which patches are high-frequency; raises as `views`."""


@dataclass(frozen=True)
class FilePictures:
    """Image files.

    Attributes:
        folder: that names are relative to.
        names: of the files; absolute where they lie elsewhere.
        modality: of them all, where their patches are to be ranked.
    """

    folder: Path
    names: list[str]
    modality: str | None = None

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.folder)

    def digests(self) -> list[str]:
        """See `Pictures`: sha256 of the bytes, as they were when first asked for."""
        return self._digests

    @cached_property
    def _digests(self) -> list[str]:
        found = in_threads(partial(_digest_of_file, self.folder), self.names)
        return list(track(found, total=len(self.names), description="hash images"))

    def pixels(self, numbers: Sequence[int], size: int) -> Pixels:
        """See `Pictures`."""
        paths = [self.folder / self.names[number] for number in numbers]
        return np.stack(list(in_threads(partial(read_pixels, size=size), paths)))

    def views(self, numbers: Sequence[int], grid: Grid) -> list[View]:
        """See `Pictures`."""
        params = find_modality(self._known_modality()).hf
        paths = [self.folder / self.names[number] for number in numbers]
        return list(in_threads(partial(view_of_file, params=params, grid=grid), paths))

    def hf_version(self) -> str:
        """See `Pictures`: the parameters of the modality."""
        return find_modality(self._known_modality()).hf.model_dump_json()

    def _known_modality(self) -> str:
        if self.modality is None:
            raise ConfigError(
                "which patches are high-frequency depends on the modality, and files do not say it",
                where=self.folder,
                fix="name it with --modality, or build a dataset with `frepa shards build`",
            )
        return self.modality


def _digest_of_file(folder: Path, name: str) -> str:
    try:
        stat = (folder / name).stat()
        return _digest_at(str(folder / name), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=folder / name) from error


@lru_cache(maxsize=1 << 18)  # a suite asks for those of a task once for every encoder
def _digest_at(path: str, _num_bytes: int, _changed: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def in_threads(function: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T]:
    """Apply a function in threads, in order: decoders and hashes release the interpreter's lock."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(function, items)


class Repeat(NamedTuple):
    """A sample with the same pixels as another.

    Attributes:
        original: key of that other sample.
        patient, volume: of the one that repeats it, salted; None where they are not known.
    """

    original: str
    patient: str | None
    volume: str | None


@dataclass(frozen=True)
class ShardPictures:
    """Samples of a dataset; one thread at a time may read them.

    Attributes:
        reader: of the dataset.
        names: keys.
        places: shard and row of each.
        hashes: of their pixels, with their type.
        info: labels of each, as the index holds them.
        patients: of each, salted; None where it is not known.
        volumes: that each is a slice of, salted; None of a single image.
        repeats: of the samples that are left out since they repeat others.
    """

    reader: ShardReader
    names: list[str]
    places: list[Place]
    hashes: list[str]
    info: list[dict[str, Any]] = field(default_factory=list)
    patients: list[str | None] = field(default_factory=list)
    volumes: list[str | None] = field(default_factory=list)
    repeats: list[Repeat] = field(default_factory=list)

    @property
    def where(self) -> str:
        """The dataset."""
        return self.reader.store.uri

    def digests(self) -> list[str]:
        """See `Pictures`: the index knows them."""
        return self.hashes

    def pixels(self, numbers: Sequence[int], size: int) -> Pixels:
        """See `Pictures`; CT in the reference window."""
        return np.stack([_center_pixels(sample, size) for sample in self._read(numbers)])

    def views(self, numbers: Sequence[int], grid: Grid) -> list[View]:
        """See `Pictures`."""
        config = stream_config(self.where, grid)
        return [center_view(sample, config) for sample in self._read(numbers)]

    def hf_version(self) -> str:
        """See `Pictures`: the digests of the snapshot."""
        return json.dumps(self.reader.snapshot.hf_digests, sort_keys=True)

    def take(self, numbers: Sequence[int]) -> ShardPictures:
        """Some of the samples, to be read: what the dataset tells of them stays behind."""
        return ShardPictures(
            self.reader,
            [self.names[number] for number in numbers],
            [self.places[number] for number in numbers],
            [self.hashes[number] for number in numbers],
        )

    def stored(self) -> StoredImages:
        """The samples, to be looked for in another dataset."""
        return StoredImages(self.reader.store, self.reader.snapshot.shards, self.places, self.names)

    def _read(self, numbers: Sequence[int]) -> Iterator[Sample]:
        for sample in self.reader.read_many([self.places[number] for number in numbers]):
            if isinstance(sample, DataError):
                raise sample
            yield sample


def _center_pixels(sample: Sample, size: int) -> Pixels:
    image = sample.image
    pixels = to_bytes(apply_crop(image, center_crop(*image.shape[:2]), size))
    return three_planes(pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def is_dataset(images: Path | str) -> bool:
    """Whether a place is a dataset of shards, and not a folder of files."""
    return is_remote(images) or has_dataset(images)


def open_pictures(images: Path | str, modality: str | None = None) -> FilePictures | ShardPictures:
    """All pictures of a folder, or of a dataset of shards but for those that repeat others.

    Args:
        images: a folder, or a dataset (a folder or `s3://bucket/prefix`).
        modality: of files: what they are; of a dataset: the only one to use.

    Raises:
        ConfigError: no such modality.
        DataError: there are none, or the dataset is damaged.
    """
    if is_dataset(images):
        return open_shards(images, modality)
    if modality is not None:
        find_modality(modality)
    folder = Path(images)
    return FilePictures(folder, [str(path.relative_to(folder)) for path in list_images(folder)], modality)


def open_shards(root: Path | str, modality: str | None = None) -> ShardPictures:
    """See `open_pictures`."""
    snapshot = load_snapshot(root)
    if modality is not None and modality not in snapshot.modalities:
        raise ConfigError(
            f"the dataset holds no '{modality}'", where=root, allowed=", ".join(snapshot.modalities)
        )
    reader = ShardReader(root, snapshot)
    excluded = exclusion_rows(root, snapshot)
    replaced, repeats = read_duplicates(root, snapshot)
    found = ShardPictures(reader, [], [], [])
    for number, shard in enumerate(snapshot.shards):
        if modality not in (None, shard.modality):
            continue
        table = read_index(root, shard, [*_COLUMNS])
        found.repeats.extend(
            Repeat(original, table["patient"][row].as_py(), table["volume"][row].as_py())
            for row, original in repeats[number].items()
            if row not in replaced[number]
        )
        kept = np.delete(np.arange(table.num_rows), excluded.get(number, []))
        table = table.take(kept)
        found.names.extend(table["key"].to_pylist())
        found.places.extend((number, row) for row in kept.tolist())
        found.hashes.extend(pc.binary_join_element_wise(table["pixel_hash"], table["dtype"], "-").to_pylist())
        found.info.extend(json.loads(text) for text in table["labels"].to_pylist())
        found.patients.extend(table["patient"].to_pylist())
        found.volumes.extend(table["volume"].to_pylist())
    if not found.names:
        raise DataError("the dataset holds no samples", where=root)
    return found
