"""What all readers of formats share: reasons why a unit is no sample, headers, decoded units.

An object (a file) has one or more units: pages of a TIFF, frames of a cine, slices of a volume, tiles of a
slide. A reader first tells what an object is from its head (`Header`, for the plan), then decodes single
units.
"""

from __future__ import annotations

import logging
import threading
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from shards.support.errors import DataError, FrepaError
from shards.support.settings import Settings

Pixels = npt.NDArray[np.uint8]
Raw = npt.NDArray[Any]
"""Pixels as a format gives them: uint8, int16, uint16 or float32, (H, W) or (H, W, 3) RGB."""

DEFAULT_MAX_PIXELS = 100_000_000
HIGHEST_AIR = -200  # Hounsfield units: fat is above, air and lung below
MAX_UNITS = 1_000_000
"""More units of one object are a damaged header: a slide of 100,000 x 100,000 pixels has 38,000 tiles."""

REASONS = {
    "zero_bytes": "the file is empty",
    "not_an_image": "the content is of no image format",
    "unsupported_format": "an image or volume format that this version does not read",
    "missing_reader": "the reader of this format is not installed",
    "unreadable_file": "the file cannot be opened",
    "changed": "not what it was when the plan was made, or gone",
    "truncated": "the file ends too early",
    "damaged": "the decoder refuses the content",
    "no_array": "the file has no array of the name that `hdf5_key` gives",
    "no_pixels": "a file without an image, such as a report or a directory",
    "too_many_pixels": "more pixels than `max_pixels`, refused before decoding",
    "too_many_units": "more units than an object may have",
    "localizer": "a planning view (scout) of a CT series, no slice of it",
    "too_many_patches": "more patches than a 16-bit index can number",
    "too_small": "a side is shorter than `min_side`",
    "flat": "nearly constant: the standard deviation is below `min_std`",
    "no_resolution": "a slide that does not say its resolution, or was scanned more coarsely than `tile_mpp`",
    "no_tissue": "a tile of a slide that shows glass",
    "other_split": "of a split that was not asked for",
}
"""Stable reason codes of units that are no samples."""

RULES = frozenset({"no_tissue", "other_split", "no_pixels", "localizer"})
"""Reasons that exclude by rule: nothing is wrong with such a unit, it is not wanted."""


class Unreadable(DataError):
    """A unit that cannot become a sample; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, detail: str = "", *, where: object = None, fix: str = "") -> None:
        assert reason in REASONS, reason
        text = f"{reason}: {REASONS[reason]}" + (f" ({detail})" if detail else "")
        super().__init__(text, where=where, fix=fix)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.reason, self.detail, self.where, self.fix)


def _rebuild(reason: str, detail: str, where: object, fix: str) -> Unreadable:
    return Unreadable(reason, detail, where=where, fix=fix)


class ReadOptions(Settings):
    """How objects are read.

    Attributes:
        max_pixels: larger images are refused from their header, before decoding.
        slice_axis: of a volume, the axis that is cut across: "axial" (the last axis of a NIfTI file brought
            to RAS+), "coronal" or "sagittal".
        hdf5_key: dataset of an HDF5 or NPZ file that holds the pixels.
        tile_size: side of a slide's tiles, in pixels.
        tile_mpp: resolution of a slide's tiles, in micrometers per pixel; None: as scanned.
        min_tissue: share of a tile that must be tissue.
    """

    max_pixels: int = Field(default=DEFAULT_MAX_PIXELS, gt=0)
    slice_axis: Literal["axial", "coronal", "sagittal"] = "axial"
    hdf5_key: str = "data"
    tile_size: int = Field(default=512, gt=0)
    tile_mpp: float | None = Field(default=None, gt=0)
    min_tissue: float = Field(default=0.1, ge=0, le=1)


@dataclass(frozen=True)
class Header:
    """What an object says of itself before it is decoded.

    Attributes:
        format: "png", "dicom", ...
        num_units: how many units it has.
        height: of a unit, in pixels.
        width: likewise.
        is_deep: whether a unit has more than 8 bits a channel.
        channels: 1 or 3.
        is_volume: whether its units follow each other in space or time, so that they share a volume id.
        series: private id of the volume that this object is a slice of, None where it is none (DICOM: the
            series); objects of one series become one volume.
        place: where in the series it lies; sorts.
        patient: private; enters salted.
        facts: what enters the dataset, by an allow-list: numbers and codes that name nobody.
    """

    format: str
    num_units: int
    height: int
    width: int
    is_deep: bool = False
    channels: int = 1
    is_volume: bool = False
    series: str | None = None
    place: float = 0.0
    patient: str | None = None
    facts: Mapping[str, str | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoded:
    """One unit's pixels.

    Attributes:
        pixels: as the format gives them, upright.
        is_verbatim: whether the object's own bytes decode to exactly these pixels.
        is_hounsfield: whether the values are Hounsfield units, or look like them in a format that cannot say
            so (`looks_like_hounsfield` over the whole object): a CT reader takes them for such.
        window: lowest and highest value to show, where the object says so (DICOM VOI), None where not.
    """

    pixels: Raw
    is_verbatim: bool = False
    is_hounsfield: bool = False
    window: tuple[float, float] | None = None


class Opened(ABC):
    """An object whose units are being decoded; holds what they share, and is closed afterwards."""

    @abstractmethod
    def decode(self, unit: int) -> Decoded:
        """Decode one unit.

        Raises:
            Unreadable: with a stable reason.
        """

    @abstractmethod
    def arrays(self) -> Iterator[Raw]:
        """Pixels of all units that can be decoded, for measuring a volume's range of values."""

    def close(self) -> None:  # noqa: B027 (most readers hold nothing)
        """Free what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def looks_like_hounsfield(values: Raw) -> bool:
    """Whether values of a CT are in Hounsfield units: signed, and with air (below -200) among them.

    NIfTI and arrays do not name their unit. Without air in view, or with values moved above zero, an image
    is scaled by percentiles like any other.
    """
    return values.dtype.kind in "if" and values.size > 0 and bool(np.nanmin(values, initial=0) < HIGHEST_AIR)


def readable(opened: Opened, num_units: int) -> Iterator[Raw]:
    """Pixels of the units that can be decoded; the others are left out."""
    for unit in range(num_units):
        try:
            yield opened.decode(unit).pixels
        except Unreadable:
            continue


def missing_reader(package: str, extra: str) -> Unreadable:
    """The error for a format whose reader is not installed."""
    return Unreadable("missing_reader", package, fix=f"pip install 'frepa[{extra}]'")


@contextmanager
def decoder_faults(*packages: str) -> Iterator[None]:
    """Turn what decoders raise on bad data into `Unreadable`; an error of our own stays one.

    Decoders document no list of their errors: damaged files make them raise anything from OSError to
    TypeError. So the place decides, not the type: what the innermost of our functions called. Messages are
    dropped, since decoders quote file names and tags in them.

    Args:
        packages: top-level packages whose errors are the data's fault; zlib's own error always is.
    """
    try:
        yield
    except (FrepaError, MemoryError):
        raise
    except BaseException as error:
        name, text = type(error).__name__, str(error).lower()
        is_panic = name == "PanicException"  # of a decoder in Rust; no Exception, by the will of its makers
        is_known = is_panic or isinstance(error, (zlib.error, EOFError))
        is_theirs = isinstance(error, Exception) and _called_from_here(error.__traceback__) in packages
        if not (is_known or is_theirs):
            raise
    else:
        return
    if name == "DecompressionBombError":  # Pillow's own limit
        raise Unreadable("too_many_pixels") from None
    is_truncated = name == "EOFError" or "truncat" in text or "end of file" in text
    raise Unreadable("truncated" if is_truncated else "damaged", name) from None


class Together:
    """A change of a whole process that threads make together: by the first that needs it, undone by the last.

    Saved and put back by each thread on its own, it would end in the middle of another's work, or never.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[None]]) -> None:
        self._change, self._lock, self._num_inside = change, threading.Lock(), 0
        self._undo = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._undo.enter_context(self._change())
            self._num_inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._undo.close()


@cache
def quiet(logger_name: str) -> Together:
    """Keep a decoder from warning and logging, where it may quote what is private; all is as before after."""
    return Together(lambda: _quiet(logging.getLogger(logger_name)))


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_disabled


def _called_from_here(trace: TracebackType | None) -> str:
    """Top-level package of the function that the innermost function of ours called; empty: none."""
    called = ""
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0]
        if package == __name__.split(".")[0]:
            called = ""
        elif not called:
            called = package
        trace = trace.tb_next
    return called
