"""Tars: where members lie, and that they tell nothing of the machine."""

from __future__ import annotations

import io
import tarfile

import google_crc32c

from shards.builder.tar import append_members, finish_tar


def test_members_lie_where_the_columns_say():
    file = io.BytesIO()
    one = append_members(file, "k1", [("image", "png", b"a" * 700), ("json", "json", b"{}")])
    two = append_members(file, "k2", [("image", "npy.zst", b"")])
    size = finish_tar(file)
    data = file.getvalue()
    assert len(data) == size
    assert size % 512 == 0
    assert data[one["image_offset"] :][: one["image_size"]] == b"a" * 700
    assert one["json_crc32c"] == google_crc32c.value(b"{}")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == ["k1.png", "k1.json", "k2.npy.zst"]
        assert [member.offset_data for member in members] == [
            one["image_offset"],
            one["json_offset"],
            two["image_offset"],
        ]
        assert {(m.uid, m.gid, m.uname, m.gname, m.mtime, m.mode) for m in members} == {
            (0, 0, "", "", 0, 0o644)
        }
