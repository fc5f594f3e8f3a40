"""Datasets in S3, by boto3: the remote twin of `LocalStore`.

S3 has no rename: an object appears whole when its upload is complete, and a pointer is changed by a
conditional PUT. A lock is an object, and stays when its holder is killed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, BinaryIO

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import BotoCoreError, ClientError

from shards.stores.blobs import writing_temporary
from shards.stores.s3_errors import Refused, explain
from shards.stores.s3_requests import (
    Place,
    Retries,
    attempt,
    create_client,
    get_bytes,
    get_with_version,
    head_object,
    list_pages,
    parse_uri,
)
from shards.stores.store import BUILD_LOCK, MissingFile, Store, Stored, faster_writer
from shards.support.errors import EnvironmentFault

UPLOAD_PART_BYTES = 16 << 20
MAX_UPLOAD_PARTS = 10_000
LOCK_ATTEMPTS = 3


class S3Store(Store):
    """A prefix of a bucket.

    Args:
        uri: `s3://bucket` or `s3://bucket/prefix`.
        retries: how often and how long a request is tried.
    """

    def __init__(self, uri: str, retries: Retries | None = None) -> None:
        place = parse_uri(uri.rstrip("/"))
        self.uri, self._bucket, self._prefix = place.uri, place.bucket, place.key
        self._retries = retries or Retries()

    def read(self, path: str) -> bytes:
        """Read a whole object."""
        try:
            return get_bytes(self._place(path), self._retries)
        except Refused:
            raise self._missing(path) from None

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """Read a part of an object; only the request that meets a busy server waits, not the process."""
        if size <= 0:
            if self.num_bytes(path) is None:
                raise self._missing(path)
            return b""
        try:
            return get_bytes(self._place(path), self._retries, span=(offset, size), mode="standard")
        except Refused as refused:
            if refused.status == 416:
                return b""
            raise self._missing(path) from None

    def num_bytes(self, path: str) -> int | None:
        """Size of an object, None where there is none."""
        answer = head_object(self._place(path), self._retries)
        return None if answer is None else int(answer["ContentLength"])

    def write(self, path: str, data: bytes) -> None:
        """Write an object whole."""
        self._put(path, data)

    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        """Write a pointer by a conditional PUT."""
        condition = {"IfNoneMatch": "*"}
        if expected is not None:
            try:
                found, version = get_with_version(self._place(path), self._retries)
            except Refused:
                raise faster_writer(self.where(path)) from None
            if found != expected:
                raise faster_writer(self.where(path))
            condition = {"IfMatch": f'"{version}"'}
        try:
            self._put(path, data, **condition)
        except Refused:
            # a first try may have written it and its answer been lost
            if self._read_or_none(path) != data:
                raise faster_writer(self.where(path)) from None

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        """Open a temporary file of this machine, uploaded at the end; TMPDIR says where."""
        with writing_temporary(), tempfile.TemporaryFile() as file:
            yield file
            file.flush()
            num_bytes = file.seek(0, 2)
            file.seek(0)
            if num_bytes <= UPLOAD_PART_BYTES:
                self._put(path, file.read())
            else:
                self._upload(path, file, num_bytes)

    def delete(self, path: str) -> None:
        """Delete an object."""
        place = self._place(path)
        with suppress(Refused):
            attempt(
                lambda client: client.delete_object(Bucket=place.bucket, Key=place.key), place, self._retries
            )

    def list(self, prefix: str = "") -> Iterator[Stored]:
        """List objects; locks are none. Sorted here: not every server does it."""
        start = len(self._key(""))
        items = list_pages(Place(self._bucket, self._key(prefix)), self._retries)
        found = [Stored(item["Key"][start:], item["Size"]) for item in items]
        for stored in sorted(found, key=lambda item: item.path.encode()):
            if not stored.path.rpartition("/")[2].startswith("."):
                yield stored

    @contextmanager
    def lock(self, owner: str) -> Iterator[None]:
        """Hold the place by an object, which names the owner and is deleted at the end."""
        self._take_lock(owner.encode())
        try:
            self._abort_uploads()
            yield
        finally:
            if self._read_or_none(BUILD_LOCK) == owner.encode():  # not one that another builder was given
                self.delete(BUILD_LOCK)

    def _take_lock(self, owner: bytes) -> None:
        for _ in range(LOCK_ATTEMPTS):
            with suppress(Refused):
                self._put(BUILD_LOCK, owner, IfNoneMatch="*")
                self._check_conditions(owner)
                return
            holder = self._read_or_none(BUILD_LOCK)
            if holder == owner:
                return
            if holder is not None:
                raise EnvironmentFault(
                    "another builder holds this place, or was killed while it did",
                    where=self.where(BUILD_LOCK),
                    allowed="one builder at a time",
                    fix="wait for it; if it is dead and its state folder lost, delete the object: "
                    f"aws s3 rm {self.where(BUILD_LOCK)}",
                )
        raise faster_writer(self.where(BUILD_LOCK))

    def _check_conditions(self, owner: bytes) -> None:
        """See that the server honors conditions, without which there is neither lock nor safe pointer."""
        with suppress(Refused):
            self._put(BUILD_LOCK, owner, IfNoneMatch="*")
            self.delete(BUILD_LOCK)
            raise EnvironmentFault(
                "the server ignores conditional writes (If-None-Match)",
                where=self.uri,
                fix="use one that knows them: S3, or a recent MinIO, Ceph or SeaweedFS",
            )

    def _abort_uploads(self) -> None:
        """Give back the room of uploads that a killed builder has left; nobody can see or use them."""
        if not self._prefix:
            return  # the bucket may hold other uploads than ours
        place = self._place("")
        with suppress(EnvironmentFault, Refused):  # to be denied this is no reason not to build
            answer = attempt(
                lambda client: client.list_multipart_uploads(Bucket=place.bucket, Prefix=place.key),
                place,
                self._retries,
            )
            for item in answer.get("Uploads", ()):
                upload = {"Bucket": place.bucket, "Key": item["Key"], "UploadId": item["UploadId"]}
                attempt(partial(_abort_upload, upload), place, self._retries)

    def _put(self, path: str, data: bytes, **condition: str) -> None:
        place = self._place(path)

        def call(client: Any) -> None:
            client.put_object(Bucket=place.bucket, Key=place.key, Body=data, **condition)

        attempt(call, place, self._retries)

    def _upload(self, path: str, file: Any, num_bytes: int) -> None:
        """Upload in parts, some of which are in memory; boto3 takes back the parts of a failed upload."""
        place = self._place(path)
        part_bytes = max(UPLOAD_PART_BYTES, -(-num_bytes // MAX_UPLOAD_PARTS))
        config = TransferConfig(
            multipart_threshold=UPLOAD_PART_BYTES, multipart_chunksize=part_bytes, max_concurrency=4
        )
        client = create_client(self._retries, repeats=True)
        try:
            client.upload_fileobj(file, place.bucket, place.key, Config=config)
        except (ClientError, BotoCoreError) as error:
            fault = explain(error, place.uri, self._retries.attempts)
            if isinstance(fault, Refused):  # 404: there is no such upload any more
                fault = EnvironmentFault(
                    "the upload was taken back before it was complete, as a new builder's lock does",
                    where=place.uri,
                    fix="see that one builder at a time writes here, then run the same command again",
                )
            raise fault from error

    def _read_or_none(self, path: str) -> bytes | None:
        try:
            return self.read(path)
        except MissingFile:
            return None

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}" if self._prefix else path

    def _place(self, path: str) -> Place:
        return Place(self._bucket, self._key(path))

    def _missing(self, path: str) -> MissingFile:
        return MissingFile("no such object", where=self.where(path), fix="restore it, or build again")


def _abort_upload(upload: dict[str, str], client: Any) -> None:
    client.abort_multipart_upload(**upload)
