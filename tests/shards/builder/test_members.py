"""Members are decoded strictly."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard

from shards.builder.members import decode_npy, decode_npy_zst, decode_stored, encode_npy
from shards.support.errors import DataError


def test_members_that_claim_absurd_sizes():
    npy = encode_npy(np.zeros((2, 2), np.uint8))
    with pytest.raises(DataError):
        decode_npy(npy.replace(b"(2, 2)", b"(2, 9)"))
    with pytest.raises(DataError):
        decode_npy(b"")
    frame = bytearray(zstandard.ZstdCompressor(write_content_size=True).compress(npy + bytes(70_000)))
    assert zstandard.frame_content_size(bytes(frame)) > 65_536
    huge = bytes(frame[:4]) + b"\xe0" + (1 << 60).to_bytes(8, "little") + bytes(frame[9:])
    assert zstandard.frame_content_size(huge) == 1 << 60
    with pytest.raises(DataError, match="more than 268435456 bytes"):
        decode_npy_zst(huge, "uint8")
    for data, extension in ((npy, "png"), (b"", "jpg"), (b"x", "exe"), (b"x", "npy.zst")):
        with pytest.raises(DataError):
            decode_stored(data, extension, "uint8")
