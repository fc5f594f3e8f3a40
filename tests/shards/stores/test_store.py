"""One contract, two stores: whatever holds for a folder holds for a prefix of a bucket."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shards.stores import s3_store
from shards.stores.s3_requests import Retries, create_client
from shards.stores.s3_store import S3Store
from shards.stores.store import BUILD_LOCK, LocalStore, MissingFile, Store, Stored, is_remote, open_store
from shards.support.errors import ConfigError, EnvironmentFault

QUICK = Retries(attempts=2, backoff_seconds=0.01, connect_seconds=2, read_seconds=2)


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> Store:
    if request.param == "local":
        return LocalStore(tmp_path / "root")
    bucket = request.getfixturevalue("s3")
    bucket.put("dataset-2/foreign", b"of another dataset, whose prefix begins alike")
    return S3Store(f"{bucket.uri}/dataset", QUICK)


def listed(store, prefix=""):
    return [item.path for item in store.list(prefix)]


def test_write_and_read(store):
    store.write("a/b.bin", b"0123456789")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.num_bytes("a/b.bin") == 10
    store.write("a/b.bin", b"new")
    assert store.read("a/b.bin") == b"new"
    store.write("empty", b"")
    assert store.read("empty") == b""
    assert store.num_bytes("empty") == 0
    assert store.where("a/b.bin") == f"{store.uri}/a/b.bin"


def test_ranges(store):
    store.write("a", b"0123456789")
    assert store.read_range("a", 0, 3) == b"012"
    assert store.read_range("a", 7, 2) == b"78"
    assert store.read_range("a", 7, 100) == b"789"
    assert store.read_range("a", 10, 5) == b""
    assert store.read_range("a", 3, 0) == b""


def test_missing(store):
    assert store.num_bytes("no") is None
    assert listed(store) == []
    store.delete("no")
    for read in (
        lambda: store.read("no"),
        lambda: store.read_range("no", 0, 1),
        lambda: store.read_range("no", 0, 0),
    ):
        with pytest.raises(MissingFile, match=f"{store.uri}/no") as caught:
            read()
        assert caught.value.exit_code == 3


def test_list_is_sorted_by_bytes_and_leaves_out_locks(store):
    paths = ["a-b/x", "a.tar", "a/y", "a/z/deep", "ab", "b", "ä", "A"]
    for path in reversed(paths):
        store.write(path, path.encode())
    assert list(store.list()) == [
        Stored(path, len(path.encode()))
        for path in ["A", "a-b/x", "a.tar", "a/y", "a/z/deep", "ab", "b", "ä"]
    ]
    assert listed(store, "a/") == ["a/y", "a/z/deep"]
    assert listed(store, "a") == ["a-b/x", "a.tar", "a/y", "a/z/deep", "ab"]
    assert listed(store, "a/z") == ["a/z/deep"]
    assert listed(store, "nothing/") == []
    with store.lock("me"):
        assert BUILD_LOCK not in listed(store)


def test_delete(store):
    store.write("a", b"1")
    store.delete("a")
    assert store.num_bytes("a") is None
    assert listed(store) == []


def test_replace(store):
    store.replace("pointer", b"1", None)
    with pytest.raises(EnvironmentFault, match="another program has written here"):
        store.replace("pointer", b"2", None)
    store.replace("pointer", b"2", b"1")
    with pytest.raises(EnvironmentFault, match="another program has written here"):
        store.replace("pointer", b"3", b"1")
    with pytest.raises(EnvironmentFault, match="another program has written here"):
        store.replace("absent", b"3", b"1")
    assert store.read("pointer") == b"2"
    assert store.num_bytes("absent") is None


def test_of_many_writers_one_wins(s3):
    store = S3Store(s3.uri, QUICK)

    def write(number: int) -> bool:
        try:
            store.replace("pointer", b"%d" % number, None)
        except EnvironmentFault:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = [number for number, ok in enumerate(pool.map(write, range(8))) if ok]
    assert [b"%d" % number for number in won] == [store.read("pointer")]


@pytest.mark.parametrize("num_bytes", [0, 1000, 6_000_000])
def test_writing(store, num_bytes, monkeypatch):
    """A file may be sought and read back while it is written; above a limit it goes up in parts."""
    monkeypatch.setattr(s3_store, "UPLOAD_PART_BYTES", 1 << 20)
    data = os.urandom(num_bytes)
    with store.writing("sub/big.tar") as file:
        file.write(b"wrong")
        file.seek(0)
        file.truncate()
        file.write(data)
        file.flush()
        file.seek(0)
        assert file.read(10) == data[:10]
        assert store.num_bytes("sub/big.tar") is None
        assert listed(store) == []
    assert store.read("sub/big.tar") == data
    assert listed(store) == ["sub/big.tar"]


def write_half(store, path):
    with store.writing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError


def test_a_block_that_fails_leaves_what_was(store):
    store.write("a", b"old")
    for path in "ab":
        with pytest.raises(ZeroDivisionError):
            write_half(store, path)
    assert store.read("a") == b"old"
    assert listed(store) == ["a"]


def test_lock(store):
    with store.lock("one"):
        with pytest.raises(EnvironmentFault), store.lock("two"):
            pass
        store.write("a", b"1")
    with store.lock("two"):
        pass
    assert listed(store) == ["a"]


def test_copies_work_elsewhere(store):
    """In a pickle, and in processes that were forked while the client was in use."""
    store.write("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"1"
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(store.read, ["a"] * 8) == [b"1"] * 8
    assert store.read("a") == b"1"


def test_places():
    assert isinstance(open_store("s3://bucket/prefix/"), S3Store)
    assert open_store("s3://bucket/prefix/").uri == "s3://bucket/prefix"
    assert open_store("s3://bucket").where("a") == "s3://bucket/a"
    assert open_store("some/folder").uri == str(Path("some/folder").absolute())
    assert open_store("s3://bucket").local_path("a") is None
    assert is_remote("s3://b")
    assert not is_remote(Path("/b"))
    for wrong in ("s3://", "s3:///key", "s3://no spaces/x"):
        with pytest.raises(ConfigError, match="not a place in S3"):
            open_store(wrong)


def test_a_killed_builds_lock_is_taken_over(s3):
    """S3 keeps the lock of a killed build; who holds its state folder may go on, nobody else."""
    store = S3Store(f"{s3.uri}/data", QUICK)
    s3.put(f"data/{BUILD_LOCK}", b"my state")
    with pytest.raises(EnvironmentFault, match=f"aws s3 rm {s3.uri}/data/{BUILD_LOCK}"), store.lock("other"):
        pass
    with store.lock("my state"):
        assert s3.keys() == [f"data/{BUILD_LOCK}"]
    assert s3.keys() == []


def test_a_lock_that_was_given_away_is_left_alone(s3):
    store = S3Store(f"{s3.uri}/data", QUICK)
    with store.lock("mine"):
        s3.put(f"data/{BUILD_LOCK}", b"somebody removed it by hand, and this is the next one's")
    assert s3.keys() == [f"data/{BUILD_LOCK}"]


def test_the_lock_takes_away_what_killed_uploads_left(s3):
    for key in ("data/part.tar", "data-2/part.tar"):
        s3.client.create_multipart_upload(Bucket=s3.name, Key=key)
    with S3Store(f"{s3.uri}/data", QUICK).lock("me"):
        assert s3.uploads() == ["data-2/part.tar"]


@pytest.mark.parametrize("operation", ["UploadPart", "CompleteMultipartUpload"])
def test_an_upload_that_another_builder_took_back(s3, monkeypatch, operation):
    monkeypatch.setattr(s3_store, "UPLOAD_PART_BYTES", 5 << 20)
    store = S3Store(f"{s3.uri}/data", QUICK)

    def take_back(**_):
        for upload in s3.client.list_multipart_uploads(Bucket=s3.name).get("Uploads", []):
            s3.client.abort_multipart_upload(Bucket=s3.name, Key=upload["Key"], UploadId=upload["UploadId"])

    events = create_client(QUICK, repeats=True).meta.events
    events.register(f"before-call.s3.{operation}", take_back)
    try:
        with (
            pytest.raises(EnvironmentFault, match=r"data/a\.tar: the upload was taken back .*one builder"),
            store.writing("a.tar") as file,
        ):
            file.write(os.urandom(11 << 20))
    finally:
        events.unregister(f"before-call.s3.{operation}", take_back)
    assert listed(store) == []


def test_a_file_that_goes_while_others_are_listed(tmp_path):
    store = LocalStore(tmp_path)
    for name in "abc":
        store.write(name, b"1")
    files = store.list()
    assert next(files).path == "a"
    store.delete("b")
    assert [item.path for item in files] == ["c"]


def client_id(number: int) -> int:
    return id(create_client(QUICK))


def test_a_forked_process_has_a_client_of_its_own(s3):
    """Two processes that read from one connection get each other's bytes."""
    ours = client_id(0)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(client_id, [0]) != [ours]
    assert client_id(0) == ours


def test_threads_share_one_client(s3):
    with ThreadPoolExecutor(32) as pool:
        clients = set(pool.map(lambda _: create_client(QUICK), range(64)))
    assert len(clients) == 1
    assert clients.pop().meta.config.max_pool_connections == 64
