from __future__ import annotations

import hashlib
import os
import pickle

import pytest

from shards.stores import s3 as s3_module
from shards.stores import s3_requests
from shards.stores.blobs import BytesBlob, ChangedObject, FileBlob, file_version, open_blob, temporary_suffix
from shards.stores.s3 import Listed, S3Blob, list_objects
from shards.support.errors import ConfigError


def names(uri):
    return sorted(found.name for found in list_objects(uri))


class TestList:
    def test_what_is_listed(self, s3):
        tag = hashlib.md5(b"123", usedforsecurity=False).hexdigest()
        s3.put("data/sub/a.png", b"123")
        assert list(list_objects(f"{s3.uri}/data")) == [
            Listed("sub/a.png", f"{s3.uri}/data/sub/a.png", 3, tag)
        ]

    def test_prefixes(self, s3):
        for key in ("data", "data/a", "data/b/c", "data2/x", "other"):
            s3.put(key, b"1")
        assert names(f"{s3.uri}/data/") == ["a", "b/c"]
        assert names(f"{s3.uri}/data") == ["a", "b/c", "data"]
        assert names(f"{s3.uri}/data2/x") == ["x"]
        assert names(f"{s3.uri}/dat") == []
        assert names(s3.uri) == names(f"{s3.uri}/") == ["data", "data/a", "data/b/c", "data2/x", "other"]

    def test_odd_keys(self, s3):
        keys = ["a b", "a+b", "ü/é", "%41", "x&y<z>", "'q\"", "two  spaces", "a=b?c#d"]
        for key in keys:
            s3.put(f"data/{key}", key.encode())
        found = {item.name: item for item in list_objects(f"{s3.uri}/data/")}
        assert sorted(found) == sorted(keys)
        for key in keys:
            assert open_blob(*found[key][1:]).read() == key.encode()

    def test_folder_markers_are_left_out(self, s3):
        for key in ("data/", "data/sub/", "data/sub/a"):
            s3.put(key, b"")
        assert names(f"{s3.uri}/data") == ["sub/a"]

    def test_folders_are_listed_side_by_side(self, s3, faults, monkeypatch):
        """Every key once, however many folders there are; one that holds but one other is gone through."""
        monkeypatch.setattr(s3_module, "LISTS_AT_ONCE", 3)
        keys = [f"a/b/{folder}/{number}" for folder in range(7) for number in range(folder)] + ["a/b/top"]
        for key in keys:
            s3.put(key, b"")
        assert names(s3.uri) == sorted(keys)
        assert faults.count("^$") == 3 + 6  # what is in "", a/ and a/b/, and a page of each folder

    def test_pages_of_a_folder(self, s3, faults, monkeypatch):
        """Small pages: the tokens of folders that are listed side by side do not mix."""
        keys = [f"{folder}/{number:03}" for folder in "abc" for number in range(7)]
        for key in keys:
            s3.put(key, b"")
        original = s3_requests.attempt

        def in_small_pages(call, *args, **more):
            return original(lambda client: call(SmallPages(client)), *args, **more)

        monkeypatch.setattr(s3_requests, "attempt", in_small_pages)
        assert names(s3.uri) == keys
        assert faults.count("^$") == 1 + 3 * 4
        s3.put("d/0", b"")
        assert names(s3.uri) == [*keys, "d/0"]  # four folders are more than a page

    def test_no_uri(self):
        with pytest.raises(ConfigError, match="not a place in S3"):
            next(list_objects("/a/folder"))


class SmallPages:
    def __init__(self, client):
        self.client = client

    def list_objects_v2(self, **request):
        return self.client.list_objects_v2(**request, MaxKeys=3 if "Delimiter" in request else 2)


class TestBlob:
    @pytest.mark.parametrize("size", [0, 10, s3_module.SMALL_BYTES + 1])
    def test_one_request_for_small_objects(self, s3, faults, size):
        data = os.urandom(size)
        s3.put("scan.nii.gz", data)
        (found,) = list_objects(s3.uri)
        faults.clear()
        blob = pickle.loads(pickle.dumps(open_blob(found.uri, found.num_bytes, found.version)))
        assert (blob.name, blob.num_bytes) == ("scan.nii.gz", size)
        assert blob.head(4) == data[:4]
        assert blob.head(2) == data[:2]
        ranges = [item.range for item in faults.seen]
        assert ranges == {0: [], 10: [""]}.get(size, ["bytes=0-3"])
        assert blob.read() == data
        assert blob.read() == data
        assert blob.head(1000) == data[:1000]
        assert blob.sha256() == hashlib.sha256(data).digest()
        with blob.as_file() as path:
            assert path.read_bytes() == data
            assert path.name.endswith(".nii.gz")
            assert path.stat().st_mode & 0o077 == 0
        assert not path.exists()
        assert faults.count() == {0: 0, 10: 1}.get(size, 2)

    def test_large_objects_come_in_parts(self, s3, faults, monkeypatch):
        monkeypatch.setattr(s3_module, "LARGE_BYTES", 1 << 20)
        data = os.urandom(9 << 20)
        s3.put("a.svs", data)
        (found,) = list_objects(s3.uri)
        faults.clear()
        blob = open_blob(*found[1:])
        with blob.as_file() as path:
            assert path.read_bytes() == data
        assert blob.sha256() == hashlib.sha256(data).digest()
        assert faults.count("a.svs", "GET") == 4

    def test_without_a_version_the_size_counts(self, s3):
        s3.put("a", b"123")
        assert S3Blob(f"{s3.uri}/a", 3, "").read() == b"123"
        with pytest.raises(ChangedObject, match="was changed"):
            S3Blob(f"{s3.uri}/a", 4, "").read()


class TestFiles:
    def test_a_file(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(b"123")
        blob = open_blob(str(path), 3, file_version(path.stat()))
        assert isinstance(blob, FileBlob)
        assert (blob.head(2), blob.read(), blob.name) == (b"12", b"123", "a.png")
        with blob.as_file() as file:
            assert file == path

    @pytest.mark.parametrize("change", ["size", "time", "gone"])
    def test_changed_or_gone(self, tmp_path, change):
        path = tmp_path / "a.png"
        path.write_bytes(b"123")
        blob = open_blob(str(path), 3, file_version(path.stat()))
        if change == "gone":
            path.unlink()
        else:
            path.write_bytes(b"1234" if change == "size" else b"124")
            os.utime(path, (1, 1))
        for use in (lambda: blob.head(1), blob.read, lambda: blob.as_file().__enter__()):
            with pytest.raises(ChangedObject, match=f"{path}: the file (is gone|was changed) since"):
                use()


def test_temporary_files_keep_suffixes_only():
    assert temporary_suffix("John.Smith.nii.gz") == ".nii.gz"
    assert temporary_suffix("John.Smith.dcm") == ".dcm"
    assert temporary_suffix("IM0001") == ""
    with BytesBlob(b"1", "smith.nii.gz").as_file() as path:
        assert path.name.endswith(".nii.gz")
        assert "smith" not in path.name
