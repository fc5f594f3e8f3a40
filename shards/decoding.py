"""The members of a sample, from stored bytes to arrays."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
import zstandard
from numpy.typing import NDArray

from shards.support.errors import DataError

MAX_ARRAY_BYTES = 1 << 28
"""Largest array that is unpacked; a canonical image or response map is far smaller."""


class Stored(NamedTuple):
    """What the index says of an image."""

    ext: str
    dtype: str
    height: int
    width: int
    channels: int


def decode_image(data: bytes, stored: Stored, where: str) -> NDArray[Any]:
    """Decode stored pixels; grey ones stay (H, W), so that a crop works on one channel.

    Returns:
        (H, W) or (H, W, 3) RGB, uint8 or int16.

    Raises:
        DataError: they are not what the index says.
    """
    shape = (stored.height, stored.width)
    if stored.ext == "npy.zst":
        try:
            image: NDArray[Any] | None = unpack_array(data, stored.dtype)
        except ValueError as error:
            raise DataError(f"the image cannot be decoded: {error}", where=where) from error
    else:
        flags = cv2.IMREAD_GRAYSCALE if stored.channels == 1 else cv2.IMREAD_COLOR_RGB
        # stored pixels are upright: the build has applied any rotation of the source
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None or image.shape[:2] != shape:
        got = "nothing" if image is None else f"{image.shape[0]} x {image.shape[1]} pixels"
        raise DataError(f"decodes to {got}, the index says {shape[0]} x {shape[1]}", where=where)
    return image


def decode_map(data: bytes, where: str) -> NDArray[np.uint8]:
    """Decode a response map, (h, w).

    Raises:
        DataError: it is none.
    """
    try:
        return unpack_array(data, "uint8")
    except ValueError as error:
        raise DataError(f"the response map cannot be decoded: {error}", where=where) from error


def unpack_array(data: bytes, dtype: str) -> NDArray[Any]:
    """Unpack a .npy file in zstd that holds a matrix.

    Raises:
        ValueError: it holds something else.
    """
    try:
        # a frame that claims more than it holds would have that much set aside first
        if not 0 <= zstandard.frame_content_size(data) <= MAX_ARRAY_BYTES:
            raise ValueError(f"a zstd frame of unknown size, or of more than {MAX_ARRAY_BYTES} bytes")
        raw = zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    shape, found, start = _parse_header(raw[: raw.index(b"\n") + 1])
    if found != dtype:
        raise ValueError(f"{found} instead of {dtype}")
    return np.frombuffer(raw, dtype, offset=start).reshape(shape)


@lru_cache(maxsize=1024)
def _parse_header(header: bytes) -> tuple[tuple[int, int], str, int]:
    """Return shape, type and start of the values of a .npy file of (h, w).

    Remembered, since NumPy parses the header with Python's parser, which takes longer than all else of a map.

    Raises:
        ValueError: it is the header of something else.
    """
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not version 1.0 of .npy")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if len(shape) != 2 or 0 in shape or fortran_order or dtype.byteorder == ">" or dtype.hasobject:
        raise ValueError(f"{dtype} of shape {shape} instead of a matrix")
    return shape, str(dtype), len(header)
