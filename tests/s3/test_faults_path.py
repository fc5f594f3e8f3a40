"""The whole way, from objects in S3 to batches, while every other request fails; and random storms.

Objects in S3 are built into a dataset in S3, which is audited, and read for an epoch: by the same proxy.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shards.builder.writer
from shards.read.order import OrderConfig
from shards.read.stream import SampleStream, StreamConfig
from shards.stores.s3_requests import Retries
from tests.s3.building import assert_whole, download, tars_of
from tests.s3.proxy import FaultProxy
from tests.shards.building import build
from tests.shards.images import write_images

REPEATS = int(os.environ.get("FREPA_SOAK_REPEATS", "20"))
NUM_IMAGES, BATCH, SHARD_BYTES = 24, 8, 40_000
KINDS = ("500", "slow_down", "reset", "lost", "stall", "truncate", "wrong_body")
ORDER = OrderConfig(global_batch_size=BATCH, num_streams=2, block_shards=2, seed=5)

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    names = [f"{number:02d}.png" for number in range(NUM_IMAGES)]
    return write_images(tmp_path_factory.mktemp("images"), names)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, images) -> dict[str, bytes]:
    """The tars of an undisturbed build."""
    root = tmp_path_factory.mktemp("whole") / "root"
    build(images, root, shard_bytes=SHARD_BYTES)
    return tars_of({str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.tar")})


@pytest.fixture(scope="module")
def epoch(tmp_path_factory, images) -> list:
    """The micro-batches of an epoch, read from a folder."""
    root = tmp_path_factory.mktemp("read") / "root"
    build(images, root, shard_bytes=SHARD_BYTES)
    return read_epoch(root)


def read_epoch(place: Path | str, **settings: object) -> list:
    config = StreamConfig(root=str(place), image_size=32, patch_size=8, **settings)
    return list(SampleStream(config, ORDER, 0, 1, 4).batches(1))


def assert_equal(one: list, other: list) -> None:
    assert len(one) == len(other) == NUM_IMAGES // BATCH
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.keys() == y.keys()
            for name, value in x.items():
                if name == "cache_requests":  # whether a shard was there already is no matter of the data
                    continue
                assert torch.equal(value, y[name]) if torch.is_tensor(value) else value == y[name], name


def go_all_the_way(s3, folder: Path, remote: str, expected: dict, epoch: list, name: str = "data") -> None:
    """Build from S3 into S3, audit, read; all of it must be what an undisturbed run gives."""
    source, place = f"{s3.uri}/in", f"{s3.uri}/{name}"
    report = build(source, place, shard_bytes=SHARD_BYTES, state=folder / "state")
    assert (report.counts.samples, report.quarantined) == (NUM_IMAGES, {})
    assert tars_of(download(s3, name)) == expected
    assert_whole(place)
    assert_equal(read_epoch(place, remote=remote, cache_dir=folder / "cache"), epoch)


@pytest.mark.parametrize("kind", KINDS)
def test_every_other_request_fails(s3, faults, images, tmp_path, expected, epoch, kind):
    s3.put_tree(images, "in/")
    if kind == "stall":  # each costs its timeout: a few objects are enough
        faults.add(kind, key=r"[27]\.(png|tar)$", method="GET", attempts=(1, 3), seconds=30)
    else:
        for method in ("GET", "PUT", "HEAD", "DELETE"):
            faults.add(kind, method=method, attempts=range(1, 1 << 30, 2), by_range=True)
    remote = "range" if KINDS.index(kind) % 2 else "cache"
    go_all_the_way(s3, tmp_path, remote, expected, epoch)
    hit = {(seen.method, seen.key.partition("/")[0]) for seen in faults.seen if seen.fault == kind}
    assert hit >= {("GET", "in"), ("GET", "data")}


READ_EPOCH = """
import sys
from shards.read.order import OrderConfig
from shards.read.stream import SampleStream, StreamConfig
config = StreamConfig(root=sys.argv[1], image_size=32, patch_size=8, remote="cache", cache_dir=sys.argv[2])
order = OrderConfig(global_batch_size=8, num_streams=2, block_shards=2, seed=5)
print(flush=True)
list(SampleStream(config, order, 0, 1, 4).batches(1))
"""


def test_a_cache_left_by_a_crash(s3, faults, images, tmp_path, epoch):
    """A reader is killed within a download; further copies are cut or have a wrong byte: none is used."""
    place, cache = f"{s3.uri}/data", tmp_path / "cache"
    build(images, place, shard_bytes=SHARD_BYTES, state=tmp_path / "state")
    started: list[subprocess.Popen] = []

    def kill() -> None:
        os.kill(started[0].pid, signal.SIGKILL)

    faults.add("call", key=r"-000001\.tar$", method="GET", call=kill)
    environment = {**os.environ, "PYTHONPATH": str(Path(shards.builder.writer.__file__).parents[2])}
    command = [sys.executable, "-c", READ_EPOCH, place, str(cache)]
    started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    _, errors = started[0].communicate(timeout=60)
    assert started[0].returncode == -signal.SIGKILL, errors
    faults.clear()
    read_epoch(place, remote="cache", cache_dir=cache)
    copies = sorted(path for path in cache.iterdir() if path.stat().st_size > 1000)
    assert len(copies) >= 2
    os.truncate(copies[0], 700)
    data = bytearray(copies[1].read_bytes())
    data[len(data) // 2] ^= 1
    copies[1].write_bytes(data)
    (cache / f"{copies[0].name}.frepa-tmp-1-2").write_bytes(b"half")
    assert_equal(read_epoch(place, remote="cache", cache_dir=cache), epoch)


def storm(faults: FaultProxy, seed: int) -> None:
    """A fifth of all requests fail, drawn by object and attempt."""
    faults.clear()
    for kind in ("500", "slow_down", "reset", "lost", "truncate", "wrong_body"):
        for method in ("GET", "PUT", "HEAD", "DELETE"):
            # parts of objects come without a checksum, and a reader asks for them twice only
            probability = 0.01 if kind == "wrong_body" else 0.04
            faults.add(kind, method=method, probability=probability, seed=seed, by_range=True)


@pytest.mark.soak
@pytest.mark.timeout(60 * REPEATS)
def test_storms(s3, faults, images, tmp_path, expected, epoch, monkeypatch):
    """Builds, audits and epochs while a fifth of all requests fail at random, six kinds mixed."""
    patient = Retries(attempts=8, backoff_seconds=0.01, connect_seconds=5, read_seconds=5)
    for module in ("s3", "s3_store"):
        monkeypatch.setattr(f"shards.stores.{module}.Retries", lambda: patient)
    s3.put_tree(images, "in/")
    num_requests = num_failed = 0
    for repeat in range(REPEATS):
        storm(faults, repeat)
        remote = ("cache", "range")[repeat % 2]
        go_all_the_way(s3, tmp_path / str(repeat), remote, expected, epoch, f"data{repeat}")
        num_requests += len(faults.seen)
        num_failed += sum(seen.fault != "" for seen in faults.seen)
    print(f"{REPEATS} storms: {num_failed} of {num_requests} requests failed")
    assert num_failed > num_requests / 10
