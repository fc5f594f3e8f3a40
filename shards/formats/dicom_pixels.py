"""From a DICOM frame's stored values to its modality's values: tables, inversion, padding, color."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut

from shards.formats.common import Decoded, Raw, Unreadable
from shards.formats.dicom_facts import group_of, number_of, text_of

PIXEL_KEYWORDS = (
    "BitsAllocated BitsStored Columns ExtendedOffsetTable ExtendedOffsetTableLengths HighBit "
    "ModalityLUTSequence PhotometricInterpretation PixelPaddingRangeLimit PixelPaddingValue "
    "PixelRepresentation PlanarConfiguration RescaleIntercept RescaleSlope RescaleType Rows SamplesPerPixel "
    "VOILUTFunction VOILUTSequence WindowCenter WindowWidth "
    "RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor "
    "BluePaletteColorLookupTableDescriptor RedPaletteColorLookupTableData GreenPaletteColorLookupTableData "
    "BluePaletteColorLookupTableData SegmentedRedPaletteColorLookupTableData "
    "SegmentedGreenPaletteColorLookupTableData SegmentedBluePaletteColorLookupTableData"
)
"""Tags that decide what the pixels mean."""

_AIR = -1024  # what the padding of a CT becomes
_LARGEST_STEP = 1e6  # beyond it, rescaling is done in floats


def to_modality_values(stored: Raw, tags: Dataset, frame: int) -> Decoded:
    """Bring a frame to its modality's values.

    Args:
        stored: (H, W), or (H, W, 3) RGB, as pydicom decodes it.
        tags: of the object.
        frame: which of its frames.

    Returns:
        uint8 where the object has at most 8 bits a channel and is not rescaled, else int16, uint16 or
        float32. MONOCHROME1 is inverted, its window too; padding is the lowest value (of a CT: air).

    Raises:
        Unreadable: the tags contradict themselves.
    """
    photometric = text_of(tags, "PhotometricInterpretation") or ""
    if photometric.startswith("PALETTE"):
        return Decoded(_high_bytes(apply_color_lut(stored, tags)))
    if stored.ndim == 3:
        if stored.shape[2] != 3:
            raise Unreadable("unsupported_format", f"{stored.shape[2]} samples a pixel")
        return Decoded(_narrow(stored, is_8_bit=stored.dtype == np.uint8))
    if number_of(tags, "BitsAllocated") == 1:
        return Decoded(stored.astype(np.uint8) * np.uint8(255))

    bits = int(number_of(tags, "BitsStored") or 16)
    rescaled = _rescale(stored, tags, frame)
    is_8_bit = rescaled is stored and stored.dtype.kind == "u" and bits <= 8
    window = find_window(tags, frame)
    is_inverted = photometric == "MONOCHROME1"
    if is_inverted:
        turn = float(_rescale(_stored_limits(stored, bits), tags, frame).sum())
        rescaled = turn - rescaled.astype(np.float64)
        window = (turn - window[1], turn - window[0]) if window else None
    if is_8_bit and bits < 8:
        rescaled = rescaled * (255.0 / (2**bits - 1))
    values = _narrow(rescaled, is_8_bit=is_8_bit)
    is_hounsfield = not is_8_bit and not is_inverted and _says_hounsfield(tags, frame)
    padding = _find_padding(stored, tags)
    if padding is not None and padding.any() and not padding.all():
        is_signed = is_hounsfield and values.dtype.kind != "u"
        values[padding] = _AIR if is_signed else values[~padding].min()
    return Decoded(values, is_hounsfield=is_hounsfield, window=window)


def find_window(tags: Dataset, frame: int) -> tuple[float, float] | None:
    """The lowest and highest of the modality's values that the object wants to be shown (VOI), if it says so.

    The first of several windows counts; of a sigmoid, the width; of a table, the span in which it rises.
    """
    group = group_of(tags, frame, "FrameVOILUTSequence")
    center, width = number_of(group, "WindowCenter"), number_of(group, "WindowWidth")
    if center is not None and width is not None:
        if text_of(group, "VOILUTFunction") in ("LINEAR_EXACT", "SIGMOID"):
            low, high = center - width / 2, center + width / 2
        else:  # PS3.3 C.11.2.1.2.1
            low, high = center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2
        return (low, high) if high > low else None
    if not tags.get("VOILUTSequence"):
        return None
    first, table = _read_table(tags, "VOILUTSequence")
    above, below = np.flatnonzero(table != table[0]), np.flatnonzero(table != table[-1])
    if above.size == 0:
        return None
    return float(first + above[0] - 1), float(first + below[-1] + 1)


def _rescale(stored: Raw, tags: Dataset, frame: int) -> npt.NDArray[Any]:
    """Apply the modality table, or slope and intercept; the same array where there are none."""
    if tags.get("ModalityLUTSequence") and stored.dtype.kind in "iu":
        first, table = _read_table(tags, "ModalityLUTSequence")
        return table[np.clip(stored.astype(np.int64) - first, 0, table.size - 1)]
    group = group_of(tags, frame, "PixelValueTransformationSequence")
    slope, intercept = number_of(group, "RescaleSlope"), number_of(group, "RescaleIntercept")
    slope, intercept = slope or 1.0, intercept or 0.0
    if (slope, intercept) == (1.0, 0.0):
        return stored
    is_integral = slope == int(slope) and intercept == int(intercept)
    if stored.dtype.kind in "iu" and is_integral and max(abs(slope), abs(intercept)) < _LARGEST_STEP:
        return np.asarray(stored.astype(np.int64) * int(slope) + int(intercept))
    return np.asarray(stored.astype(np.float64) * slope + intercept)


def _says_hounsfield(tags: Dataset, frame: int) -> bool:
    group = group_of(tags, frame, "PixelValueTransformationSequence")
    if text_of(tags, "Modality") != "CT" or tags.get("ModalityLUTSequence"):
        return False
    unit = text_of(group, "RescaleType") or "HU"
    return unit == "HU" and number_of(group, "RescaleIntercept") is not None


def _read_table(tags: Dataset, sequence: str) -> tuple[int, npt.NDArray[np.int64]]:
    """The value that the first entry of a lookup table stands for, and the entries."""
    item = tags.get(sequence)[0]
    size, first = number_of(item, "LUTDescriptor"), number_of(item, "LUTDescriptor", 1)
    data = item.get("LUTData")
    if size is None or first is None or data is None:
        raise Unreadable("damaged", "lookup table")
    if isinstance(data, bytes):
        is_little_endian = tags.original_encoding[1] is not False
        data = np.frombuffer(data[: len(data) // 2 * 2], "<u2" if is_little_endian else ">u2")
    table = np.atleast_1d(np.asarray(data, np.int64))[: int(size) or 2**16]
    if table.size == 0:
        raise Unreadable("damaged", "lookup table")
    if number_of(tags, "PixelRepresentation") == 1 and first >= 2**15:
        first -= 2**16  # written as unsigned
    return int(first), table


def _stored_limits(stored: Raw, bits: int) -> npt.NDArray[Any]:
    """Lowest and highest value that can be stored; of floats, that is."""
    if stored.dtype.kind == "f":
        return np.array([np.nanmin(stored, initial=0), np.nanmax(stored, initial=0)])
    if stored.dtype.kind == "u":
        return np.array([0, 2**bits - 1])
    return np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1])


def _find_padding(stored: Raw, tags: Dataset) -> npt.NDArray[np.bool_] | None:
    value = number_of(tags, "PixelPaddingValue")
    if value is None or stored.dtype.kind == "f":
        return None
    limit = number_of(tags, "PixelPaddingRangeLimit")
    info = np.iinfo(stored.dtype)
    ends = []
    for end in (value, value if limit is None else limit):
        span = 2.0**info.bits  # some writers take the wrong sign
        ends.append(end - span if end > info.max else end + span if end < info.min else end)
    return np.asarray((stored >= min(ends)) & (stored <= max(ends)))


def _narrow(values: npt.NDArray[Any], *, is_8_bit: bool) -> Raw:
    """The smallest of the types that a format gives which holds the values; a copy."""
    if is_8_bit:
        return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)
    if values.dtype.kind in "iu" or (values.size and np.array_equal(values, np.rint(values))):
        low, high = values.min(initial=0), values.max(initial=0)
        for kind in (np.int16, np.uint16):
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return np.array(values, kind)
    with np.errstate(over="ignore"):
        return np.array(values, np.float32)


def _high_bytes(color: Raw) -> Raw:
    """A palette's entries as 8 bits; those of 16 bits fill their range, but for some that hold 8."""
    if color.dtype == np.uint8:
        return color
    shift = 8 if color.max(initial=0) > 255 else 0
    return np.asarray(color >> shift, np.uint8)
