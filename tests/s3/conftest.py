"""What the tests of builds over S3 share."""

from __future__ import annotations

import pytest

from shards.stores.s3_requests import Retries, create_client

QUICK = Retries(attempts=3, backoff_seconds=0.01, connect_seconds=5, read_seconds=20)


@pytest.fixture
def quick(monkeypatch, request) -> Retries:
    """Retries that wait for next to nothing, in this process; a build with one job runs in it.

    Only where a server stalls are they impatient: a busy machine must not look like one that does.
    After a SlowDown, boto3's adaptive mode would have the process pause for seconds, as it should elsewhere.
    """
    case = getattr(request.node, "callspec", None)
    stalls = case is not None and "stall" in case.params.values()
    retries = QUICK._replace(read_seconds=0.7) if stalls else QUICK
    for module in ("s3", "s3_store"):
        monkeypatch.setattr(f"shards.stores.{module}.Retries", lambda: retries)
    monkeypatch.setattr(
        "shards.stores.s3_requests.create_client",
        lambda retries, mode="standard", **more: create_client(retries, "standard", **more),
    )
    return retries
