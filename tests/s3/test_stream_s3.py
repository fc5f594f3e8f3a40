"""The loader over a real S3 server: the same bits as from a folder, and faults told from bad samples."""

from __future__ import annotations

import io
import multiprocessing.forkserver
import os
import shutil
import time
from pathlib import Path

import cv2
import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
import torch
import zstandard

from shards.builder.tar import append_members, finish_tar
from shards.dataset import encode_table, file_crc32c, write_snapshot, write_table
from shards.read.order import OrderConfig
from shards.read.stream import MicroBatch, SampleStream, StreamConfig
from shards.schema import INDEX_SCHEMA, TABLES, Counts, ShardInfo, Snapshot, index_path
from shards.stores.store import LocalStore
from shards.support.errors import ConfigError, DataError, EnvironmentFault
from tests.s3.proxy import ALWAYS

ORDER = OrderConfig(global_batch_size=8, num_streams=2, block_shards=2, seed=5)
NUM_SHARDS, NUM_ROWS = 8, 7


def write_shard(root: Path, path: str, first: int) -> ShardInfo:
    """Samples of noise with maps of noise: here only who reads what matters."""
    rows = []
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    with (root / path).open("w+b") as tar:
        for number in range(first, first + NUM_ROWS):
            rng = np.random.default_rng(number)
            key, image = f"sample{number:05d}", rng.integers(0, 256, (40, 48), np.uint8)
            ok, png = cv2.imencode(".png", image)
            assert ok
            header = np.lib.format.header_data_from_array_1_0(np.zeros((10, 12), np.uint8))
            packed = _npy(header, rng.integers(1, 256, (10, 12), np.uint8))
            members = [("image", "png", png.tobytes()), ("hf", "hf.npy", b"ranks")]
            members += [("hfmap", "hfmap.npy.zst", zstandard.compress(packed)), ("json", "json", b"{}")]
            facts = {"key": key, "image_ext": "png", "dtype": "uint8", "height": 40, "width": 48}
            facts |= {"channels": 1, "source_height": 40, "source_width": 48, "pixel_hash": "", "dhash64": 0}
            facts |= {"labels": "{}", "object": number, "unit": 0}
            rows.append(facts | append_members(tar, key, members))
        num_bytes, crc = finish_tar(tar), file_crc32c(tar)
    index = encode_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))
    (root / index_path(path)).write_bytes(index)
    return ShardInfo(
        path=path,
        modality="oct",
        source="noise",
        num_samples=NUM_ROWS,
        num_bytes=num_bytes,
        crc32c=crc,
        index_crc32c=google_crc32c.value(index),
    )


def _npy(header: dict, array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    shards = [write_shard(root, f"oct/noise-{i:06d}.tar", i * NUM_ROWS) for i in range(NUM_SHARDS)]
    counts = Counts(objects=NUM_SHARDS * NUM_ROWS, units=NUM_SHARDS * NUM_ROWS, samples=NUM_SHARDS * NUM_ROWS)
    tables = {
        name: write_table(LocalStore(root), name, schema.empty_table()) for name, schema in TABLES.items()
    }
    facts = {"created_by": "test", "size": 40, "patch_size": 16, "map_cell": 4, "hf": {"oct": {}}}
    snapshot = Snapshot(
        **facts,
        modalities=["oct"],
        hf_digests={"oct": "0123"},
        shards=shards,
        counts=counts,
        builds=[],
        tables=tables,
    )
    write_snapshot(LocalStore(root), snapshot, None)
    return root


@pytest.fixture
def uri(s3, folder) -> str:
    # workers have the environment that the fork server of an earlier test was started with
    multiprocessing.forkserver._forkserver._stop()
    return s3.put_tree(folder, "my/dataset/")


@pytest.fixture(params=["cache", "range"])
def remote(request, tmp_path) -> dict:
    return {"remote": request.param, "cache_dir": tmp_path / "cache"}


def stream_of(root: Path | str, rank: int = 0, world_size: int = 1, **settings) -> SampleStream:
    config = StreamConfig(root=root, image_size=32, patch_size=8, **settings)
    return SampleStream(config, ORDER, rank, world_size, 2)


def assert_equal(one: list[list[MicroBatch]], other: list[list[MicroBatch]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.keys() == y.keys()
            for name, value in x.items():
                if name == "cache_requests":  # not of the samples, but of the way to them
                    continue
                assert torch.equal(value, y[name]) if torch.is_tensor(value) else value == y[name], name


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_is_that_of_the_folder_bit_for_bit(folder, uri, remote, num_workers):
    expected = list(stream_of(folder).batches(1))
    assert len(expected) == 7
    stream = stream_of(uri, **remote, num_workers=num_workers)
    assert_equal(list(stream.batches(1)), expected)
    assert_equal(list(stream.batches(1, 4)), expected[4:])  # resumed in the middle
    second = list(stream_of(uri, 1, 2, **remote).batches(1))
    assert_equal(second, [batch[2:] for batch in expected])  # of two ranks


def test_shards_are_fetched_once_by_all_processes_of_a_machine(uri, faults, tmp_path):
    config = {"remote": "cache", "cache_dir": tmp_path / "cache"}
    first = list(stream_of(uri, **config, num_workers=2).batches(0))
    second = list(stream_of(uri, **config).batches(1))
    asked = [
        [sum(counts) for counts in zip(*(m["cache_requests"] for b in epoch for m in b), strict=True)]
        for epoch in (first, second)
    ]
    assert min(map(sum, asked)) >= NUM_SHARDS, "each was asked for, by the worker that read it"
    assert asked[1][1] == 0, "no request of the second epoch missed"
    assert faults.count(r"\.tar$", "GET") == NUM_SHARDS


def test_shards_of_the_next_blocks_are_fetched_ahead(uri, faults, tmp_path):
    stream = stream_of(uri, remote="cache", cache_dir=tmp_path / "cache")
    batches = stream.batches(0)
    next(batches)  # of the first block of each of two streams
    deadline = time.monotonic() + 20
    while faults.count(r"\.tar$", "GET") < NUM_SHARDS and time.monotonic() < deadline:
        time.sleep(0.02)
    assert faults.count(r"\.tar$", "GET") == NUM_SHARDS
    num = len(faults.seen)
    list(batches)
    assert not any(record.key.endswith(".tar") for record in faults.seen[num:])


def test_a_server_that_is_down_is_no_bad_sample(uri, faults, remote):
    stream = stream_of(uri, **remote, bad_samples="skip", num_workers=1)
    faults.add("denied", key=r"noise-.*\.tar$", attempts=ALWAYS)
    with pytest.raises(EnvironmentFault, match=r"s3://.*noise-\d+\.tar"):
        list(stream.batches(0))


def test_slow_downs_and_torn_answers_are_passed_over(folder, uri, faults, remote):
    for number, kind in enumerate(("slow_down", "truncate", "reset")):
        faults.add(kind, key=rf"noise-00000{number}\.tar$", attempts=(1,))
    assert_equal(list(stream_of(uri, **remote).batches(2)), list(stream_of(folder).batches(2)))
    assert {record.fault for record in faults.seen} >= {"slow_down", "truncate", "reset"}


@pytest.mark.parametrize("kind", ["gone", "cut"])
def test_a_bad_shard_is_replaced_as_in_a_folder(s3, folder, uri, remote, tmp_path, kind):
    """Sample by sample, whatever the way in which the shards are read."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    name = "oct/noise-000003.tar"
    if kind == "gone":
        (copy / name).unlink()
        s3.delete(f"my/dataset/{name}")
    else:
        os.truncate(copy / name, 9000)
        s3.put(f"my/dataset/{name}", (copy / name).read_bytes())
    with pytest.raises(DataError, match=rf"s3://.*{name}, sample"):
        list(stream_of(uri, **remote).batches(0))
    near = list(stream_of(copy, bad_samples="skip").batches(0))
    far = list(stream_of(uri, **remote, bad_samples="skip", num_workers=1).batches(0))
    lost = [skipped for batch in near for micro in batch for skipped in micro.pop("skipped")]
    missed = [skipped for batch in far for micro in batch for skipped in micro.pop("skipped")]
    assert_equal(far, near)
    assert [s["position"] for s in lost] == [s["position"] for s in missed]
    assert len(lost) >= (6 if kind == "gone" else 2)


def test_a_cache_without_room_is_refused_before_the_run(folder, uri, tmp_path):
    size = (folder / "oct/noise-000000.tar").stat().st_size
    with pytest.raises(ConfigError, match=r"cache_bytes: this rank reads 2 streams .*at least \d+"):
        stream_of(uri, cache_bytes=3 * size, cache_dir=tmp_path / "cache")
    stream = stream_of(uri, cache_bytes=5 * size, cache_dir=tmp_path / "cache")
    assert_equal(list(stream.batches(0)), list(stream_of(folder).batches(0)))
    used = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert used <= 5 * size
