"""What an audit finds in a tar: each kind of damage by its name."""

from __future__ import annotations

import io
import os
import tarfile

import pytest

from shards.builder.tar import append_members, finish_tar
from shards.dataset import load_snapshot, read_index
from shards.schema import MEMBERS, index_path
from tests.shards.damage import (
    CT,
    FUNDUS,
    edit,
    find,
    flip,
    header,
    kinds,
    member,
    put,
)
from tests.shards.whole import (
    change_index,
    change_tar,
    make_key,
    reseal,
)


@pytest.mark.parametrize("name", MEMBERS)
def test_flipped_bit_in_a_member(root, name):
    offset, size = member(root, FUNDUS, 1, name)
    change_tar(root, FUNDUS, flip(offset + size // 2))
    assert find(root).ok
    report = find(root, deep=True)
    assert report.counts == {"member_bytes": 1, "tar_bytes": 1}
    damaged = next(problem for problem in report.problems if problem.kind == "member_bytes")
    assert damaged.key == read_index(root, load_snapshot(root).shards[3])["key"][1].as_py()
    assert f"bytes of {name} " in damaged.what


def test_flipped_bit_in_padding(root):
    offset, size = member(root, FUNDUS, 0, "json")
    assert size % 512
    change_tar(root, FUNDUS, flip(offset + size))
    assert kinds(root, deep=True) == {"tar_bytes": 1}


def test_garbage_header(root):
    offset, _ = member(root, CT, 1, "hf")
    change_tar(root, CT, put(offset - 512, os.urandom(512)))
    report = find(root, deep=True)
    assert report.counts == {"tar_header": 1, "tar_bytes": 1}
    assert "hf.npy" in next(p for p in report.problems if p.kind == "tar_header").what


def test_truncated_inside_a_member(root):
    offset, size = member(root, CT, 1, "image")
    change_tar(root, CT, lambda data: data[: offset + size // 2])
    assert kinds(root, deep=True) == {"file_size": 1, "truncated": 1, "tar_bytes": 1}


def test_cut_between_members(root):
    """A plain tar reader sees no error here."""
    offset, _ = member(root, CT, 1, "hf")
    change_tar(root, CT, lambda data: data[: offset - 512])
    with tarfile.open(root / CT) as tar:
        assert len(tar.getnames()) == 5
    report = find(root, deep=True)
    assert report.counts == {"file_size": 1, "truncated": 1, "tar_bytes": 1}
    reseal(root)  # by a snapshot that believes the cut tar
    assert kinds(root) == {"member_outside": 1}
    assert kinds(root, deep=True) == {"member_outside": 1, "truncated": 1}


def test_zeros_in_the_middle(root):
    """A plain tar reader stops here without an error."""
    offset, _ = member(root, CT, 1, "image")
    change_tar(root, CT, put(offset - 512, bytes(512)))
    reseal(root)
    assert kinds(root, deep=True) == {"tar_header": 1}
    change_index(root, CT, lambda rows: [rows[0], rows[2]])
    reseal(root)
    report = find(root, deep=True)
    assert {"member_gap", "early_end"} <= set(report.counts)


def test_unsafe_and_odd_members(root):
    """A tar whose headers are changed, and a snapshot that believes it."""
    key = make_key("salt", 0)
    names = {"image": "../../x", "hf": "/etc/x", "hfmap": f"{key}.image", "json": f"{key}.json"}
    for name, called in names.items():
        offset, size = member(root, CT, 0, name)
        fields = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"} if name == "json" else {}
        change_tar(root, CT, put(offset - 512, header(called, 0 if fields else size, **fields)))
    reseal(root)
    report = find(root, deep=True)
    assert report.counts == {"member_name": 3, "member_type": 1, "member_size": 1}
    text = "\n".join(report.lines())
    assert "an unsafe name, '../../x'" in text
    assert "an unsafe name, '/etc/x'" in text
    assert f"another name, '{key}.image'" in text
    assert "is a symbolic link" in text


@pytest.mark.parametrize(
    ("name", "how"), [("../../x", ", an unsafe name,"), ("C:\\x", ", an unsafe name,"), ("more.txt", "")]
)
def test_members_that_the_index_does_not_name(root, name, how):
    def append(data):
        return bytes(data[:-1024]) + header(name, 5) + b"12345" + bytes(507 + 1024)

    change_tar(root, CT, append)
    reseal(root)
    assert find(root).ok
    report = find(root, deep=True)
    assert report.counts == {"foreign_member": 1}
    assert f"a member {name!r}{how} that the index does not name" in report.problems[0].what


def test_a_key_twice_in_one_tar(root):
    """The index names one of the two; a plain reader would take the other."""

    def append(data):
        tar = io.BytesIO(bytes(data[:-1024]))
        tar.seek(0, 2)
        append_members(tar, make_key("salt", 0), [("image", "npy.zst", b"another image")])
        finish_tar(tar)
        return tar.getvalue()

    change_tar(root, CT, append)
    reseal(root)
    report = find(root, deep=True)
    assert report.counts == {"foreign_member": 1}
    assert make_key("salt", 0) in report.problems[0].what


def test_end_of_the_tar(root):
    change_tar(root, CT, lambda data: data[:-512])
    change_tar(root, FUNDUS, lambda data: bytes(data) + b"\x01" * 700)
    reseal(root)
    assert kinds(root, deep=True) == {"tar_end": 1, "foreign_bytes": 1}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (edit(2, json_offset=1 << 40), "member_outside"),
        (edit(2, json_size=1 << 20), "member_outside"),
        (edit(0, image_offset=0), "member_outside"),
        (edit(0, image_size=-5), "member_outside"),
        (edit(0, image_size=(1 << 63) - 1), "member_outside"),
        (edit(1, image_offset=512), "member_overlap"),
        (lambda rows: rows[::-1], "member_overlap"),
        (lambda rows: [rows[0], rows[2]], "member_gap"),
    ],
)
def test_places_that_cannot_be(root, change, kind):
    change_index(root, CT, change)
    reseal(root)
    report = find(root)
    assert report.counts[kind] == 1
    assert report.problems[-1].where == index_path(CT)
