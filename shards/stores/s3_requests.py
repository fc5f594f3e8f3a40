"""Requests to S3: one client per process, repeated when they fail for a while, errors that say what to do.

boto3's own chain alone finds credentials, endpoint and addressing style (environment, config file, role); for
MinIO, Ceph and others set AWS_ENDPOINT_URL, which turns on path style.

boto3 does not repeat what fails after the header of an answer, and its quota of repetitions is empty after a
hundred of them, whatever the number of threads. So it is told to try once, and `attempt` repeats the whole.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple, TypeVar

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from shards.stores.s3_errors import EXPIRED_CODES, DamagedBody, Refused, error_code, explain, may_pass
from shards.stores.store import S3_PREFIX
from shards.support.errors import ConfigError, EnvironmentFault

MAX_CONNECTIONS = 64
"""Connections of a client, so the number of threads that can use it at once."""

MAX_BACKOFF_SECONDS = 20.0
CREDENTIAL_ATTEMPTS = 3
"""How often expired credentials are looked up anew: something else may be about to renew their file."""

Mode = Literal["adaptive", "standard"]
T = TypeVar("T")
_BUCKET_PATTERN = re.compile(r"[a-zA-Z0-9.\-_]{1,255}")
_MD5_PATTERN = re.compile(r"[0-9a-f]{32}")


class Retries(NamedTuple):
    """How long a request is tried.

    Attributes:
        attempts: tries of one request.
        backoff_seconds: pause after the first; doubled each time up to `MAX_BACKOFF_SECONDS`, less up to a
            half at random. The defaults make about 40 s of pauses.
        connect_seconds: how long a connection may take.
        read_seconds: how long the server may be silent.
    """

    attempts: int = 8
    backoff_seconds: float = 0.5
    connect_seconds: float = 10.0
    read_seconds: float = 60.0


class Place(NamedTuple):
    """A bucket and a key, or a prefix."""

    bucket: str
    key: str

    @property
    def uri(self) -> str:
        """As text."""
        return f"{S3_PREFIX}{self.bucket}/{self.key}" if self.key else f"{S3_PREFIX}{self.bucket}"


def parse_uri(uri: str) -> Place:
    """Split `s3://bucket/key`.

    Raises:
        ConfigError: it is none.
    """
    bucket, _, key = uri.removeprefix(S3_PREFIX).partition("/")
    if not uri.startswith(S3_PREFIX) or not _BUCKET_PATTERN.fullmatch(bucket):
        raise ConfigError("not a place in S3", where=uri, allowed="s3://bucket or s3://bucket/prefix")
    return Place(bucket, key)


def attempt(call: Callable[[Any], T], place: Place, retries: Retries, mode: Mode = "adaptive") -> T:
    """Run a request, and repeat it while it fails for reasons that may pass.

    Args:
        call: makes the whole request with the client that it is given, the body of the answer included. It
            may run several times.
        place: what it is about, for errors.
        retries: how often and how long.
        mode: "adaptive" slows the whole process down after a SlowDown, for seconds: right for a program that
            asks for as much as it can; "standard" only has the request wait that met it.

    Raises:
        Refused: 404, 412 or 416.
        DamagedObject: see there.
        EnvironmentFault: all others, and whatever did not pass.
    """
    expired = 0
    for number in range(1, retries.attempts + 1):
        client = create_client(retries, mode)
        try:
            return call(client)
        except (ClientError, BotoCoreError, ResponseParserError, DamagedBody) as error:
            code = error_code(error)
            if code in EXPIRED_CODES and (expired := expired + 1) < CREDENTIAL_ATTEMPTS:
                _forget(client, retries, mode)
            elif not may_pass(error) or number == retries.attempts:
                raise explain(error, place.uri, number) from error
        pause = min(retries.backoff_seconds * 2 ** (number - 1), MAX_BACKOFF_SECONDS)
        time.sleep(pause * random.uniform(0.5, 1))
    raise ConfigError("no attempt is allowed", where="attempts", allowed="1 or more")


def get_bytes(
    place: Place,
    retries: Retries,
    *,
    span: tuple[int, int] | None = None,
    version: str = "",
    mode: Mode = "adaptive",
) -> bytes:
    """Read an object or a part of it, checked against its length and the checksums that the server gives.

    Args:
        place: of the object.
        retries: how often and how long.
        span: offset and size of a part, of which there is at least a byte; a part has no checksum.
        version: entity tag that the object must have, "" for any.
        mode: see `attempt`.

    Raises:
        Refused, DamagedObject, EnvironmentFault: as `attempt`.
    """
    return get_with_version(place, retries, span=span, version=version, mode=mode)[0]


def get_with_version(
    place: Place,
    retries: Retries,
    *,
    span: tuple[int, int] | None = None,
    version: str = "",
    mode: Mode = "adaptive",
) -> tuple[bytes, str]:
    """Read as `get_bytes`; return the entity tag as well."""
    request = {"Bucket": place.bucket, "Key": place.key}
    if span is not None:
        request["Range"] = f"bytes={span[0]}-{span[0] + span[1] - 1}"
    if version:
        request["IfMatch"] = f'"{version}"'

    def call(client: Any) -> tuple[bytes, str]:
        answer = client.get_object(**request)
        with closing(answer["Body"]) as body:  # closed before its end, it takes its connection along
            data = body.read()
        _check_body(answer, data, span)
        return data, answer["ETag"].strip('"')

    return attempt(call, place, retries, mode)


class Page(NamedTuple):
    """A page of a list.

    Attributes:
        objects: as boto3 describes them; without empty ones that end in a slash, which stand for folders.
        folders: prefixes of what is deeper, where the list stops at slashes.
        token: what the next page is asked with, None for the last one.
    """

    objects: list[dict[str, Any]]
    folders: list[str]
    token: str | None


def list_page(place: Place, retries: Retries, token: str | None = None, *, delimiter: str = "") -> Page:
    """Ask for a page of the objects whose keys begin with a prefix."""
    request = {"Bucket": place.bucket, "Prefix": place.key}
    request |= {"ContinuationToken": token} if token else {}
    request |= {"Delimiter": delimiter} if delimiter else {}
    answer = attempt(lambda client: client.list_objects_v2(**request), place, retries)
    return Page(
        [item for item in answer.get("Contents", ()) if item["Size"] or not item["Key"].endswith("/")],
        [item["Prefix"] for item in answer.get("CommonPrefixes", ())],
        answer["NextContinuationToken"] if answer.get("IsTruncated") else None,
    )


def list_pages(place: Place, retries: Retries) -> Iterator[dict[str, Any]]:
    """List the objects whose keys begin with a prefix, one page after the other."""
    page = list_page(place, retries)
    yield from page.objects
    while page.token:
        page = list_page(place, retries, page.token)
        yield from page.objects


def head_object(place: Place, retries: Retries) -> dict[str, Any] | None:
    """Ask for what is known of an object, None where there is none."""

    def call(client: Any) -> dict[str, Any]:
        answer: dict[str, Any] = client.head_object(Bucket=place.bucket, Key=place.key)
        return answer

    try:
        return attempt(call, place, retries)
    except Refused:
        return None


def content_md5(answer: Mapping[str, Any], version: str) -> str | None:
    """Take the MD5 of an object's bytes from its entity tag, where that is one.

    The tag of an object that was uploaded in parts, or is encrypted with a key of its own, is none.
    """
    encrypted = (
        answer.get("ServerSideEncryption", "").startswith("aws:kms") or "SSECustomerAlgorithm" in answer
    )
    express = answer.get("StorageClass") == "EXPRESS_ONEZONE"
    is_md5 = _MD5_PATTERN.fullmatch(version) and not encrypted and not express
    return version if is_md5 else None


def _check_body(answer: Mapping[str, Any], data: bytes, span: tuple[int, int] | None) -> None:
    if len(data) != answer["ContentLength"]:
        raise DamagedBody
    if span is not None:
        if not answer.get("ContentRange", "").startswith(f"bytes {span[0]}-") or len(data) > span[1]:
            raise DamagedBody
        return
    if "ChecksumAlgorithm" in answer["ResponseMetadata"]:
        return  # boto3 has compared it
    expected = content_md5(answer, answer["ETag"].strip('"'))
    if expected and hashlib.md5(data, usedforsecurity=False).hexdigest() != expected:
        raise DamagedBody


def create_client(retries: Retries, mode: Mode = "adaptive", *, repeats: bool = False) -> Any:
    """Get this process's client; threads share it, a forked process makes its own.

    Args:
        retries: how often and how long.
        mode: see `attempt`.
        repeats: have boto3 repeat requests by itself, for its transfers in parts.

    Raises:
        EnvironmentFault: boto3's configuration is broken.
    """
    names = ("ENDPOINT_URL", "ENDPOINT_URL_S3", "PROFILE", "ACCESS_KEY_ID", "CONFIG_FILE")
    identity = tuple(os.environ.get(f"AWS_{name}", "") for name in names)
    with _creation_lock(os.getpid()):  # else each of the first threads would make one, at .2 s
        return _client(os.getpid(), identity, retries, mode, repeats)


@cache
def _creation_lock(process: int) -> threading.Lock:
    return threading.Lock()  # by process: a fork may happen while another thread holds it


@lru_cache(maxsize=8)
def _client(process: int, identity: tuple[str, ...], retries: Retries, mode: Mode, repeats: bool) -> Any:
    config = Config(
        connect_timeout=retries.connect_seconds,
        read_timeout=retries.read_seconds,
        max_pool_connections=MAX_CONNECTIONS,
        retries={"mode": mode, "total_max_attempts": retries.attempts if repeats else 1},
        tcp_keepalive=True,
    )
    try:
        session = botocore.session.get_session()
        # nobody reads when an object was changed, and parsing it is two thirds of the time that a list takes
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
        return boto3.Session(botocore_session=session).client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise EnvironmentFault(
            f"boto3 cannot be set up ({type(error).__name__})",
            where="S3",
            fix="correct AWS_PROFILE, AWS_ENDPOINT_URL or the AWS config file",
        ) from error


def _forget(client: Any, retries: Retries, mode: Mode) -> None:
    """Have the next client look for credentials anew, unless another thread has seen to that."""
    if create_client(retries, mode) is client:
        _client.cache_clear()
