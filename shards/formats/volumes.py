"""Large arrays that lie in files: inflated within limits, cut one image at a time."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from shards.formats.common import Raw, Unreadable
from shards.support.errors import EnvironmentFault

MAX_VOLUME_BYTES = 1 << 33
"""More of one volume, inflated, is refused: 8 GiB are 16,000 slices of 512 x 512 with 16 bits."""

MAX_DEFLATE_RATIO = 1032
"""What the deflate format can make of a byte at most: a larger claim is a lie, seen before inflating."""

_MAX_IN_MEMORY = 1 << 28  # larger volumes are inflated into a temporary file
_CHUNK_BYTES = 1 << 20


def check_claim(num_bytes: int, held_bytes: int, *, is_compressed: bool) -> None:
    """Refuse an array whose header claims more than its file can hold.

    Args:
        num_bytes: of the array, as its header says.
        held_bytes: of the file, without the header.
        is_compressed: whether the file's bytes are deflated.

    Raises:
        Unreadable: it claims too much.
    """
    if num_bytes > MAX_VOLUME_BYTES:
        raise Unreadable("too_many_pixels", f"{num_bytes / 2**30:.1f} GiB")
    if num_bytes > held_bytes * (MAX_DEFLATE_RATIO if is_compressed else 1):
        raise Unreadable("truncated")


def inflate_gzip(data: bytes, num_bytes: int) -> npt.NDArray[np.uint8]:
    """Inflate the first bytes of a gzip file, and check the sum at its end where little follows.

    Args:
        data: the file; several members, one after the other, are one stream.
        num_bytes: how many bytes are wanted; never more are written.

    Returns:
        (num_bytes,) in memory, or in a temporary file without a name if it is large.

    Raises:
        Unreadable: the stream ends too early.
        zlib.error: it is damaged.
    """
    return collect(_inflated(data), num_bytes)


def collect(chunks: Iterable[bytes], num_bytes: int) -> npt.NDArray[np.uint8]:
    """The first bytes of a stream as one array; one chunk more is asked for, so that its end is checked.

    Raises:
        Unreadable: there are fewer.
        EnvironmentFault: there is no room for a temporary file.
    """
    if num_bytes <= _MAX_IN_MEMORY:
        memory = bytearray()
        for chunk in _limited(chunks, num_bytes):
            memory += chunk
        return np.frombuffer(memory, np.uint8)
    with tempfile.TemporaryFile() as file:
        try:
            # written, not mapped: on a full disk that is an error, and not the death of the process
            for chunk in _limited(chunks, num_bytes):
                file.write(chunk)
            file.flush()
        except OSError as error:
            fix = "free some space, or let TMPDIR name another folder"
            raise EnvironmentFault(f"a volume cannot be inflated ({error.strerror})", fix=fix) from error
        return np.memmap(file, np.uint8, "r")


def _limited(chunks: Iterable[bytes], num_bytes: int) -> Iterator[bytes]:
    missing = num_bytes
    for chunk in chunks:
        if missing == 0:
            return
        yield chunk[:missing]
        missing -= min(missing, len(chunk))
    if missing:
        raise Unreadable("truncated")


def _inflated(data: bytes) -> Iterator[bytes]:
    while data.startswith(b"\x1f\x8b"):
        inflater = zlib.decompressobj(wbits=31)
        rest = data
        while not inflater.eof:
            chunk = inflater.decompress(rest, _CHUNK_BYTES)
            if not chunk and not rest:
                raise Unreadable("truncated")
            rest = inflater.unconsumed_tail
            yield chunk
        data = inflater.unused_data


def to_format_type(values: npt.NDArray[np.generic]) -> Raw:
    """Bring any real numbers to a type that a format gives: uint8, int16, uint16 or float32.

    Booleans become 0 and 255. Values beyond float32 become infinite.

    Raises:
        Unreadable: they are no real numbers.
    """
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind not in "iuf":
        raise Unreadable("unsupported_format", "numbers that are not real")
    if kind == "u" and size <= 2:
        return values.astype(f"u{size}")
    if kind == "i" and size <= 2:
        return values.astype(np.int16)
    with np.errstate(over="ignore"):
        return values.astype(np.float32)
