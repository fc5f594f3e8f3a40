"""The members of stored samples: read by their index, decoded strictly, and the HF members encoded."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zstandard
from PIL import Image

from shards.decoding import unpack_array
from shards.hf.maps import hf_map
from shards.hf.tokens import HFParams, hf_response, hf_scores, rank_tokens
from shards.stores.store import Store
from shards.support.errors import DataError

Stored = npt.NDArray[Any]
"""Pixels of a sample, (H, W) or (H, W, 3) RGB; uint8, or int16: Hounsfield units."""

EXTENSIONS = {"hf": "hf.npy", "hfmap": "hfmap.npy.zst", "json": "json"}
"""Of the members that have the same one in every sample; that of the image is in the index."""

_PILLOW_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
_ZSTD_LEVEL = 3


def read_member(store: Store, path: str, row: Mapping[str, Any], member: str) -> bytes:
    """Read one member of a sample and check its bytes.

    Args:
        store: the dataset.
        path: of the tar.
        row: of its index: the key, and offset, size and crc32c of the member.
        member: "image", "hf", "hfmap" or "json".

    Raises:
        DataError: the tar is missing, cut short or damaged.
        EnvironmentFault: the store cannot be reached.
    """
    data = store.read_range(path, row[f"{member}_offset"], row[f"{member}_size"])
    if len(data) != row[f"{member}_size"] or google_crc32c.value(data) != row[f"{member}_crc32c"]:
        raise DataError(
            f"the bytes of {member} are damaged",
            where=f"{store.where(path)}, sample {row['key']}",
            fix="restore the shard, or build the dataset again",
        )
    return data


def decode_stored(data: bytes, extension: str, dtype: str) -> Stored:
    """Decode the image of a sample as the build does, by Pillow; slower than `shards.decoding`, and stricter.

    Args:
        data: the member's bytes.
        extension: `image_ext` of the index.
        dtype: likewise.

    Raises:
        DataError: they are no image of that kind.
    """
    if extension == "npy.zst":
        if dtype not in ("uint8", "int16"):
            raise DataError(f"pixels of {dtype}", allowed="uint8, int16")
        return decode_npy_zst(data, dtype)
    if extension not in _PILLOW_FORMATS:
        raise DataError(f"no image is stored as '{extension}'", allowed="png, jpg, webp, npy.zst")
    try:
        # not OpenCV: it returns the upper part of a truncated file without an error
        with Image.open(io.BytesIO(data), formats=(_PILLOW_FORMATS[extension],)) as image:
            if image.mode not in ("L", "RGB"):
                raise DataError(f"an image of mode {image.mode}", allowed="L, RGB")
            return np.asarray(image)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow names no list of what damaged files raise
        raise DataError(f"cannot be decoded as {extension} ({type(error).__name__})") from error


def decode_npy(data: bytes) -> npt.NDArray[Any]:
    """Decode a .npy file of numbers, never trusting the size that its header claims.

    Raises:
        DataError: it is none.
    """
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise DataError("not version 1.0 of .npy")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if is_fortran or dtype.kind not in "uif":
            raise DataError(f"an array of {dtype} in the wrong layout", allowed="numbers in C order")
        return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)
    except ValueError as error:
        raise DataError(f"not a .npy file ({error})") from error


def decode_npy_zst(data: bytes, dtype: str) -> npt.NDArray[Any]:
    """Decode a .npy file inside zstd that holds a matrix of `dtype`.

    Raises:
        DataError: it is none.
    """
    try:
        return unpack_array(data, dtype)
    except ValueError as error:
        raise DataError(f"not a .npy file of {dtype} in zstd ({error})") from error


def decode_json(data: bytes) -> dict[str, Any]:
    """Decode KEY.json.

    Raises:
        DataError: it is no JSON object.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise DataError("not valid JSON") from error
    if not isinstance(value, dict):
        raise DataError("JSON, but no object")
    return value


def encode_npy(array: npt.NDArray[Any]) -> bytes:
    """Encode as .npy."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def encode_hf_members(
    pixels: Stored, params: HFParams, patch_size: int, map_cell: int
) -> list[tuple[str, str, bytes]]:
    """Compute the HF members of a sample, as `shards.builder.tar.append_members` takes them.

    Args:
        pixels: as stored.
        params: the HF definition.
        patch_size: of the tokens, in pixels.
        map_cell: of the response map, in pixels.

    Returns:
        The ranks of all patches, and the response map; equal arguments give equal bytes.
    """
    response = hf_response(pixels, params)
    tokens = rank_tokens(hf_scores(response, patch_size), 1.0)
    compressed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(encode_npy(hf_map(response, map_cell)))
    return [("hf", EXTENSIONS["hf"], encode_npy(tokens)), ("hfmap", EXTENSIONS["hfmap"], compressed)]
