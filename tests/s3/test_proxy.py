"""The rig itself: a proxy that does not do what it says would make every test of a fault worthless."""

from __future__ import annotations

import time

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    FlexibleChecksumError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from tests.s3.proxy import ALWAYS, LISTING

DATA = bytes(range(256)) * 40


@pytest.fixture
def client(s3, faults):
    """A client that tries once, by way of the proxy, and checks no checksum unless told."""
    s3.put("a/ü b+c.png", DATA)
    config = Config(
        read_timeout=0.5,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path"},
        response_checksum_validation="when_required",
    )
    return boto3.Session().client("s3", config=config)


def read(client, s3, **more):
    return client.get_object(Bucket=s3.name, Key="a/ü b+c.png", **more)["Body"].read()


def test_requests_pass_unchanged(client, s3, faults):
    assert read(client, s3) == DATA
    assert read(client, s3, Range="bytes=3-9") == DATA[3:10]
    client.put_object(Bucket=s3.name, Key="new", Body=DATA * 100)
    assert s3.get("new") == DATA * 100
    assert client.head_object(Bucket=s3.name, Key="new")["ContentLength"] == len(DATA) * 100
    page = client.list_objects_v2(Bucket=s3.name, MaxKeys=1)
    assert [item["Key"] for item in page["Contents"]] == ["a/ü b+c.png"]
    client.delete_object(Bucket=s3.name, Key="new")
    assert s3.keys() == ["a/ü b+c.png"]
    assert [(item.method, item.key, item.range) for item in faults.seen] == [
        ("GET", "a/ü b+c.png", ""),
        ("GET", "a/ü b+c.png", "bytes=3-9"),
        ("PUT", "new", ""),
        ("HEAD", "new", ""),
        ("GET", "", ""),
        ("DELETE", "new", ""),
    ]
    assert (faults.count("png$"), faults.count("new", "PUT"), faults.count(LISTING)) == (2, 1, 1)


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("500", 500, "InternalError"),
        ("slow_down", 503, "SlowDown"),
        ("expired", 400, "ExpiredToken"),
        ("denied", 403, "AccessDenied"),
    ],
)
def test_errors(client, s3, faults, kind, status, code):
    faults.add(kind, key="png$", attempts=(2,))
    assert read(client, s3) == DATA
    with pytest.raises(ClientError) as caught:
        read(client, s3)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    assert caught.value.response["Error"]["Code"] == code
    assert read(client, s3) == DATA
    assert [item.fault for item in faults.seen] == ["", kind, ""]


def test_reset(client, s3, faults):
    faults.add("reset")
    with pytest.raises(ConnectionClosedError):
        read(client, s3)
    assert read(client, s3) == DATA


def test_bodies(client, s3, faults):
    faults.add("truncate", method="GET")
    with pytest.raises((IncompleteReadError, ResponseStreamingError)):
        read(client, s3)
    faults.add("wrong_body", attempts=(1, 2))
    with pytest.raises(FlexibleChecksumError):
        read(client, s3, ChecksumMode="ENABLED")
    changed = read(client, s3)
    assert len(changed) == len(DATA)
    assert [i for i, (a, b) in enumerate(zip(changed, DATA, strict=True)) if a != b] == [len(DATA) // 2]


def test_stripped_checksums(client, s3, faults):
    faults.add("wrong_body", keep_checksums=False)
    assert read(client, s3, ChecksumMode="ENABLED") != DATA


def test_stall_and_delay(client, s3, faults):
    faults.add("stall", seconds=60)
    with pytest.raises(ReadTimeoutError):
        read(client, s3)
    faults.add("delay", seconds=0.2)
    start = time.monotonic()
    assert read(client, s3) == DATA
    assert time.monotonic() - start >= 0.2


def test_call_and_always(client, s3, faults):
    faults.add("call", key="png$", call=lambda: s3.delete("a/ü b+c.png"))
    faults.add("500", key=LISTING, attempts=ALWAYS)
    with pytest.raises(ClientError, match="NoSuchKey"):
        read(client, s3)
    for _ in range(2):
        with pytest.raises(ClientError, match="InternalError"):
            client.list_objects_v2(Bucket=s3.name)
    faults.clear()
    assert "Contents" not in client.list_objects_v2(Bucket=s3.name)


def test_multipart(client, s3, faults):
    """Uploads in parts pass, and what is left open can be seen."""
    upload = client.create_multipart_upload(Bucket=s3.name, Key="big")
    assert s3.uploads() == ["big"]
    client.abort_multipart_upload(Bucket=s3.name, Key="big", UploadId=upload["UploadId"])
    assert s3.uploads() == []
