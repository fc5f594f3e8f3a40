"""From the values that a format gives to the values that a dataset stores.

8-bit pixels stay as they are. Hounsfield units become int16, so that training may choose its windows. Other
deep values (16-bit pictures, MRI, X-ray) become 8 bits by a window: two values that become 0 and 255.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from shards.formats.common import Decoded, Pixels, Raw, looks_like_hounsfield
from shards.support.settings import Settings

HOUNSFIELD_RANGE = (-1024, 3071)
"""What 12-bit scanners can say; values beyond (metal, padding) are clipped to it."""

_MAX_SAMPLED = 1 << 22  # values kept to find a percentile, 16 MiB of float32


class IntensityRule(Settings):
    """How the deep values of a modality are stored.

    Attributes:
        kind: "as_is" and "percentiles" scale deep values to 8 bits by percentiles ("as_is" says that a
            modality's images are expected to have 8 bits already); "hounsfield" stores Hounsfield units as
            int16, and deep values that are none as "percentiles" does.
        low: percentile of the finite values that becomes 0.
        high: percentile that becomes 255.
        scope: whether percentiles are measured on each image or once on a volume, which keeps the contrast
            between its slices.
        prefer_voi: use the object's own window (DICOM VOI) where it has one.
    """

    kind: Literal["as_is", "hounsfield", "percentiles"] = "percentiles"
    low: float = Field(default=0.5, ge=0, le=100)
    high: float = Field(default=99.5, ge=0, le=100)
    scope: Literal["image", "volume"] = "image"
    prefer_voi: bool = False

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


def measure_window(arrays: Iterable[Raw], rule: IntensityRule) -> tuple[float, float]:
    """Find the values that become 0 and 255: percentiles of the finite values over all arrays.

    Exact for integers of at most 16 bits (they are counted) and for up to 4 Mi values of other types; of
    more, every 2nd, 4th, ... value is looked at, so that memory stays bounded.

    Args:
        arrays: any shapes; the units of a volume, say, one after the other.
        rule: says which percentiles.

    Returns:
        Low below high; where fewer values differ than the percentiles leave out, the minimum and maximum;
        (v, v + 1) for a constant v, and (0, 1) without any finite value.
    """
    counts = np.zeros(3 * 2**15, np.int64)  # of -32768 .. 65535
    sample = _Sample()
    for array in arrays:
        if array.dtype.kind in "iu" and array.dtype.itemsize <= 2:
            offset = array.ravel().astype(np.int32) + 2**15
            counts += np.bincount(offset, minlength=counts.size)
        else:
            sample.add(array)
    present = np.flatnonzero(counts)
    values: npt.NDArray[Any] = present - 2**15
    numbers: npt.NDArray[np.int64] | None = counts[present]
    if not sample.is_empty:
        if values.size:  # integers and others, as one object seldom has both: to the sample's precision
            sample.add(np.repeat(values, counts[present]))
        values, numbers = sample.sorted(), None
    if values.size == 0:
        return 0.0, 1.0
    low, high = (_percentile(values, numbers, share) for share in (rule.low, rule.high))
    if high <= low:
        low, high = float(values[0]), float(values[-1])
    return (low, high) if high > low else (low, low + 1.0)


def to_stored(
    decoded: Decoded, rule: IntensityRule, window: tuple[float, float] | None = None
) -> npt.NDArray[np.uint8] | npt.NDArray[np.int16]:
    """Bring one unit's values to the stored type.

    Args:
        decoded: (H, W) or (H, W, 3) of any type.
        rule: of the modality.
        window: of the whole volume, from `measure_window`; None: measured on this unit, its channels
            together.

    Returns:
        uint8; int16 Hounsfield units, clipped to -1024..3071, where the rule asks for them and the values
        are such. NaN becomes the window's low end.
    """
    values = decoded.pixels
    if values.dtype == np.uint8:
        return values
    if rule.kind == "hounsfield" and (decoded.is_hounsfield or looks_like_hounsfield(values)):
        return _to_hounsfield(values)
    if rule.prefer_voi and decoded.window is not None:
        window = decoded.window
    return scale_to_8_bit(values, window if window is not None else measure_window([values], rule))


def scale_to_8_bit(values: npt.NDArray[Any], window: tuple[float, float]) -> Pixels:
    """Scale so that the window becomes 0..255, values outside clipped; NaN becomes 0.

    Args:
        values: any shape and number type.
        window: low and high, low < high.
    """
    low, high = window
    with np.errstate(over="ignore", invalid="ignore"):  # values near the end of float32
        scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / max(high - low, 1e-30))
    if values.dtype.kind == "f":
        scaled = np.nan_to_num(scaled, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
    return np.asarray(np.rint(np.clip(scaled, 0, 255)), np.uint8)


def _to_hounsfield(values: Raw) -> npt.NDArray[np.int16]:
    low, high = HOUNSFIELD_RANGE
    if values.dtype.kind == "f":
        values = np.rint(np.nan_to_num(values, nan=low, posinf=high, neginf=low))
    return np.clip(values, low, high).astype(np.int16)


class _Sample:
    """Every `stride`-th finite value of a stream; the stride doubles when they become too many."""

    def __init__(self) -> None:
        self._kept: list[npt.NDArray[np.float32]] = []
        self._num_kept, self._num_seen, self._stride = 0, 0, 1

    @property
    def is_empty(self) -> bool:
        return self._num_kept == 0

    def add(self, array: Raw) -> None:
        flat = array.ravel()
        values = flat[np.isfinite(flat)].astype(np.float32)
        taken = values[-self._num_seen % self._stride :: self._stride]
        self._num_seen += values.size
        self._kept.append(taken)
        self._num_kept += taken.size
        while self._num_kept > _MAX_SAMPLED:
            thinned = np.concatenate(self._kept)[::2]
            self._kept, self._num_kept, self._stride = [thinned], thinned.size, 2 * self._stride

    def sorted(self) -> npt.NDArray[np.float32]:
        return np.sort(np.concatenate(self._kept))


def _percentile(values: npt.NDArray[Any], counts: npt.NDArray[np.int64] | None, percent: float) -> float:
    """`np.percentile` (linear) of sorted values, each of which is there `counts` times (None: once)."""
    total = int(values.size if counts is None else counts.sum())
    position = percent / 100 * (total - 1)
    below = int(position)
    ranks = np.array([below, min(below + 1, total - 1)])
    places = ranks if counts is None else np.searchsorted(np.cumsum(counts), ranks, side="right")
    first, second = (float(value) for value in values[places])
    return first + (second - first) * (position - below)
