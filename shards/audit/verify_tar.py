"""Walks a tar from front to back beside its index: headers, names, sizes, bytes, and what is between."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from shards.audit.findings import Findings
from shards.builder.members import EXTENSIONS
from shards.builder.tar import TAR_BLOCK
from shards.stores.sequential import SequentialReader

_UNSAFE = re.compile(r"^/|(^|/)\.\.(/|$)|\\")
_TYPES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
}
_Row = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """Where the index says that a member lies."""

    name: str
    offset: int
    size: int
    crc32c: int


def expected_members(row: _Row, members: Sequence[str]) -> dict[str, Member]:
    """The members of an index row, by their names in the index."""
    return {
        name: Member(
            f"{row['key']}.{row['image_ext'] if name == 'image' else EXTENSIONS[name]}",
            row[f"{name}_offset"],
            row[f"{name}_size"],
            row[f"{name}_crc32c"],
        )
        for name in members
    }


class Layout(NamedTuple):
    """What is wrong with the places of a tar's members: "" when they follow each other without gaps."""

    kind: str
    what: str
    is_ordered: bool
    """Whether a walk from front to back can meet every member."""


def check_layout(offsets: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any], num_bytes: int) -> Layout:
    """Check the places of a tar's members, without the tar.

    Args:
        offsets: (rows, members) of the bytes behind the headers.
        sizes: (rows, members) in bytes.
        num_bytes: of the tar.
    """
    offsets, sizes = offsets.ravel(), sizes.ravel()
    is_wild = (sizes < 0) | (offsets < TAR_BLOCK) | (offsets % TAR_BLOCK != 0) | (sizes > 1 << 62)
    if is_wild.any():
        return Layout("member_outside", f"{int(is_wild.sum())} members lie where none can", False)
    ends = offsets + sizes + -sizes % TAR_BLOCK
    starts = offsets - TAR_BLOCK
    steps = starts - np.concatenate(([0], ends[:-1]))
    num_outside = int((ends > num_bytes).sum())
    if (steps < 0).any():
        what = "members overlap, or are not in the order of the tar"
        return Layout("member_overlap", what, False)
    if num_outside:
        return Layout("member_outside", f"{num_outside} members end behind the end of the tar", True)
    if (steps > 0).any():
        return Layout("member_gap", "bytes between the members belong to none", True)
    return Layout("", "", True)


def walk_tar(
    reader: SequentialReader,
    path: str,
    rows: Sequence[_Row],
    members: Sequence[str],
    num_bytes: int,
    findings: Findings,
) -> Iterator[dict[str, bytes] | None]:
    """Read a tar beside its index.

    Args:
        reader: at the beginning of the tar.
        path: of the tar, for the findings.
        rows: of the index, in the order of the tar, ordered (`check_layout`).
        members: their names in the index.
        num_bytes: of the tar.
        findings: takes what is wrong.

    Yields:
        For each row its members' bytes, or None where one of them is damaged or missing.
    """
    is_cut = False
    for row in rows:
        data: dict[str, bytes] = {}
        for name, member in expected_members(row, members).items():
            if is_cut:
                break
            _walk_gap(reader, path, member.offset - TAR_BLOCK - reader.position, findings)
            header, content = reader.take(TAR_BLOCK), reader.take(member.size)
            reader.skip(-member.size % TAR_BLOCK)
            if len(content) < member.size:
                what = f"the tar ends inside or before {name}, so that the samples from here on are lost"
                findings.add("truncated", path, what, key=row["key"], fix="restore the shard")
                is_cut = True
                break
            _check_header(header, member, path, row["key"], findings)
            if google_crc32c.value(content) == member.crc32c:
                data[name] = content
            else:
                what = f"the bytes of {name} are damaged (crc32c differs)"
                findings.add("member_bytes", path, what, key=row["key"], fix="restore the shard")
        yield data if len(data) == len(members) else None
    if not is_cut:
        _walk_end(reader, path, num_bytes - reader.position, findings)


def _check_header(header: bytes, member: Member, path: str, key: str, findings: Findings) -> None:
    """Compare a header with the index: a plain tar reader knows nothing else."""

    def add(kind: str, what: str) -> None:
        findings.add(kind, path, what, key=key, fix="restore the shard, or build the dataset again")

    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        add("tar_header", f"the header of {member.name} is damaged ({error})")
        return
    if found.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        add("member_type", f"{found.name!r} is {_TYPES.get(found.type, 'no plain file')}")
    if found.name != member.name:
        how = "an unsafe name" if _UNSAFE.search(found.name) else "another name"
        add("member_name", f"{how}, {found.name!r} instead of {member.name!r}")
    if found.size != member.size:
        add("member_size", f"the header of {member.name} says {found.size} bytes, the index {member.size}")


def _walk_gap(reader: SequentialReader, path: str, length: int, findings: Findings) -> None:
    """Say what lies between two members of the index: members that it does not name, or worse."""
    end = reader.position + length
    while reader.position < end:
        block = reader.take(min(TAR_BLOCK, end - reader.position))
        if not block:
            return
        if not any(block):
            what = (
                f"zeros at byte {reader.position - len(block)}: plain tar readers stop here, without an error"
            )
            findings.add("early_end", path, what, fix="restore the shard, or build the dataset again")
            reader.skip(end - reader.position)
        else:
            _name_foreign(reader, path, block, end, findings)


def _walk_end(reader: SequentialReader, path: str, length: int, findings: Findings) -> None:
    """Check the end of a tar: two blocks of zeros, and nothing else but zeros."""
    end, num_zeros = reader.position + length, 0
    while reader.position < end:
        block = reader.take(min(TAR_BLOCK, end - reader.position))
        if not block:
            break
        if any(block):
            _name_foreign(reader, path, block, end, findings)
        else:
            num_zeros += len(block)
    if num_zeros < 2 * TAR_BLOCK:
        what = f"{num_zeros} bytes of zeros at its end instead of {2 * TAR_BLOCK}"
        findings.add("tar_end", path, what, fix="restore the shard")


def _name_foreign(reader: SequentialReader, path: str, block: bytes, end: int, findings: Findings) -> None:
    """Name a member that the index does not, and pass over it; without a header, over all up to `end`."""
    start = reader.position - len(block)
    fix = "restore the shard, or build the dataset again; do not unpack it"
    try:
        found = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        findings.add("foreign_bytes", path, f"bytes from {start} on belong to no member", fix=fix)
        reader.skip(end - reader.position)
        return
    how = ", an unsafe name," if _UNSAFE.search(found.name) else ""
    what = f"a member {found.name!r}{how} that the index does not name"
    findings.add("foreign_member", path, what, fix=fix)
    size = found.size if found.type in (tarfile.REGTYPE, tarfile.AREGTYPE) else 0
    reader.skip(min(size + -size % TAR_BLOCK, end - reader.position))
