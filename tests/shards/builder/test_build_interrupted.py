"""Builds that are killed, starved or disturbed: the same bytes afterwards, and nothing half-written."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import shards.builder.prepare
import shards.builder.samples
import shards.builder.writer
from shards.dataset import load_snapshot
from shards.formats.common import Unreadable
from shards.stores.atomic import TEMP_MARK
from shards.stores.store import lock_folder
from shards.support.errors import EnvironmentFault
from tests.shards.building import active_rows, build, known_keys, make_source, table_of
from tests.shards.images import draw, encode, read_tree, write_images


@pytest.fixture
def source(tmp_path) -> Path:
    """Seventy images: three shards."""
    return make_source(tmp_path / "source")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of a dataset of these images, built without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    build(make_source(folder / "source"), folder / "root")
    return read_tree(folder / "root")


KILLED_BUILD = """
import os, signal, sys, time
from pathlib import Path
import shards.stores.atomic
from shards.builder.build import BuildConfig, build_dataset

def replace_then_die(self, target, replace=Path.replace):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

left = int(sys.argv[3])
Path.replace = replace_then_die
config = BuildConfig(modality="fundus", size=64, jobs=1, salt="0123456789abcdef")
build_dataset([Path(sys.argv[1])], Path(sys.argv[2]), config)
"""


@pytest.mark.parametrize("renames", [2, 3, 5, 9, 11, 13, 15])
def test_killed_between_writing_and_renaming(tmp_path, source, whole, renames):
    """A build renames salt, plan, mark, 3 x (tar, index), rate, 2 tables, keys, snapshot, pointer, mark."""
    root = tmp_path / "root"
    command = [sys.executable, "-c", KILLED_BUILD, str(source), str(root), str(renames)]
    killed = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (root / "dataset.json").exists()
    build(source, root)
    assert read_tree(root) == whole
    assert not any(TEMP_MARK in name for name in read_tree(tmp_path))


RUN_BUILD = """
import os, signal, sys, threading, time
from pathlib import Path
from shards.builder.build import BuildConfig, build_dataset

def die_at_first_shard():
    while not list(Path(sys.argv[2]).glob("fundus/*.index.parquet")):
        time.sleep(.001)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    Path(sys.argv[2], "children").write_text(children)
    os.kill(os.getpid(), signal.SIGKILL)

def die_after():
    time.sleep(float(sys.argv[3]))
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    threading.Thread(target=die_after if len(sys.argv) > 3 else die_at_first_shard, daemon=True).start()
    config = BuildConfig(modality="fundus", size=64, jobs=2, salt="0123456789abcdef")
    build_dataset([Path(sys.argv[1])], Path(sys.argv[2]), config)
"""


def run_build(folder: Path, *arguments: object) -> int:
    """Run the program above; return its exit status."""
    script = folder / "run_build.py"
    script.write_text(RUN_BUILD)
    environment = {**os.environ, "PYTHONPATH": str(Path(shards.builder.writer.__file__).parents[2])}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False).returncode


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """Two hundred images, seven shards, and the files of their dataset."""
    folder = tmp_path_factory.mktemp("many")
    names = [f"{number:03d}.png" for number in range(200)]
    source = write_images(folder / "source", names, height=160, width=160)
    build(source, folder / "whole")
    return source, read_tree(folder / "whole")


def test_kill_9_of_a_pool_in_the_middle(tmp_path, many):
    source, expected = many
    root = tmp_path / "root"
    assert run_build(tmp_path, source, root) == -signal.SIGKILL
    children = (root / "children").read_text().split()
    (root / "children").unlink()
    deadline = time.monotonic() + 30
    while left := [child for child in children if Path(f"/proc/{child}").exists()]:
        if time.monotonic() > deadline:
            for child in left:
                os.kill(int(child), signal.SIGKILL)
            pytest.fail("the workers outlive their parent")
        time.sleep(0.02)
    assert len(children) >= 2
    assert not (root / "dataset.json").exists()

    report = build(source, root)
    assert 0 < report.num_reused < report.num_shards
    assert read_tree(root) == expected


@pytest.mark.soak
@pytest.mark.timeout(60 * int(os.environ.get("FREPA_SOAK_REPEATS", "20")))
def test_kill_9_at_random_moments(tmp_path, many):
    source, expected = many
    moments = random.Random(0)
    num_killed = 0
    for repeat in range(int(os.environ.get("FREPA_SOAK_REPEATS", "20"))):
        root = tmp_path / f"root{repeat}"
        for _ in range(3):
            status = run_build(tmp_path, source, root, moments.uniform(0, 4))
            assert status in (0, -signal.SIGKILL)
            num_killed += status != 0
        build(source, root)
        assert read_tree(root) == expected
        assert not any(TEMP_MARK in name for name in read_tree(tmp_path))
    print(f"{num_killed} builds killed")
    assert num_killed


def test_what_was_begun_is_finished_before_what_is_new(tmp_path, source, whole):
    root = tmp_path / "root"
    command = [sys.executable, "-c", KILLED_BUILD, str(source), str(root), "8"]
    subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert len(list(root.rglob("*.index.parquet"))) == 2
    write_images(source, ["new.png"], 900)
    report = build(source, root)
    assert (report.num_reused, report.num_shards, report.counts.samples) == (2, 4, 71)
    snapshot = load_snapshot(root)
    assert len(snapshot.builds[0].plan_digests) == 2
    tars = [f"fundus/images-{number:06d}.tar" for number in range(4)]
    assert [shard.path for shard in snapshot.shards] == tars
    assert all((root / tar).read_bytes() == whole[tar] for tar in tars[:3])


def test_an_interrupted_retry_goes_on(tmp_path, source, monkeypatch):
    (source / "zz.png").write_bytes(b"garbage")
    root = tmp_path / "root"

    def refuse(decoded, window, blob, item, unit, spec, make=shards.builder.writer.make_sample):
        if item.name.endswith(b"patient_03.png"):
            raise Unreadable("damaged")
        return make(decoded, window, blob, item, unit, spec)

    with monkeypatch.context() as patch:
        patch.setattr(shards.builder.writer, "make_sample", refuse)
        assert build(source, root).quarantined == {"damaged": 1, "not_an_image": 1}

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shards.builder.build.publish_part", die)
        with pytest.raises(KeyboardInterrupt):
            build(source, root, retry_quarantined=True)
    report = build(source, root, retry_quarantined=True)
    assert (report.counts.samples, report.quarantined) == (70, {"not_an_image": 1})
    assert (report.num_shards, report.num_reused) == (4, 4)
    assert len(load_snapshot(root).builds[0].plan_digests) == 2


def test_read_only_destination(tmp_path, source):
    if os.geteuid() == 0:  # root may write anywhere but in a file system that takes no folders
        root = Path("/sys/frepa-test")
    else:
        root = tmp_path / "locked" / "root"
        root.parent.mkdir(mode=0o500)
    with pytest.raises(EnvironmentFault, match=r"cannot be written.*to mend it") as caught:
        build(source, root, state=tmp_path / "state")
    assert caught.value.exit_code == 5
    assert not root.exists()


LIMITED_BUILD = """
import resource, sys
from shards.support.errors import FrepaError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
from pathlib import Path
from shards.builder.build import BuildConfig, build_dataset
try:
    config = BuildConfig(modality="fundus", size=64, jobs=int(sys.argv[4]), salt="0123456789abcdef")
    if __name__ == "__main__":
        build_dataset([Path(sys.argv[1])], Path(sys.argv[2]), config)
except FrepaError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_disk_that_takes_no_more(tmp_path, source, whole, jobs):
    """A limit on the size of files fails like a full disk: in the middle of a write."""
    (tmp_path / "limited.py").write_text(LIMITED_BUILD)
    root = tmp_path / "root"
    environment = {**os.environ, "PYTHONPATH": str(Path(shards.builder.writer.__file__).parents[2])}
    arguments = [source, root, 200_000, jobs]
    command = [sys.executable, str(tmp_path / "limited.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert result.returncode == 5, result.stderr
    assert "cannot be written: File too large" in result.stdout
    assert "Traceback" not in result.stderr
    assert not (root / "dataset.json").exists()
    assert not list(root.rglob("*.parquet"))
    assert not any(TEMP_MARK in name for name in read_tree(root))
    build(source, root)
    assert read_tree(root) == whole


def test_two_builders_at_one_destination(tmp_path, source):
    with lock_folder(tmp_path / "root"), pytest.raises(EnvironmentFault, match="another process"):
        build(source, tmp_path / "root")
    with lock_folder(tmp_path / "root.state"), pytest.raises(EnvironmentFault, match="another process"):
        build(source, tmp_path / "root")
    assert build(source, tmp_path / "root").counts.samples == 70


def test_an_object_that_changes_during_the_build(tmp_path, source, monkeypatch):
    """It is quarantined and named; the next build takes what it has become."""
    changed, gone = source / "patient_30.png", source / "patient_31.png"
    text = gone.read_bytes()
    (source / "same.png").write_bytes(text)  # a byte duplicate of what will be gone

    def change(part: object, *args: object, save=shards.builder.prepare.save_part) -> None:
        save(part, *args)
        changed.write_bytes(encode(draw(999)))
        gone.unlink()

    monkeypatch.setattr("shards.builder.prepare.save_part", change)
    root = tmp_path / "root"
    report = build(source, root)
    assert (report.counts.samples, report.counts.duplicates) == (68, 1)
    assert report.quarantined == {"changed": 2}
    known = known_keys(root)
    named = {known[row["key"]]["uri"]: row["reason"] for row in table_of(root, "quarantine")}
    assert named == {os.fsencode(changed): "changed", os.fsencode(gone): "changed"}

    monkeypatch.undo()
    report = build(source, root)
    assert (report.change.num_changed, report.change.num_vanished) == (1, 1)
    assert report.quarantined == {"changed": 1}  # the one that is gone
    assert report.counts.is_closed
    assert (report.counts.objects, report.counts.samples, report.counts.duplicates) == (72, 70, 1)
    keys = {known_keys(root)[row["key"]]["uri"] for row in active_rows(root)}
    assert os.fsencode(source / "same.png") in keys
    assert os.fsencode(changed) in keys


def test_a_change_that_keeps_size_and_time_is_noticed(tmp_path, source, monkeypatch):
    victim = write_images(source, ["x.bmp"], 800) / "x.bmp"
    before = victim.stat()

    def change(part: object, *args: object, save=shards.builder.prepare.save_part) -> None:
        save(part, *args)
        write_images(source, ["x.bmp"], 801)
        os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert victim.stat().st_size == before.st_size

    root = tmp_path / "root"
    with monkeypatch.context() as patch:
        patch.setattr("shards.builder.prepare.save_part", change)
        assert build(source, root).quarantined == {"changed": 1}
    report = build(source, root)
    assert (report.change.num_changed, report.quarantined) == (1, {})
    assert report.counts.samples == 71


def test_a_bug_is_no_bad_data(tmp_path, source, monkeypatch):
    def fail(*args: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(shards.builder.samples, "encode_hf_members", fail)
    with pytest.raises(TypeError, match="a bug"):
        build(source, tmp_path / "root")
    assert not (tmp_path / "root" / "dataset.json").exists()
    assert not any(TEMP_MARK in name for name in read_tree(tmp_path))
