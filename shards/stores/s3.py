"""Source objects in S3, by boto3: lists of them, and the remote twin of `FileBlob`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from shards.stores.blobs import Blob, ChangedObject, temporary_file, writing_temporary
from shards.stores.parts import read_parts
from shards.stores.s3_errors import DamagedObject, Refused
from shards.stores.s3_requests import (
    Place,
    Retries,
    content_md5,
    get_bytes,
    head_object,
    list_page,
    list_pages,
    parse_uri,
)

SMALL_BYTES = 1 << 17
"""An object up to this size is read whole when its head is asked for: the second request would cost more."""

LARGE_BYTES = 64 << 20
"""An object above this size is read in parts where it need not be in memory."""

LISTS_AT_ONCE = 16
MAX_DESCENT = 16
"""So far we go down where a folder holds but one other, to find some to list side by side."""


class Listed(NamedTuple):
    """An object of a source.

    Attributes:
        name: its key below the prefix; for a prefix that is itself an object, the last part of the key.
        uri: where it is.
        num_bytes: its size.
        version: its entity tag.
    """

    name: str
    uri: str
    num_bytes: int
    version: str


def list_objects(uri: str, retries: Retries | None = None) -> Iterator[Listed]:
    """List what lies below a prefix, in no order; a few pages are in memory at a time.

    `s3://bucket/a` and `s3://bucket/a/` list `a/...`, not `ab/...`; the former also an object named `a`.
    Objects that only stand for folders, empty and with a slash at the end, are left out.

    Raises:
        ConfigError: the uri is none.
        EnvironmentFault: the bucket does not exist, or cannot be listed.
    """
    retries = retries or Retries()
    place = parse_uri(uri)
    if place.key and not place.key.endswith("/"):
        answer = head_object(place, retries)
        if answer is not None:
            name = PurePosixPath(place.key).name
            yield Listed(name, place.uri, answer["ContentLength"], answer["ETag"].strip('"'))
        place = Place(place.bucket, f"{place.key}/")
    start, base = len(place.key), f"s3://{place.bucket}/"
    for item in _list_side_by_side(place, retries):
        key = item["Key"]
        yield Listed(key[start:], base + key, item["Size"], item["ETag"].strip('"'))


def _list_side_by_side(place: Place, retries: Retries) -> Iterator[dict[str, Any]]:
    """List folders at once, those of the first level that has several: a page of 1000 may take .1 s."""
    top = list_page(place, retries, delimiter="/")
    for _ in range(MAX_DESCENT):
        if len(top.folders) != 1 or top.objects or top.token:
            break
        place = Place(place.bucket, top.folders[0])
        top = list_page(place, retries, delimiter="/")
    # so many folders that some may hold next to nothing; or nothing at all, which is worth a second question
    if top.token or not (top.folders or top.objects):
        yield from list_pages(place, retries)
        return
    yield from top.objects
    waiting = iter([Place(place.bucket, folder) for folder in top.folders])
    pool = ThreadPoolExecutor(LISTS_AT_ONCE, "lists")
    try:
        coming = {pool.submit(list_page, part, retries): part for part in islice(waiting, LISTS_AT_ONCE)}
        while coming:
            done, _ = wait(coming, return_when=FIRST_COMPLETED)
            for future in done:
                part, page = coming.pop(future), future.result()
                following = part if page.token else next(waiting, None)
                if following is not None:
                    coming[pool.submit(list_page, following, retries, page.token)] = following
                yield from page.objects
    finally:
        pool.shutdown(cancel_futures=True)


class S3Blob(Blob):
    """An object in S3; read once, then held. It must still be the one that was listed.

    What is read whole in one request is held against the checksums that the server gives; a part of an object
    has none, and neither has what was uploaded in parts without one.

    Args:
        uri: where it is.
        num_bytes: its size when it was listed.
        version: its entity tag then; "" for any.
        retries: how often and how long a request is tried.
    """

    def __init__(self, uri: str, num_bytes: int, version: str, retries: Retries | None = None) -> None:
        self._place = parse_uri(uri)
        self.uri, self.name, self.num_bytes = uri, PurePosixPath(self._place.key).name, num_bytes
        self._version, self._retries = version, retries or Retries()
        self._held = b""  # its first bytes

    def head(self, num_bytes: int) -> bytes:
        """The first bytes."""
        num_bytes = min(num_bytes, self.num_bytes)
        if len(self._held) < num_bytes:
            if self.num_bytes <= SMALL_BYTES:
                return self.read()[:num_bytes]
            self._held = self._get((0, num_bytes))
        return self._held[:num_bytes]

    def read(self) -> bytes:
        """All bytes, whatever their number: readers of large formats use `as_file`."""
        if len(self._held) < self.num_bytes:
            self._held = self._get(None)
        return self._held

    def sha256(self) -> bytes:
        """Digest of all bytes; of a large object, without having it in memory."""
        if self._is_at_hand():
            return super().sha256()
        digest = hashlib.sha256()
        for part in self._parts():
            digest.update(part)
        return digest.digest()

    @contextmanager
    def as_file(self) -> Iterator[Path]:
        """The object as a file in the folder for temporary files (TMPDIR), for the length of the block."""
        if self._is_at_hand():
            with super().as_file() as path:
                yield path
            return
        with temporary_file(self.name) as file:
            with writing_temporary():
                for part in self._parts():
                    file.write(part)
                file.flush()
            yield Path(file.name)

    def _is_at_hand(self) -> bool:
        return self.num_bytes <= LARGE_BYTES or len(self._held) == self.num_bytes

    def _parts(self) -> Iterator[bytes]:
        answer = head_object(self._place, self._retries)
        expected = content_md5(answer, answer["ETag"].strip('"')) if answer else None
        digest = hashlib.md5(usedforsecurity=False)
        for part in read_parts(lambda offset, size: self._get((offset, size)), self.num_bytes):
            if expected:
                digest.update(part)
            yield part
        if expected and digest.hexdigest() != expected:
            fix = "run the same command again; if it stays, write the object again"
            raise DamagedObject("came with wrong bytes", where=self.uri, fix=fix)

    def _get(self, span: tuple[int, int] | None) -> bytes:
        try:
            data = get_bytes(self._place, self._retries, span=span, version=self._version)
        except Refused as refused:
            what = "is gone" if refused.status == 404 else "was changed"
            raise self._changed(what) from None
        if len(data) != (span[1] if span else self.num_bytes):
            raise self._changed("was changed")
        return data

    def _changed(self, what: str) -> ChangedObject:
        fix = "run the same command again, which lists the source anew"
        return ChangedObject(f"the object {what} since it was listed", where=self.uri, fix=fix)
