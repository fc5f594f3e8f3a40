"""What goes wrong with one object, with its place, with this machine, and with this program."""

from __future__ import annotations

import tempfile

import pytest

from shards.builder.objects import reading_object
from shards.formats.common import Unreadable
from shards.stores.blobs import BytesBlob
from shards.support.errors import EnvironmentFault


def test_no_room_for_a_temporary_file_is_no_fault_of_the_object(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    blob = BytesBlob(b"data", "patient.h5")
    with (
        pytest.raises(EnvironmentFault, match="TMPDIR"),
        reading_object("s3://bucket/patient.h5", ()),
        blob.as_file(),
    ):
        pytest.fail("there is no folder for it")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(FileNotFoundError(2, "gone"), "changed"), (PermissionError(13, "denied"), "unreadable_file")],
)
def test_what_one_object_has(tmp_path, error, reason):
    (tmp_path / "other").touch()
    with pytest.raises(Unreadable) as caught, reading_object(str(tmp_path / "a.png"), (str(tmp_path),)):
        raise error
    assert caught.value.reason == reason


def test_a_bug_names_the_object():
    with pytest.raises(ZeroDivisionError) as caught, reading_object("/source/a.png", ()):
        _ = 1 / 0
    assert caught.value.__notes__ == ["while reading /source/a.png"]
