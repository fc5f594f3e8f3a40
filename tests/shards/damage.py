"""Damaging a whole dataset, and asking what an audit finds."""

from __future__ import annotations

import tarfile

import google_crc32c

from shards.audit.findings import KINDS, REMARKS
from shards.audit.verify import verify_dataset
from shards.dataset import load_snapshot, read_index
from shards.hf.tokens import HFParams
from tests.shards.whole import (
    change_index,
    change_tar,
    reseal,
)

CT, FUNDUS = "ct/tiny-000000.tar", "fundus/tiny-000001.tar"
OTHER = HFParams(fov="none", cutoff_cycles=20)


def find(root, *, deep=False, **options):
    """Problems by kind, after a look at what every report must be."""
    report = verify_dataset(root, deep=deep, jobs=1, **options)
    assert report.ok == (not report.problems)
    assert set(report.counts) <= set(KINDS)
    assert set(report.remark_counts) <= set(REMARKS)
    assert all(problem.fix for problem in report.problems)
    assert all(str(problem) in "\n".join(report.lines()) for problem in report.problems)
    return report


def kinds(root, **options):
    return find(root, **options).counts


def member(root, path, row, name):
    """Place of a member: offset and size."""
    shard = next(shard for shard in load_snapshot(root).shards if shard.path == path)
    item = read_index(root, shard).slice(row, 1).to_pylist()[0]
    return item[f"{name}_offset"], item[f"{name}_size"]


def flip(offset):
    def change(data):
        data[offset] ^= 1
        return data

    return change


def put(offset, content):
    def change(data):
        data[offset : offset + len(content)] = content
        return data

    return change


def header(name, size, **fields):
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.USTAR_FORMAT)


def edit(number, **changes):
    def change(rows):
        rows[number].update(changes)
        return rows

    return change


def replace_member(root, path, row, name, content):
    """Replace a member by one that fits into the same blocks, checksums and all."""
    offset, size = member(root, path, row, name)
    assert -(-len(content) // 512) == -(-size // 512)
    key = read_index(root, next(s for s in load_snapshot(root).shards if s.path == path))["key"][row].as_py()
    old = (root / path).read_bytes()[offset - 512 : offset]
    called = tarfile.TarInfo.frombuf(old, "utf-8", "strict").name
    assert called.startswith(key)
    padded = content + bytes(-len(content) % 512)
    change_tar(root, path, put(offset - 512, header(called, len(content)) + padded))
    changes = {f"{name}_size": len(content), f"{name}_crc32c": google_crc32c.value(content)}
    change_index(root, path, edit(row, **changes))
    reseal(root)


def read(root, path, row, name):
    offset, size = member(root, path, row, name)
    return (root / path).read_bytes()[offset : offset + size]
