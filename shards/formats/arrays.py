"""NPY and NPZ, and what arrays in files mean.

| shape | meaning |
|---|---|
| (H, W) | one grey image |
| (H, W, 1 or 3), (1 or 3, H, W) | one image, channels last or first |
| (N, H, W) | a volume of N grey slices |
| (N, H, W, 1 or 3), (N, 1 or 3, H, W) | N images that have nothing to do with each other |

So three grey slices cannot be told from one color image, and count as that. Color is RGB. Other shapes, and
numbers that are not real, are refused; pickled objects are never loaded.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

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
    readable,
)
from shards.formats.magic import HEAD_BYTES
from shards.formats.volumes import check_claim, collect, to_format_type
from shards.stores.blobs import Blob

_CHANNELS = (1, 3)
_NUM_LOOKED_AT = 9  # images of an array, evenly spread, to see whether it is in Hounsfield units
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Layout:
    """What the axes of an array are.

    Attributes:
        num_units: how many images there are.
        is_stack: whether the first axis counts them.
        channel_axis: of one image: None, 0 or 2.
    """

    num_units: int
    height: int
    width: int
    channels: int
    is_stack: bool
    channel_axis: int | None


def find_layout(shape: tuple[int, ...], dtype: np.dtype[Any], options: ReadOptions) -> Layout:
    """Tell what the axes of an array are; see the table above.

    Raises:
        Unreadable: it holds no images, or larger ones than allowed.
    """
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise Unreadable("unsupported_format", "numbers that are not real")
    if len(shape) not in (2, 3, 4) or min(shape) < 1:
        raise Unreadable("unsupported_format", f"{len(shape)} axes" if shape else "a single number")
    image, is_stack = shape, False
    if len(shape) == 4 or (len(shape) == 3 and shape[2] not in _CHANNELS and shape[0] not in _CHANNELS):
        image, is_stack = shape[1:], True
    if len(image) == 2:
        axis, (height, width), channels = None, image, 1
    elif image[2] in _CHANNELS:
        axis, (height, width, channels) = 2, image
    elif image[0] in _CHANNELS:
        axis, (channels, height, width) = 0, image
    else:
        raise Unreadable("unsupported_format", "number of channels")
    if height * width > options.max_pixels:
        raise Unreadable("too_many_pixels", f"{width} x {height}")
    num_units = shape[0] if is_stack else 1
    if num_units > MAX_UNITS:
        raise Unreadable("too_many_units")
    return Layout(num_units, height, width, channels, is_stack, axis)


def describe(layout: Layout, dtype: np.dtype[Any], format_name: str) -> Header:
    """The header of an object that is one array."""
    return Header(
        format=format_name,
        num_units=layout.num_units,
        height=layout.height,
        width=layout.width,
        is_deep=dtype.kind != "b" and dtype != np.uint8,
        channels=layout.channels,
        is_volume=layout.is_stack and layout.channel_axis is None,
    )


class ArrayObject(Opened):
    """An array whose images are read one by one.

    Args:
        array: NumPy's, or one that is indexed as such and reads what is asked for (h5py).
        layout: of its axes.
        files: what is closed with it.
        packages: whose errors are the data's fault.
    """

    def __init__(self, array: Any, layout: Layout, files: ExitStack, packages: tuple[str, ...]) -> None:
        self._array, self._layout, self._files, self._packages = array, layout, files, packages
        self._is_hounsfield: bool | None = None

    def decode(self, unit: int) -> Decoded:
        """Read one image."""
        with decoder_faults(*self._packages):
            if self._is_hounsfield is None:
                self._is_hounsfield = self._find_air()
            return Decoded(self._cut(unit), is_hounsfield=self._is_hounsfield)

    def arrays(self) -> Iterator[Raw]:
        """Read all images, one after the other."""
        return readable(self, self._layout.num_units)

    def close(self) -> None:
        """Close the file."""
        self._array = None
        self._files.close()

    def _cut(self, unit: int) -> Raw:
        image = to_format_type(np.asarray(self._array[unit if self._layout.is_stack else ...]))
        if self._layout.channel_axis == 0:
            image = np.moveaxis(image, 0, 2)
        if self._layout.channel_axis is not None and self._layout.channels == 1:
            image = image[:, :, 0]
        return np.ascontiguousarray(image)

    def _find_air(self) -> bool:
        if self._array.dtype.kind not in "if" or self._layout.channels != 1:
            return False
        last = self._layout.num_units - 1
        units = {round(last * step / (_NUM_LOOKED_AT - 1)) for step in range(_NUM_LOOKED_AT)}
        return any(looks_like_hounsfield(self._cut(unit)) for unit in sorted(units))


def read_header(blob: Blob, options: ReadOptions) -> Header:
    """Describe an NPY by its first bytes, an NPZ by its directory.

    Raises:
        Unreadable: it is damaged, larger than allowed, or holds no image.
    """
    if _is_zip(blob):
        with blob.as_file() as path, _zip_member(path, options) as (stream, _):
            shape, _, dtype = _read_npy_header(stream)
            return describe(find_layout(shape, dtype, options), dtype, "npz")
    stream = io.BytesIO(blob.head(HEAD_BYTES))
    shape, _, dtype = _read_npy_header(stream)
    layout = find_layout(shape, dtype, options)
    check_claim(_num_bytes(shape, dtype), blob.num_bytes - stream.tell(), is_compressed=False)
    return describe(layout, dtype, "npy")


def open_array(blob: Blob, options: ReadOptions) -> Opened:
    """Open an array, whose units are its images; an NPY is read piece by piece, an NPZ is inflated.

    Raises:
        Unreadable: as `read_header`.
        EnvironmentFault: no room to inflate it.
    """
    if _is_zip(blob):
        with blob.as_file() as path, _zip_member(path, options) as (stream, compressed_bytes):
            shape, is_fortran, dtype = _read_npy_header(stream)
            layout = find_layout(shape, dtype, options)
            num_bytes = _num_bytes(shape, dtype)
            check_claim(num_bytes, compressed_bytes, is_compressed=True)
            content = collect(iter(lambda: stream.read(_CHUNK_BYTES), b""), num_bytes)
        array = content.view(dtype).reshape(shape, order="F" if is_fortran else "C")
        return ArrayObject(array, layout, ExitStack(), ())
    with ExitStack() as stack:
        path = stack.enter_context(blob.as_file())
        with open(path, "rb") as file:
            shape, is_fortran, dtype = _read_npy_header(file)
            layout = find_layout(shape, dtype, options)
            offset = file.tell()
        check_claim(_num_bytes(shape, dtype), path.stat().st_size - offset, is_compressed=False)
        array = np.memmap(path, dtype, "r", offset, shape, "F" if is_fortran else "C")
        return ArrayObject(array, layout, stack.pop_all(), ())


@contextmanager
def _zip_member(path: Any, options: ReadOptions) -> Iterator[tuple[IO[bytes], int]]:
    """The array of an NPZ that has the key of the options, or is the only one; and its compressed size."""
    with decoder_faults("zipfile"), zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        wanted = f"{options.hdf5_key}.npy"
        name = wanted if wanted in names else names[0] if len(names) == 1 else None
        if name is None:
            raise Unreadable("no_array", fix="set `hdf5_key` to the name of the one that holds the pixels")
        info = archive.getinfo(name)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Unreadable("unsupported_format", "compression")
        with archive.open(name) as stream:
            yield stream, info.compress_size


def _read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and type; the stream is left where the numbers start."""
    with decoder_faults("numpy", "zipfile"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(stream)
    raise Unreadable("unsupported_format", "version of NPY")


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return int(np.prod(shape, dtype=object)) * dtype.itemsize


def _is_zip(blob: Blob) -> bool:
    return blob.head(2) == b"PK"
