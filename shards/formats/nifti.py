"""NIfTI-1 and -2 volumes, plain or in gzip, cut into slices as a radiologist sees them.

A volume is brought to RAS+ (axes to the right, the front and the top of the body) by flipping and swapping
axes only: nothing is interpolated. Slices are shown as DICOM shows them:

    axial     rows from front to back, columns from the patient's right to the left
    coronal   rows from top to bottom, columns from right to left
    sagittal  rows from top to bottom, columns from front to back

Pixels keep the file's spacing, so that coronal and sagittal slices of thick slices look flat.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation

from shards.formats.common import (
    MAX_UNITS,
    Decoded,
    Header,
    Opened,
    Raw,
    ReadOptions,
    Unreadable,
    decoder_faults,
    looks_like_hounsfield,
    quiet,
    readable,
)
from shards.formats.magic import HEAD_BYTES, inflate_head
from shards.formats.volumes import check_claim, inflate_gzip, to_format_type
from shards.stores.blobs import Blob

_HEADER_BYTES = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}


@dataclass(frozen=True)
class _Layout:
    """What the header says.

    Attributes:
        shape: of the stored array, (X, Y, Z, T); Fortran order.
        offset: of its first byte in the file.
        orientation: (3, 2), for `apply_orientation`.
        slope: with `intercept`, from stored values to values.
        spacing: of the stored axes, in mm.
        window: low and high value to show, if the file says so.
    """

    shape: tuple[int, int, int, int]
    dtype: np.dtype[Any]
    offset: int
    orientation: np.ndarray[Any, Any]
    slope: float
    intercept: float
    spacing: tuple[float, ...]
    window: tuple[float, float] | None

    @property
    def num_bytes(self) -> int:
        """Of the stored array."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


def read_header(blob: Blob, options: ReadOptions) -> Header:
    """Describe a volume by its first bytes.

    Raises:
        Unreadable: it is damaged, larger than allowed, or holds no image.
    """
    return _read_layout(blob, options)[1]


def open_nifti(blob: Blob, options: ReadOptions) -> Opened:
    """Open a volume; of a series of volumes, the units are the slices of the first, then of the second, ...

    Raises:
        Unreadable: as `read_header`, or it is cut or damaged.
    """
    layout, header = _read_layout(blob, options)
    with ExitStack() as stack:
        with _nifti_faults():
            if _is_gzip(blob):
                content = inflate_gzip(blob.read(), layout.offset + layout.num_bytes)
                stored = content[layout.offset :].view(layout.dtype).reshape(layout.shape, order="F")
            else:
                path = stack.enter_context(blob.as_file())
                stored = np.memmap(path, layout.dtype, "r", layout.offset, layout.shape, "F")
        return _Nifti(stored, layout, header, options, stack.pop_all())


class _Nifti(Opened):
    def __init__(
        self, stored: Raw, layout: _Layout, header: Header, options: ReadOptions, files: ExitStack
    ) -> None:
        # a view: nothing is read yet
        self._volume: Raw | None = apply_orientation(stored, layout.orientation)
        self._layout, self._num_units, self._files = layout, header.num_units, files
        self._axis = _AXES[options.slice_axis]
        self._is_hounsfield: bool | None = None

    def decode(self, unit: int) -> Decoded:
        with _nifti_faults():
            if self._is_hounsfield is None:
                self._is_hounsfield = self._find_air()
            return Decoded(self._cut(unit), is_hounsfield=self._is_hounsfield, window=self._layout.window)

    def arrays(self) -> Iterator[Raw]:
        return readable(self, self._num_units)

    def close(self) -> None:
        self._volume = None
        self._files.close()

    def _cut(self, unit: int) -> Raw:
        assert self._volume is not None, "closed"
        volume, place = divmod(unit, self._volume.shape[self._axis])
        at = (slice(None),) * self._axis
        plane = self._volume[..., volume][(*at, place)]
        if plane.dtype.names:  # RGB
            plane = np.stack([plane[name] for name in plane.dtype.names[:3]], axis=-1)
        picture = np.swapaxes(plane, 0, 1)[::-1, ::-1]  # what RAS+ makes of each of the three views
        return np.ascontiguousarray(self._scale(picture))

    def _scale(self, stored: Raw) -> Raw:
        slope, intercept = self._layout.slope, self._layout.intercept
        if (slope, intercept) == (1.0, 0.0):
            return to_format_type(stored)
        with np.errstate(over="ignore", invalid="ignore"):
            return to_format_type(stored.astype(np.float64) * slope + intercept)

    def _find_air(self) -> bool:
        """Whether any slice looks like Hounsfield units; the first one that does ends the search."""
        if self._layout.dtype.kind not in "if" and self._layout.intercept >= 0:
            return False
        order = sorted(range(self._num_units), key=lambda unit: abs(2 * unit - self._num_units))
        return any(looks_like_hounsfield(self._cut(unit)) for unit in order)


@contextmanager
def _nifti_faults() -> Iterator[None]:
    with quiet("nibabel.global"), decoder_faults("nibabel"):
        yield


def _is_gzip(blob: Blob) -> bool:
    return blob.head(2) == b"\x1f\x8b"


def _read_layout(blob: Blob, options: ReadOptions) -> tuple[_Layout, Header]:
    head = blob.head(HEAD_BYTES)
    layout = _parse(head)
    header = _describe(layout, options)
    is_gzip = head.startswith(b"\x1f\x8b")
    check_claim(layout.offset + layout.num_bytes, blob.num_bytes, is_compressed=is_gzip)
    return layout, header


def _parse(head: bytes) -> _Layout:
    is_gzip = head.startswith(b"\x1f\x8b")
    plain = inflate_head(head, max(_HEADER_BYTES)) if is_gzip else head
    sizes = {int.from_bytes(plain[:4], order): order for order in ("little", "big")}
    size = next((size for size in _HEADER_BYTES if size in sizes), None)
    if size is None or len(plain) < size:
        raise Unreadable("truncated" if size else "damaged", "header")
    with _nifti_faults():
        header = _HEADER_BYTES[size](plain[:size])
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        orientation = io_orientation(header.get_best_affine())
        if np.isnan(orientation).any():  # an affine that says nothing, as of a flat picture
            orientation = np.array([[0, 1], [1, 1], [2, 1]])
        slope, intercept = header.get_slope_inter()
        spacing = tuple(float(zoom) for zoom in header.get_zooms()[:3])
        offset = int(np.nan_to_num(header.get_data_offset())) or size + 4
        low, high = float(header["cal_min"]), float(header["cal_max"])
    if any(length != 1 for length in shape[4:]):
        raise Unreadable("unsupported_format", f"{len(shape)} dimensions")  # a field of vectors, say
    if len(shape) < 2 or min(shape) < 1 or offset < size:
        raise Unreadable("damaged", "shape")
    if dtype.names is None and (dtype.kind not in "iuf" or dtype.itemsize > 8):
        raise Unreadable("unsupported_format", "numbers that are not real")
    return _Layout(
        shape=tuple(int(length) for length in (*shape, 1, 1)[:4]),  # type: ignore[arg-type]
        dtype=dtype,
        offset=offset,
        orientation=orientation,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        spacing=spacing,
        window=(low, high) if np.isfinite([low, high]).all() and low < high else None,
    )


def _describe(layout: _Layout, options: ReadOptions) -> Header:
    axis = _AXES[options.slice_axis]
    order = np.argsort(layout.orientation[:, 0])  # of which stored axis each axis of RAS+ is
    lengths = [layout.shape[place] for place in order]
    spacing = [(*layout.spacing, 1.0, 1.0)[place] for place in order]
    across = [place for place in range(3) if place != axis]
    width, height = (lengths[place] for place in across)
    num_units = lengths[axis] * layout.shape[3]
    if width * height > options.max_pixels:
        raise Unreadable("too_many_pixels", f"{width} x {height}")
    if num_units > MAX_UNITS:
        raise Unreadable("too_many_units")
    is_color = layout.dtype.names is not None
    is_scaled = (layout.slope, layout.intercept) != (1.0, 0.0)
    facts = {"slice_thickness_mm": spacing[axis], "pixel_spacing_mm": spacing[across[0]]}
    return Header(
        format="nifti",
        num_units=num_units,
        height=height,
        width=width,
        is_deep=is_scaled or (not is_color and layout.dtype != np.uint8),
        channels=3 if is_color else 1,
        is_volume=num_units > 1,
        facts={name: float(f"{value:.6g}") for name, value in facts.items() if 0 < value < 1e6},
    )
