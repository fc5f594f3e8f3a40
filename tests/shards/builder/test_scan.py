"""Looking at many objects: in worker processes, and going on after an interruption."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import shards.builder.scan
import shards.builder.scan_files
from shards.builder.scan import ScanOptions, ScanTask, scan_group, scan_objects
from shards.builder.sources import list_objects
from shards.formats.common import ReadOptions
from shards.support.errors import EnvironmentFault
from shards.workers.pool import run_tasks
from tests.shards.images import draw, encode


@pytest.fixture
def options(tmp_path) -> ScanOptions:
    roots = (str(tmp_path / "source"),)
    return ScanOptions(read=ReadOptions(), size=64, patch_size=16, keeps_deep=False, roots=roots)


@pytest.fixture
def objects(tmp_path, monkeypatch):
    """Six hundred files of one image, every other one cut, and a text, in several groups."""
    monkeypatch.setattr(shards.builder.scan, "_MIN_POOL_OBJECTS", 100)
    monkeypatch.setattr(shards.builder.scan_files, "MEAN_ROWS", 64)
    source = tmp_path / "source"
    source.mkdir()
    data = encode(draw(0, 64, 64))
    for number in range(600):
        (source / f"{number:04d}.png").write_bytes(data[: len(data) - number % 2 * 3000])
    (source / "x.txt").write_bytes(b"words")
    return list_objects([source]).objects


def test_processes_find_what_threads_find(tmp_path, objects, options, monkeypatch):
    found = scan_objects(objects, options, 2, tmp_path / "kept")
    assert found.num_rows == 601
    assert set(found["status"].to_pylist()) == {"image", "excluded"}
    assert len(list((tmp_path / "kept").glob("*.parquet"))) > 3
    monkeypatch.setattr(shards.builder.scan, "_MIN_POOL_OBJECTS", 10_000)
    assert scan_objects(objects, options, 1, tmp_path / "other").equals(found)
    assert not (tmp_path / "other").exists()


def test_what_was_found_is_not_looked_for_again(tmp_path, objects, options, monkeypatch):
    seen: list[int] = []

    def stop_after(limit: int):
        def run(function, tasks):
            for number, result in enumerate(run_tasks(function, tasks, 1)):
                if number == limit:
                    raise KeyboardInterrupt
                seen.append(result.found.num_rows)
                yield result

        return run

    with pytest.raises(KeyboardInterrupt):
        scan_objects(objects, options, 1, tmp_path / "kept", stop_after(3))
    first = sum(seen)
    source = Path(os.fsdecode(objects["uri"][0].as_py())).parent
    (source / "0300b.png").write_bytes((source / "0000.png").read_bytes())
    grown = list_objects([source]).objects
    seen.clear()
    found = scan_objects(grown, options, 1, tmp_path / "kept", stop_after(10**6))
    assert found.num_rows == 602
    assert sum(seen) == 602 - first
    fresh = scan_objects(grown, options, 1, tmp_path / "fresh")
    assert found.equals(fresh)
    (tmp_path / "kept" / "00.parquet.frepa-tmp-1").write_bytes(b"of a killed process")
    shards.builder.scan_files.forget_groups(tmp_path / "kept")
    assert not list((tmp_path / "kept").iterdir())


def test_a_lost_file_is_not_a_lost_disk(tmp_path, objects, options):
    source = Path(options.roots[0])
    (source / "0001.png").unlink()
    (source / "0002.png").unlink()
    (source / "0002.png").mkdir()
    task = ScanTask(0, objects.slice(0, 4), options, 1)
    reasons = scan_group(task).found["reason"].to_pylist()
    assert reasons == ["", "changed", "unreadable_file", ""]
    source.rename(tmp_path / "unmounted")
    with pytest.raises(EnvironmentFault, match="source cannot be read"):
        scan_group(task)
    source.mkdir()
    with pytest.raises(EnvironmentFault, match="empty all at once"):
        scan_group(task)
