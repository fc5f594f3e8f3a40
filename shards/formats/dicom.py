"""DICOM: single images, slices of series, multi-frame objects, in all transfer syntaxes pylibjpeg decodes.

The header is read from the first 64 KiB, more only where the tags before the pixels are longer. Only the tags
named here are ever looked at, and of them only numbers and codes from fixed lists enter the dataset: nothing
that was typed, and nothing that names a person, a place, a time or a device. pydicom is kept from quoting
tags in warnings and logs.

A frame becomes what the standard's pipeline says up to the modality's values (PS3.3 C.11): stored values ->
modality LUT or rescale -> MONOCHROME1 inverted; the VOI window is passed on, not applied.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_partial
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from shards.formats.common import (
    MAX_UNITS,
    Decoded,
    Header,
    Opened,
    Raw,
    ReadOptions,
    Together,
    Unreadable,
    decoder_faults,
    quiet,
    readable,
)
from shards.formats.dicom_facts import collect_facts, find_place, find_volume, number_of, text_of
from shards.formats.dicom_pixels import PIXEL_KEYWORDS, to_modality_values
from shards.formats.magic import HEAD_BYTES
from shards.stores.blobs import Blob

_UNVALIDATED = Together(pydicom.config.disable_value_validation)
_PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)  # float, double, integers
_UNDEFINED_LENGTH = 0xFFFFFFFF
_PACKAGES = ("pydicom", "pylibjpeg", "libjpeg", "openjpeg", "rle", "gdcm", "PIL")
_NOT_PIXELS = frozenset({"SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "DOC", "ECG"})
"""Modalities whose objects are no images, even where they carry pixels (masks, dose grids)."""

_DEFLATED, _INFLATED = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1\0\0\0"  # of equal length
_MAX_INFLATED_BYTES = 1 << 29
_HEADER_KEYWORDS = (
    "BodyPartExamined EchoTime ImageLaterality ImageOrientationPatient ImagePositionPatient ImageType "
    "ImagerPixelSpacing InstanceNumber KVP Laterality MagneticFieldStrength Modality NumberOfFrames "
    "PatientID PixelSpacing RepetitionTime SOPClassUID SeriesInstanceUID SliceLocation SliceThickness "
    "SpacingBetweenSlices ViewPosition SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence"
)
_TAGS: list[Any] = [tag_for_keyword(name) for name in f"{_HEADER_KEYWORDS} {PIXEL_KEYWORDS}".split()]
_TAGS += _PIXEL_TAGS


def read_header(blob: Blob, options: ReadOptions) -> Header:
    """Describe an object from the tags in front of its pixels.

    Raises:
        Unreadable: it holds no image, more pixels than allowed, or is damaged.
    """
    for num_bytes in (HEAD_BYTES, 16 * HEAD_BYTES, blob.num_bytes):
        is_whole = num_bytes >= blob.num_bytes
        data = blob.read() if is_whole else blob.head(num_bytes)
        try:
            with _dicom_faults():
                tags, missing_bytes = _read_tags(data, blob.num_bytes)
                if missing_bytes is not None:
                    return _describe(tags, missing_bytes, blob.num_bytes, options)
                if is_whole:
                    raise _without_pixels(tags)
        except Unreadable as error:
            if is_whole or error.reason != "damaged":  # which a cut within a tag may look like
                raise
    raise AssertionError("the last round reads the whole object")


def open_dicom(blob: Blob, options: ReadOptions) -> Opened:
    """Open an object, whose units are its frames.

    Raises:
        Unreadable: as `read_header`.
    """
    data = blob.read()
    with _dicom_faults():
        dataset = pydicom.dcmread(io.BytesIO(_inflate(data)), force=True, specific_tags=_TAGS)
        if not any(tag in dataset for tag in _PIXEL_TAGS):
            reached = _read_tags(data, blob.num_bytes)[1] is not None
            raise Unreadable("truncated") if reached else _without_pixels(dataset)
        raw: Any = next(dataset.get_item(tag) for tag in _PIXEL_TAGS if tag in dataset)
        missing = 0 if raw.length == _UNDEFINED_LENGTH else raw.length - len(raw.value or b"")
        header = _describe(dataset, missing, blob.num_bytes, options)
        _name_transfer_syntax(dataset)
    return _Dicom(dataset, header, options)


class _Dicom(Opened):
    def __init__(self, dataset: FileDataset, header: Header, options: ReadOptions) -> None:
        self._dataset, self._header, self._options = dataset, header, options
        self._syntax = UID(dataset.file_meta.TransferSyntaxUID)

    def decode(self, unit: int) -> Decoded:
        with _dicom_faults():
            try:
                decoder = get_decoder(self._syntax)
            except NotImplementedError:  # how pydicom says that it knows no such syntax
                raise Unreadable("unsupported_format", "transfer syntax") from None
            if not decoder.is_available:
                raise Unreadable("missing_reader", self._syntax.name, fix="pip install 'frepa[dicom]'")
            if self._syntax.is_encapsulated:
                self._check_codestream(unit)
            if not self._syntax.is_encapsulated or self._syntax == RLELossless:
                _check_high_bit(self._dataset)
            stored, _ = decoder.as_array(self._dataset, index=unit)
            return to_modality_values(stored, self._dataset, unit)

    def arrays(self) -> Iterator[Raw]:
        return readable(self, self._header.num_units)

    def _check_codestream(self, unit: int) -> None:
        """Refuse a frame whose own header claims another size than the tags: it may be a huge one."""
        offsets = self._dataset.get("ExtendedOffsetTable"), self._dataset.get("ExtendedOffsetTableLengths")
        frame = get_frame(
            self._dataset.PixelData,
            unit,
            number_of_frames=self._header.num_units,
            extended_offsets=offsets if all(offsets) else None,
        )
        size = codestream_size(frame)
        if size is not None and size != (self._header.height, self._header.width):
            raise Unreadable("damaged", "size of the compressed frame")


def _check_high_bit(tags: Dataset) -> None:
    """Refuse values that do not begin at the lowest bit, as in files of the 1990s: pydicom cuts them."""
    high, bits = number_of(tags, "HighBit"), number_of(tags, "BitsStored")
    if high is not None and bits is not None and high >= bits:
        raise Unreadable("unsupported_format", "position of the stored bits")


def codestream_size(frame: bytes) -> tuple[int, int] | None:
    """Height and width that a JPEG, JPEG-LS or JPEG 2000 frame claims; None where it is none of them."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)  # JPEG 2000: start and size markers
    if start >= 0 and len(frame) >= start + 24:
        right, bottom, left, top = (
            int.from_bytes(frame[at : at + 4], "big") for at in range(start + 8, start + 24, 4)
        )
        return bottom - top, right - left
    position = 2
    while frame[:2] == b"\xff\xd8" and position + 9 <= len(frame) and frame[position] == 0xFF:
        marker = frame[position + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = (int.from_bytes(frame[position + n : position + n + 2], "big") for n in (5, 7))
            return height, width
        length = int.from_bytes(frame[position + 2 : position + 4], "big")
        position += 1 if marker == 0xFF else 2 + length  # a fill byte, or a segment
    return None


@contextmanager
def _dicom_faults() -> Iterator[None]:
    """As `decoder_faults`, with pydicom silent: its warnings and logs quote the values of tags."""
    with quiet("pydicom"), _UNVALIDATED, decoder_faults(*_PACKAGES):
        yield


def _read_tags(data: bytes, num_bytes: int) -> tuple[FileDataset, int | None]:
    """Read the tags before the pixels.

    Args:
        data: the file, or its head.
        num_bytes: size of the file.

    Returns:
        The tags, and how many bytes of the pixels the file lacks; None where no pixels came.
    """
    lengths: list[int] = []

    def is_at_pixels(tag: Any, _: str | None, length: int) -> bool:
        if tag in _PIXEL_TAGS:
            lengths.append(length)
        return tag in _PIXEL_TAGS

    inflated = _inflate(data)
    stream = io.BytesIO(inflated)
    dataset = read_partial(stream, is_at_pixels, force=True, specific_tags=_TAGS)
    if not lengths:
        return dataset, None
    if lengths[0] == _UNDEFINED_LENGTH or inflated is not data:
        return dataset, 0
    return dataset, stream.tell() + lengths[0] - num_bytes


def _inflate(data: bytes) -> bytes:
    """A file in the deflated transfer syntax, or its head, becomes one in explicit little endian.

    pydicom would inflate without a limit.
    """
    if data[132:136] != b"\x02\0\0\0" or _DEFLATED not in data[:HEAD_BYTES]:
        return data
    end = 144 + int.from_bytes(data[140:144], "little")  # of the file meta information
    if _DEFLATED not in data[:end]:
        return data
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    content = inflater.decompress(data[end:], _MAX_INFLATED_BYTES)
    if inflater.unconsumed_tail:
        raise Unreadable("too_many_pixels", "deflated")
    return data[:end].replace(_DEFLATED, _INFLATED) + content


def _without_pixels(tags: FileDataset) -> Unreadable:
    """Why there are no pixels: an object of another kind, or an image that was cut."""
    kind = text_of(tags, "SOPClassUID") or text_of(tags.file_meta, "MediaStorageSOPClassUID")
    if not kind and len(tags) == 0:
        return Unreadable("damaged", "no tags")
    is_image = "Image Storage" in UID(kind or "").name or number_of(tags, "Rows") is not None
    return Unreadable("truncated" if is_image else "no_pixels")


def _describe(tags: FileDataset, missing_bytes: int, num_bytes: int, options: ReadOptions) -> Header:
    modality = text_of(tags, "Modality") or ""
    if modality in _NOT_PIXELS:
        raise Unreadable("no_pixels", modality)
    if modality == "CT" and "LOCALIZER" in (text_of(tags, "ImageType") or "").upper():
        raise Unreadable("localizer")
    rows, columns, bits = (number_of(tags, name) for name in ("Rows", "Columns", "BitsAllocated"))
    if not rows or not columns or not bits or min(rows, columns, bits) < 1:
        raise Unreadable("damaged", "size")
    if missing_bytes > 1:  # one byte: the padding to an even length, which some writers forget
        raise Unreadable("truncated")
    if rows * columns > options.max_pixels:
        raise Unreadable("too_many_pixels", f"{columns:.0f} x {rows:.0f}")
    frames = int(number_of(tags, "NumberOfFrames") or 1)
    if not 1 <= frames <= min(MAX_UNITS, num_bytes):
        raise Unreadable("too_many_units" if frames > 1 else "damaged", "frames")
    samples = number_of(tags, "SamplesPerPixel") or 1
    photometric = text_of(tags, "PhotometricInterpretation") or ""
    series = text_of(tags, "SeriesInstanceUID") if frames == 1 and find_volume(tags) else None
    return Header(
        format="dicom",
        num_units=frames,
        height=int(rows),
        width=int(columns),
        is_deep=(number_of(tags, "BitsStored") or bits) > 8 and "PALETTE" not in photometric,
        channels=1 if samples == 1 and "PALETTE" not in photometric else 3,
        is_volume=frames > 1,
        series=series or None,
        place=find_place(tags),
        patient=text_of(tags, "PatientID") or None,
        facts=collect_facts(tags),
    )


def _name_transfer_syntax(dataset: FileDataset) -> None:
    """Without the file meta information, what pydicom found out by trying is the transfer syntax."""
    if not dataset.file_meta.get("TransferSyntaxUID"):
        is_implicit, is_little_endian = dataset.original_encoding
        plain = ExplicitVRLittleEndian if is_little_endian else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else plain
