"""Every fault of the way to S3 once: what passes is waited for, what stays is an error that helps."""

from __future__ import annotations

import logging
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from shards.dataset import file_crc32c
from shards.stores.blobs import ChangedObject, open_blob
from shards.stores.cache import ShardCache
from shards.stores.s3 import S3Blob, list_objects
from shards.stores.s3_requests import Retries, attempt, parse_uri
from shards.stores.s3_store import S3Store
from shards.stores.store import MissingFile
from shards.support.errors import EnvironmentFault
from tests.s3.proxy import ALWAYS, LISTING
from tests.s3.server import ACCESS_KEY, SECRET_KEY

QUICK = Retries(attempts=3, backoff_seconds=0.01, connect_seconds=5, read_seconds=20)
IMPATIENT = QUICK._replace(read_seconds=0.5)
DATA = bytes(range(256)) * 2000
PASSING = ("500", "slow_down", "reset", "delay")
BODIES = ("stall", "truncate")


@pytest.fixture
def stored(s3):
    """An object and its version."""
    s3.put("data/a.png", DATA)
    (found,) = list_objects(f"{s3.uri}/data/", QUICK)
    return found


def retries_for(fault):
    return IMPATIENT if fault in ("delay", "stall") else QUICK


def blob(found, retries=QUICK):
    return S3Blob(found.uri, found.num_bytes, found.version, retries)


def read(way, found, retries=QUICK):
    store = S3Store(found.uri.rpartition("/")[0], retries)
    if way == "store":
        return store.read("a.png")
    if way == "range":
        return store.read_range("a.png", 0, len(DATA))
    if way == "blob":
        return blob(found, retries).read()
    return blob(found, retries).head(200_000) + DATA[200_000:]


def error_of(run, kind=EnvironmentFault):
    """Let something fail; see that the error says where and how to mend it, and keeps what is secret."""
    with pytest.raises(kind) as caught:
        run()
    text = "".join(traceback.format_exception(caught.value))
    assert SECRET_KEY not in text
    assert "Signature=" not in text
    assert ACCESS_KEY not in str(caught.value)
    assert caught.value.fix
    return str(caught.value)


@pytest.mark.parametrize("fault", [*PASSING, *BODIES])
def test_reads_outlast_what_passes(stored, faults, fault):
    ways = ["range"] if fault == "slow_down" else ["store", "range", "blob", "head"]
    for way in ways:
        faults.clear()
        faults.add(fault, key="a.png$", method="GET", attempts=(1,), seconds=30)
        assert read(way, stored, retries_for(fault)) == DATA
        assert faults.count("a.png$", "GET") == 2


@pytest.mark.parametrize(
    ("fault", "way", "says"),
    [
        ("500", "store", "the server is busy or failing (500 InternalError), 3 times"),
        ("slow_down", "blob", "the server is busy or failing (503 SlowDown), 3 times"),
        ("reset", "head", "the connection fails or breaks (ConnectionClosedError), 3 times"),
        ("delay", "range", "no answer in time, 3 times"),
        ("stall", "blob", "no answer in time, 3 times"),
        ("truncate", "store", "the connection fails or breaks ("),
    ],
)
def test_reads_give_up(stored, faults, fault, way, says):
    faults.add(fault, key="a.png$", method="GET", attempts=ALWAYS, seconds=30)
    message = error_of(lambda: read(way, stored, retries_for(fault)))
    assert message.startswith(f"{stored.uri}: {says}")
    assert faults.count("a.png$", "GET") == 3


@pytest.mark.parametrize("keep_checksums", [True, False])
@pytest.mark.parametrize("way", ["store", "blob"])
def test_wrong_bytes(stored, faults, way, keep_checksums):
    """Known by the server's checksum, or where it gives none by the entity tag, which is an MD5."""
    faults.add("wrong_body", method="GET", attempts=(1, 2), keep_checksums=keep_checksums)
    assert read(way, stored) == DATA
    assert faults.count("a.png$", "GET") == 3
    faults.clear()
    faults.add("wrong_body", method="GET", attempts=ALWAYS, keep_checksums=keep_checksums)
    message = error_of(lambda: read(way, stored), ChangedObject)
    assert message.startswith(f"{stored.uri}: came with wrong bytes 3 times")
    assert faults.count("a.png$", "GET") == 3


def test_wrong_bytes_of_a_large_object(s3, stored, faults, monkeypatch):
    """What is read in parts is held against the entity tag as a whole."""
    monkeypatch.setattr("shards.stores.s3.LARGE_BYTES", 1000)
    with blob(stored).as_file() as path:
        assert path.read_bytes() == DATA
    faults.add("wrong_body", method="GET", attempts=ALWAYS)
    with pytest.raises(ChangedObject, match="came with wrong bytes"), blob(stored).as_file():
        pass
    with pytest.raises(ChangedObject, match="came with wrong bytes"):
        blob(stored).sha256()


def test_lists(s3, faults):
    keys = [f"data/{number:04}" for number in range(1003)]  # two pages
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: s3.put(key, b""), keys))
    for fault in (*PASSING, *BODIES):
        faults.clear()
        faults.add(fault, key=LISTING, attempts=(3,), seconds=30)  # the second page, after a look for folders
        assert [found.name for found in list_objects(f"{s3.uri}/data", retries_for(fault))] == [
            key[5:] for key in keys
        ]
        assert faults.count(LISTING) == 4
    for fault in ("500", "truncate"):
        faults.clear()
        faults.add(fault, key=LISTING, attempts=ALWAYS)
        message = error_of(lambda: list(list_objects(f"{s3.uri}/data/", QUICK)))
        assert message.startswith(f"{s3.uri}/data/: ")
        assert faults.count(LISTING) == 3


@pytest.mark.parametrize("fault", PASSING)
def test_writes(s3, faults, fault):
    store = S3Store(f"{s3.uri}/data", retries_for(fault))
    faults.add(fault, method="PUT", seconds=30)
    store.write("a", DATA)
    assert s3.get("data/a") == DATA
    assert faults.count("data/a", "PUT") == 2


@pytest.mark.parametrize("fault", ["500", "delay"])
def test_writes_give_up(s3, faults, fault):
    store = S3Store(f"{s3.uri}/data", retries_for(fault))
    faults.add(fault, method="PUT", attempts=ALWAYS, seconds=30)
    assert error_of(lambda: store.write("b", DATA)).startswith(f"{s3.uri}/data/b: ")
    assert faults.count("data/b", "PUT") == 3
    assert s3.keys() == []


def test_a_pointer_whose_answer_was_lost(s3, faults):
    """The first try wrote it, the second one is told that it is there: still a success."""
    store = S3Store(s3.uri, QUICK)
    faults.add("reset", key="pointer", method="PUT", call=lambda: s3.put("pointer", b"1"))
    store.replace("pointer", b"1", None)
    faults.clear()
    faults.add("reset", key="pointer", method="PUT", call=lambda: s3.put("pointer", b"2"))
    store.replace("pointer", b"2", b"1")
    faults.clear()
    faults.add("reset", key="pointer", method="PUT", call=lambda: s3.put("pointer", b"of somebody else"))
    with pytest.raises(EnvironmentFault, match="another program has written here"):
        store.replace("pointer", b"3", b"2")


def test_uploads_in_parts(s3, faults, monkeypatch):
    monkeypatch.setattr("shards.stores.s3_store.UPLOAD_PART_BYTES", 5 << 20)
    store, data = S3Store(s3.uri, QUICK), bytes(12 << 20)
    faults.add("500", method="PUT", attempts=(2,))  # of three parts
    with store.writing("big.tar") as file:
        file.write(data)
    assert s3.get("big.tar") == data
    assert faults.count("big.tar", "PUT") == 4
    faults.clear()
    faults.add("500", method="PUT", attempts=range(3, 1000))
    error_of(lambda: upload(store, data))
    assert s3.keys() == ["big.tar"]
    assert s3.uploads() == [], "the parts of an upload that failed are taken back"


def upload(store, data):
    with store.writing("other.tar") as file:
        file.write(data)


def test_expired_credentials(stored, faults, s3):
    faults.add("expired", key="a.png$", attempts=ALWAYS)
    message = error_of(lambda: blob(stored).read())
    assert message.startswith(f"{stored.uri}: the credentials have expired")
    assert "renew them" in message


def test_renewed_credentials_are_found(stored, faults, monkeypatch, tmp_path):
    """A program that runs for days lives through a change of the credentials file."""
    file = tmp_path / "credentials"

    def write(secret: str) -> None:
        file.write_text(f"[default]\naws_access_key_id={ACCESS_KEY}\naws_secret_access_key={secret}\n")

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    write("of-yesterday")
    faults.add("expired", call=lambda: write(SECRET_KEY))
    assert blob(stored).read() == DATA
    assert faults.count("a.png") == 2


def test_refused_credentials(stored, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", f"{ACCESS_KEY}-2")
    assert "the credentials are refused (InvalidAccessKeyId)" in error_of(lambda: blob(stored).read())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "there are no credentials for S3" in error_of(lambda: blob(stored).read())
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "AWS_PROFILE" in error_of(lambda: blob(stored).read())


def test_denied(stored, faults):
    faults.add("denied", key="a.png$", attempts=ALWAYS)
    message = error_of(lambda: blob(stored).head(10))
    assert message.startswith(f"{stored.uri}: access is denied (AccessDenied)")
    assert faults.count("a.png$") == 1, "to ask again would not help"


def test_missing_bucket(s3):
    uri = "s3://no-such-bucket/data"
    for run in (
        lambda: list(list_objects(f"{uri}/", QUICK)),
        lambda: S3Store(uri, QUICK).read("a"),
        lambda: S3Store(uri, QUICK).write("a", b""),
        lambda: S3Store(uri, QUICK).lock("me").__enter__(),
        lambda: open_blob(f"{uri}/a", 3, "").read(),
    ):
        message = error_of(run)
        assert message.startswith(uri)
        assert "there is no such bucket" in message


def test_nobody_answers(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    message = error_of(lambda: S3Store(s3.uri, QUICK).read("a"))
    assert message.startswith(
        f"{s3.uri}/a: the connection fails or breaks (EndpointConnectionError), 3 times"
    )
    assert "AWS_ENDPOINT_URL" in message


def test_no_endpoint(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    assert "boto3 cannot be set up" in error_of(lambda: S3Store(s3.uri, QUICK).read("a"))


@pytest.mark.parametrize("size", [10, 300_000])
def test_deleted_or_changed_since_it_was_listed(s3, size):
    s3.put("data/a.png", bytes(size))
    (found,) = list_objects(f"{s3.uri}/data/", QUICK)
    s3.put("data/a.png", bytes(size - 1) + b"x")  # another object of the same size
    for read in (lambda: blob(found).head(5), lambda: blob(found).read(), lambda: blob(found).sha256()):
        assert f"{found.uri}: the object was changed since" in error_of(read, ChangedObject)
    s3.delete("data/a.png")
    for read in (lambda: blob(found).head(5), lambda: blob(found).read()):
        assert f"{found.uri}: the object is gone since" in error_of(read, ChangedObject)
    with pytest.raises(MissingFile):
        S3Store(f"{s3.uri}/data", QUICK).read("a.png")


def test_changed_between_two_parts(s3, faults, monkeypatch):
    monkeypatch.setattr("shards.stores.s3.LARGE_BYTES", 1000)
    data = bytes(20 << 20)
    s3.put("data/a.nii", data)
    (found,) = list_objects(f"{s3.uri}/data/", QUICK)
    faults.add("call", method="GET", attempts=(3,), call=lambda: s3.put("data/a.nii", data[:-1] + b"x"))
    with pytest.raises(ChangedObject), blob(found).as_file():
        pass


def test_a_storm(s3, faults):
    """Hundreds of failures on many threads; boto3's own quota of retries is empty after a hundred."""
    keys = [f"data/{number}" for number in range(120)]
    for key in keys:
        s3.put(key, key.encode())
    faults.add("500", method="GET", attempts=(1, 2))
    store = S3Store(s3.uri, QUICK)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(store.read, keys)) == [key.encode() for key in keys]
    assert faults.count() == 3 * len(keys)


def test_a_cached_shard_comes_through_faults(s3, faults, tmp_path):
    data = bytes(range(256)) * 100_000  # four parts
    s3.put("data/a.tar", data)
    (tmp_path / "a").write_bytes(data)
    with (tmp_path / "a").open("rb") as file:
        crc32c = file_crc32c(file)
    for number, fault in enumerate(["500", "reset", "truncate", "stall", "wrong_body"], 1):
        faults.add(fault, method="GET", attempts=(number,), seconds=30)
    store = S3Store(f"{s3.uri}/data", IMPATIENT._replace(attempts=7, read_seconds=2))
    path = ShardCache(tmp_path / "cache", 1 << 26).fetch(store, "a.tar", len(data), crc32c)
    assert path.read_bytes() == data
    assert {item.fault for item in faults.seen} == {"", "500", "reset", "truncate", "stall", "wrong_body"}


def test_nothing_is_logged_that_is_secret(stored, faults, caplog):
    with caplog.at_level(logging.INFO):
        faults.add("500", key="a.png$", attempts=(1, 2))
        blob(stored).read()
    assert SECRET_KEY not in caplog.text
    assert "Signature=" not in caplog.text


def test_a_bug_is_not_a_fault():
    """What is no answer of S3 passes through at once."""
    calls = []

    def call(client):
        calls.append(client)
        raise TypeError

    with pytest.raises(TypeError):
        attempt(call, parse_uri("s3://bucket/key"), QUICK)
    assert len(calls) == 1
