"""What the tests of builds over S3 share."""

from __future__ import annotations

import pytest

from shards.stores.s3_requests import Retries, create_client

QUICK = Retries(attempts=3, backoff_seconds=0.01, connect_seconds=5, read_seconds=0.7)


@pytest.fixture
def quick(monkeypatch) -> Retries:
    """Retries that wait for next to nothing, in this process; a build with one job runs in it.

    After a SlowDown, boto3's adaptive mode would have the process pause for seconds, as it should elsewhere.
    """
    for module in ("s3", "s3_store"):
        monkeypatch.setattr(f"shards.stores.{module}.Retries", lambda: QUICK)
    monkeypatch.setattr(
        "shards.stores.s3_requests.create_client",
        lambda retries, mode="standard", **more: create_client(retries, "standard", **more),
    )
    return QUICK
