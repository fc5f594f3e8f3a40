"""Images of an evaluation as a build would have stored them: their pixels, hashes and patterns.

The very functions of the builder read, scale and hash them, with the settings that the dataset's snapshot
tells of each of its sources, so that equal files give equal hashes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import google_crc32c
import numpy as np

from shards.audit.patterns import CROPPED, Patterns, cut_frames, make_patterns, mirror_all
from shards.builder.canonical import dhash64, pixel_hash, resize_to_canonical, strip_jpeg
from shards.builder.config import BuildConfig
from shards.builder.objects import PlannedObject, content_identity, open_planned, reading_object
from shards.builder.series import VolumeWindows
from shards.formats.common import Decoded, Header, Pixels, Raw, ReadOptions, Unreadable
from shards.formats.intensity import IntensityRule, to_stored
from shards.formats.registry import read_header
from shards.hf.modalities import find_modality
from shards.schema import Snapshot
from shards.stores.blobs import Blob, FileBlob

_JPEG = b"\xff\xd8"
_CAMERAS = (1.0, 4 / 3, 3 / 2)  # width over height of the pictures that cameras make


class Reading(NamedTuple):
    """How a source of the dataset was read."""

    size: int
    intensity: IntensityRule
    options: ReadOptions


@dataclass(frozen=True)
class Evaluated:
    """One image (a slice or page of a file that has several).

    Attributes:
        file: place of the file in the list.
        unit: number in the file.
        pixel_hashes: of the image as any source of the dataset would store it.
        jpeg: size and crc32c of the file as a shard would hold it verbatim, None where it would not.
        identities: of the file's bytes, as plans of builds name them.
        dhashes: of all its frames and mirrors.
        patterns: see `shards.audit.patterns`.
        patient: name, where the file itself says it.
    """

    file: int
    unit: int
    pixel_hashes: frozenset[str]
    jpeg: tuple[int, int] | None
    identities: frozenset[bytes]
    dhashes: frozenset[int]
    patterns: Patterns
    patient: str | None


@dataclass(frozen=True)
class EvaluatedTask:
    """All a worker needs to read some files: one, or those of a DICOM series.

    Attributes:
        files: path and place in the list, of each.
        readings: of the dataset.
    """

    files: Sequence[tuple[str, int]]
    readings: Sequence[Reading]


@dataclass(frozen=True)
class EvaluatedResult:
    """What became of the files of a task: images, and why some could not be read, by place."""

    images: Sequence[Evaluated]
    unreadable: Mapping[int, str]


def readings_of(snapshot: Snapshot, modalities: Collection[str]) -> list[Reading]:
    """The different ways in which the sources of these modalities of a dataset were read."""
    found: dict[Reading, None] = {}
    fields = set(BuildConfig.model_fields)
    for build in snapshot.builds:
        if build.modality in modalities:
            settings = {name: value for name, value in build.settings.items() if name in fields}
            config = BuildConfig.model_validate(settings)
            found.setdefault(Reading(snapshot.size, config.intensity_rule(), config.read_options()))
    if not found:  # a dataset that does not say: the modalities' defaults
        for name in modalities:
            found.setdefault(Reading(snapshot.size, find_modality(name).intensity, ReadOptions()))
    return list(found)


def plan_tasks(files: Sequence[Path], readings: Sequence[Reading]) -> Iterator[EvaluatedTask]:
    """Cut files into tasks: a DICOM series is one, since its slices share a window."""
    series: dict[str, list[tuple[str, int]]] = {}
    for place, path in enumerate(files):
        header = (
            _header(path, readings[0].options)
            if path.suffix.lower() in ("", ".dcm", ".dicom", ".ima")
            else None
        )
        if header is not None and header.series is not None:
            series.setdefault(header.series, []).append((str(path), place))
        else:
            yield EvaluatedTask([(str(path), place)], readings)
    for members in series.values():
        yield EvaluatedTask(members, readings)


def read_evaluated(task: EvaluatedTask) -> EvaluatedResult:
    """Read the images of a task in every way of the dataset."""
    images: dict[tuple[int, int], Evaluated] = {}
    unreadable: dict[int, str] = {}
    files = [file for path, place in task.files if (file := _open(path, place, task.readings[0], unreadable))]
    files.sort(key=lambda file: file.item.first_slice)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoders' remarks on odd files
        for reading in task.readings:
            for file, unit, decoded, stored in _decode_all(files, reading, unreadable):
                key = (file.item.number, unit)
                if key not in images:
                    images[key] = _describe(file, unit, resize_to_canonical(stored, reading.size))
                elif decoded.pixels.dtype != np.uint8:  # 8-bit images are stored alike by every rule
                    images[key] = _describe_also(images[key], resize_to_canonical(stored, reading.size))
    return EvaluatedResult(list(images.values()), unreadable)


def preview(task: EvaluatedTask, unit: int) -> Raw:
    """One image of a task with a single file, as it would be stored; flat grey where it cannot be read."""
    (path, place), reading = task.files[0], task.readings[0]
    file = _open(path, place, reading, {})
    for _, number, _, stored in _decode_all([file] if file else [], reading, {}):
        if number == unit:
            return resize_to_canonical(stored, reading.size)
    return np.full((64, 64), 128, np.uint8)


class _File(NamedTuple):
    """A file as a worker of a build would meet it."""

    item: PlannedObject
    blob: Blob
    patient: str | None
    jpeg: tuple[int, int] | None
    identities: frozenset[bytes]


def _open(path: str, place: int, reading: Reading, unreadable: dict[int, str]) -> _File | None:
    try:
        blob: Blob = FileBlob(path, Path(path).stat().st_size)
        header = read_header(blob, reading.options)
        data = blob.read()
    except (Unreadable, OSError) as error:
        unreadable[place] = str(error)
        return None
    item = _as_planned(path, place, blob, header)
    jpeg = strip_jpeg(data) if data[:2] == _JPEG else None
    facts = (len(jpeg), google_crc32c.value(jpeg)) if jpeg else None
    return _File(item, blob, header.patient, facts, _identities(item.identity, data))


def _decode_all(
    files: Sequence[_File], reading: Reading, unreadable: dict[int, str]
) -> Iterator[tuple[_File, int, Decoded, Raw]]:
    """Every unit as it was decoded, and as a source would store it but for its size."""
    items = [file.item for file in files]
    series = {items[0].volume: items} if items and items[0].in_series and items[0].volume else {}
    windows = VolumeWindows(series, reading.intensity, reading.options, ())
    for file in files:
        windows.prepare(file.item)
        for unit, _ in file.item.units:
            try:
                with ExitStack() as stack:
                    opened, decoded = None, windows.take(file.item, unit)
                    if decoded is None:
                        opening = open_planned(file.item, reading.options, (), file.blob)
                        _, opened = stack.enter_context(opening)
                        with reading_object(file.item.uri, ()):
                            decoded = opened.decode(unit)
                    window = windows.window(file.item, opened, decoded)
                yield file, unit, decoded, to_stored(decoded, reading.intensity, window)
            except Unreadable as error:
                unreadable[file.item.number] = str(error)


def _describe(file: _File, unit: int, pixels: Raw) -> Evaluated:
    known = describe_pixels(file.item.number, pixels)
    return replace(known, unit=unit, jpeg=file.jpeg, identities=file.identities, patient=file.patient)


def describe_pixels(number: int, pixels: Raw) -> Evaluated:
    """An image of which nothing is known but its pixels, as they are stored; it is the number's."""
    frames = cut_frames(pixels)
    return Evaluated(
        file=number,
        unit=0,
        pixel_hashes=frozenset([pixel_hash(pixels)]),
        jpeg=None,
        identities=frozenset(),
        dhashes=_dhashes(pixels, frames),
        patterns=make_patterns(frames),
        patient=None,
    )


def _describe_also(known: Evaluated, pixels: Raw) -> Evaluated:
    """The same image, stored in another way too."""
    return replace(
        known,
        pixel_hashes=known.pixel_hashes | {pixel_hash(pixels)},
        dhashes=known.dhashes | _dhashes(pixels, cut_frames(pixels)),
    )


def _dhashes(pixels: Raw, frames: Sequence[Pixels]) -> frozenset[int]:
    """Of the image as it is stored, of its frames, of these with a dark border, and mirrored."""
    bordered = [_on_black(frame, aspect) for frame in frames[:CROPPED] for aspect in _CAMERAS]
    cut = [image for frame in [*frames[1:], *bordered] for image in mirror_all(frame)[:2]]
    return frozenset(dhash64(image) for image in [*mirror_all(pixels), *cut])


def _on_black(image: Pixels, aspect: float) -> Pixels:
    """On the black ground of a wider (or higher) picture: a stored copy may have kept its border."""
    height, width = image.shape[:2]
    across, down = max(0, round(height * aspect) - width), max(0, round(width / aspect) - height)
    left, top = across // 2, down // 2
    black = cv2.BORDER_CONSTANT
    laid = cv2.copyMakeBorder(image, top, down - top, left, across - left, black, value=0)
    return np.asarray(laid, np.uint8)


def _identities(local: bytes, data: bytes) -> frozenset[bytes]:
    """How plans name these bytes: by their digest, and by the ETag that S3 gives to an object put at once."""
    etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
    remote = hashlib.sha256(f"{etag}|{len(data)}".encode()).digest()[: len(local)]
    return frozenset([local, remote])


def _as_planned(path: str, place: int, blob: Blob, header: Header) -> PlannedObject:
    """The file as a worker of a build would meet it."""
    is_volume = header.is_volume or header.series is not None
    return PlannedObject(
        number=place,
        name=path.encode(errors="surrogateescape"),
        uri=path,
        num_bytes=blob.num_bytes,
        version="",
        identity=content_identity(blob, ""),
        labels="{}",
        facts="{}",
        patient=None,
        volume=(header.series or path) if is_volume else None,
        first_slice=int(header.place * 1000),
        in_series=header.series is not None,
        units=tuple((unit, "") for unit in range(header.num_units)),
    )


def _header(path: Path, options: ReadOptions) -> Header | None:
    try:
        return read_header(FileBlob(str(path), path.stat().st_size), options)
    except (Unreadable, OSError):
        return None
