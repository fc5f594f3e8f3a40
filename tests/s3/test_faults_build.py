"""Every fault on the way to S3 once, while a build plans, reads and writes: it passes, or stops and goes on.

What passes leaves the bytes of an undisturbed build. What stays ends the build with an error that names the
object, and nothing that a reader would take for a dataset; once it is over, the same command goes on.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import shards.builder.prepare
from shards.stores.store import BUILD_LOCK
from shards.support.errors import EnvironmentFault
from tests.s3.building import assert_whole, download, files_of, tars_of
from tests.s3.proxy import ALWAYS, LISTING
from tests.shards.building import active_rows, build, known_keys, table_of
from tests.shards.images import draw, encode, write_images

NUM_IMAGES = 6
VICTIM = r"in/3\.png$"
PASSING = ("500", "slow_down", "reset", "stall", "truncate", "wrong_body")
STAYING = {
    "500": r"500 InternalError",
    "slow_down": r"503 SlowDown",
    "reset": r"the connection fails or breaks",
    "stall": r"no answer in time",
    "truncate": r"the connection fails or breaks",
    "expired": r"the credentials have expired",
}

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), [f"{number}.png" for number in range(NUM_IMAGES)])


@pytest.fixture(scope="module")
def expected(tmp_path_factory, images) -> dict[str, bytes]:
    """The tars of a build that nothing disturbs."""
    root = tmp_path_factory.mktemp("whole") / "root"
    build(images, root)
    assert_whole(root)
    return tars_of(files_of(root))


@pytest.fixture
def source(s3, images) -> str:
    return s3.put_tree(images, "in/").rstrip("/")


def build_with(phase: str, act, monkeypatch: pytest.MonkeyPatch, source: str, root: Path | str, **options):
    """Build; something happens before it, or when the plan is written and its objects are not read yet."""

    def save_then_act(part: object, *args: object, save=shards.builder.prepare.save_part) -> None:
        save(part, *args)
        act()

    if phase == "plan":
        act()
        return build(source, root, **options)
    with monkeypatch.context() as patch:
        patch.setattr("shards.builder.prepare.save_part", save_then_act)
        return build(source, root, **options)


PHASES = pytest.mark.parametrize("phase", ["plan", "read"])


@PHASES
@pytest.mark.parametrize("kind", PASSING)
def test_what_passes_changes_nothing(source, faults, monkeypatch, tmp_path, expected, phase, kind):
    def act() -> None:
        faults.add(kind, key=r"[24]\.png$", method="GET", attempts=(1, 2), seconds=30)

    report = build_with(phase, act, monkeypatch, source, tmp_path / "root")
    assert sum(seen.fault == kind for seen in faults.seen) == 4
    assert (report.counts.samples, report.counts.is_closed) == (NUM_IMAGES, True)
    assert tars_of(files_of(tmp_path / "root")) == expected


@PHASES
@pytest.mark.parametrize("kind", STAYING)
def test_what_stays_stops_the_build(source, faults, monkeypatch, tmp_path, expected, phase, kind):
    root = tmp_path / "root"

    def act() -> None:
        faults.add(kind, key=VICTIM, method="GET", attempts=ALWAYS, seconds=30)

    with pytest.raises(EnvironmentFault, match=rf"{source}/3\.png: .*{STAYING[kind]}") as caught:
        build_with(phase, act, monkeypatch, source, root)
    assert caught.value.fix
    assert files_of(root) == {}
    faults.clear()
    counts = build(source, root).counts
    assert (counts.samples, counts.is_closed) == (NUM_IMAGES, True)
    assert tars_of(files_of(root)) == expected


@PHASES
def test_wrong_bytes_that_stay_are_one_bad_object(source, faults, monkeypatch, tmp_path, phase):
    """The network is fine, this object is not: it is quarantined and named, and taken once it is mended."""
    root = tmp_path / "root"

    def act() -> None:
        faults.add("wrong_body", key=VICTIM, method="GET", attempts=ALWAYS)

    report = build_with(phase, act, monkeypatch, source, root)
    assert (report.quarantined, report.counts.samples) == ({"changed": 1}, NUM_IMAGES - 1)
    (row,) = table_of(root, "quarantine")
    assert known_keys(root)[row["key"]]["uri"] == f"{source}/3.png".encode()
    assert_whole(root)
    faults.clear()
    report = build(source, root, retry_quarantined=True)
    assert (report.quarantined, report.counts.samples) == ({}, NUM_IMAGES)
    assert_whole(root)


@PHASES
@pytest.mark.parametrize("what", ["deleted", "changed"])
def test_an_object_that_is_not_what_was_listed(s3, source, faults, monkeypatch, tmp_path, phase, what):
    root = tmp_path / "root"

    def meddle() -> None:
        if what == "deleted":
            s3.delete("in/3.png")
        else:
            s3.put("in/3.png", encode(draw(333)))

    def act() -> None:
        faults.add("call", key=VICTIM, method="GET", call=meddle)

    report = build_with(phase, act, monkeypatch, source, root)
    assert (report.quarantined, report.counts.samples) == ({"changed": 1}, NUM_IMAGES - 1)
    (row,) = table_of(root, "quarantine")
    assert known_keys(root)[row["key"]]["uri"] == f"{source}/3.png".encode()
    assert_whole(root)
    report = build(source, root)
    assert report.counts.samples == NUM_IMAGES - (what == "deleted")
    assert report.counts.is_closed
    assert len(active_rows(root)) == report.counts.samples
    assert_whole(root)


@pytest.mark.parametrize("kind", ["500", "expired"])
def test_a_list_that_fails(source, faults, tmp_path, kind):
    faults.add(kind, key=LISTING, attempts=ALWAYS)
    with pytest.raises(EnvironmentFault, match=rf"{source}.*{STAYING[kind]}"):
        build(source, tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_missing_buckets(source, images, tmp_path):
    missing, state = "s3://frepa-missing/data", tmp_path / "state"
    with pytest.raises(EnvironmentFault, match=f"{missing}.*no such bucket"):
        build(missing, tmp_path / "root")
    with pytest.raises(EnvironmentFault, match=f"{missing}.*no such bucket"):
        build(source, missing, state=state)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, images) -> tuple[Path, dict[str, bytes]]:
    """A state folder for tests to copy, and all files of the dataset that is built with it."""
    root = tmp_path_factory.mktemp("dataset") / "root"
    build(images, root, shard_bytes=1)
    return files_of(root)


@pytest.mark.parametrize("kind", ["500", "slow_down", "reset", "lost"])
def test_writes_outlast_what_passes(s3, images, faults, tmp_path, dataset, kind):
    """The first try to write or to delete any object fails: locks, tars, indices, tables, pointer."""
    for method in ("PUT", "DELETE", "HEAD"):
        faults.add(kind, method=method)
    report = build(images, f"{s3.uri}/data", shard_bytes=1, state=tmp_path / "state")
    hit = {seen.key for seen in faults.seen if seen.fault == kind}
    assert hit >= {f"data/{path}" for path in (*dataset, BUILD_LOCK)}
    assert report.counts.samples == NUM_IMAGES
    assert download(s3, "data") == dataset
    faults.clear()
    assert_whole(f"{s3.uri}/data")


@pytest.mark.parametrize(
    "key", [r"\.tar$", r"\.index\.parquet$", r"tables/", r"snapshots/", r"dataset\.json$"]
)
@pytest.mark.parametrize("kind", ["500", "expired"])
def test_writes_that_stay_refused(s3, images, faults, tmp_path, dataset, kind, key):
    place = f"{s3.uri}/data"
    faults.add(kind, key=key, method="PUT", attempts=ALWAYS)
    with pytest.raises(EnvironmentFault, match=rf"{place}/.*{STAYING[kind]}") as caught:
        build(images, place, shard_bytes=1, state=tmp_path / "state")
    assert re.search(key.removesuffix("$"), str(caught.value))
    assert not s3.keys("data/dataset.json")
    faults.clear()
    assert build(images, place, shard_bytes=1, state=tmp_path / "state").counts.samples == NUM_IMAGES
    assert download(s3, "data") == dataset
