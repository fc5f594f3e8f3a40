"""What the tests of builds over S3 share: views of what is in a bucket, and what must hold of any build."""

from __future__ import annotations

from pathlib import Path

from shards.audit.verify import verify_dataset
from shards.dataset import load_snapshot
from shards.stores.atomic import TEMP_MARK
from shards.stores.store import BUILD_LOCK
from tests.s3.server import Bucket
from tests.shards.images import read_tree


def download(s3: Bucket, prefix: str) -> dict[str, bytes]:
    """Every object below a prefix, by its key below it."""
    return {key.removeprefix(f"{prefix}/"): s3.get(key) for key in s3.keys(f"{prefix}/")}


def files_of(root: Path) -> dict[str, bytes]:
    """Every file of a dataset but its lock, which in a folder stays."""
    files = read_tree(root)
    files.pop(BUILD_LOCK, None)
    return files


def tars_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".tar")}


def assert_whole(place: Path | str) -> None:
    """Hold a dataset against all that it says of itself: the accounting closes, every byte is right."""
    snapshot = load_snapshot(place)
    assert snapshot.counts.is_closed
    assert all(item.counts.is_closed for item in snapshot.builds)
    report = verify_dataset(place, deep=True, jobs=1)
    assert report.ok, "\n".join(report.lines())
    assert not report.remark_counts, report.remark_counts
    if not str(place).startswith("s3://"):
        assert not any(TEMP_MARK in name for name in read_tree(Path(place)))
