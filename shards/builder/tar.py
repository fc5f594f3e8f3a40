"""Appends samples to a tar, member by member, and says where each lies.

The headers name no owner, time or machine, so that equal members give equal bytes.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from typing import BinaryIO

import google_crc32c

TAR_BLOCK = 512


def append_members(file: BinaryIO, key: str, members: Sequence[tuple[str, str, bytes]]) -> dict[str, int]:
    """Append the members of a sample at the end of a tar.

    Args:
        file: open for writing, at the end of the last member.
        key: of the sample; holds no dot.
        members: of each: its name in the index ("image", "hf", ...), its extension and its bytes.

    Returns:
        The index columns `NAME_offset`, `NAME_size` (both in bytes) and `NAME_crc32c` of each member.
    """
    columns: dict[str, int] = {}
    for name, extension, data in members:
        header = tarfile.TarInfo(f"{key}.{extension}")  # owner 0, time 0, mode 0644
        header.size = len(data)
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        columns[f"{name}_offset"] = file.tell()
        columns[f"{name}_size"] = len(data)
        columns[f"{name}_crc32c"] = google_crc32c.value(data)
        file.write(data)
        file.write(bytes(-len(data) % TAR_BLOCK))
    return columns


def finish_tar(file: BinaryIO) -> int:
    """Write the end of a tar; return the size of the whole in bytes."""
    file.write(bytes(2 * TAR_BLOCK))
    return file.tell()
