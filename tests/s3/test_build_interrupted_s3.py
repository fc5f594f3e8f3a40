"""Builds into S3 that are killed, starved or disturbed: the same bytes afterwards, nothing half-written."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import shards.builder.writer
from shards.stores.store import BUILD_LOCK, open_store
from shards.support.errors import DataError, EnvironmentFault
from tests.s3.building import assert_whole, download, files_of
from tests.s3.proxy import ALWAYS
from tests.shards.building import SALT, build
from tests.shards.images import encode, write_images
from tests.small_disk import run_on_small_disk

REPEATS = int(os.environ.get("FREPA_SOAK_REPEATS", "20"))
NUM_IMAGES = 70
WHERE = Path(shards.builder.writer.__file__).parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Seventy images: three shards."""
    return write_images(
        tmp_path_factory.mktemp("images"), [f"{number:02d}.png" for number in range(NUM_IMAGES)]
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory, images) -> dict[str, bytes]:
    """The files of a dataset of these images, built into a folder without interruption."""
    root = tmp_path_factory.mktemp("whole") / "root"
    build(images, root)
    return files_of(root)


KILLED_BUILD = """
import os, signal, sys
from shards.builder.build import BuildConfig, build_dataset
from shards.stores.s3_store import S3Store

def put_or_die(self, path, data, put=S3Store._put, **condition):
    global left
    left -= 1
    if left == 0 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, path, data, **condition)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

left, when = int(sys.argv[4]), sys.argv[5]
S3Store._put = put_or_die
config = BuildConfig(modality="fundus", size=64, jobs=1, salt="0123456789abcdef", state=sys.argv[3])
build_dataset([sys.argv[1]], sys.argv[2], config)
"""


@pytest.mark.parametrize(
    ("puts", "when"),
    [(3, "after"), (6, "before"), (11, "before"), (12, "before"), (12, "after")],
)
def test_kill_9_between_two_uploads(s3, tmp_path, images, expected, puts, when):
    """A build puts its lock (and tries it), 3 x (tar, index), 2 tables, snapshot, pointer: 12 in all."""
    place, state = f"{s3.uri}/data", tmp_path / "state"
    command = [sys.executable, "-c", KILLED_BUILD, images, place, state, puts, when]
    killed = subprocess.run(list(map(str, command)), capture_output=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    is_published = (puts, when) == (12, "after")
    assert bool(s3.keys("data/dataset.json")) == is_published
    if is_published:  # a reader may begin at once
        assert_whole(place)
    report = build(images, place, state=state)
    num_puts = puts - (when == "before")
    assert report.num_reused == min(3, max(0, (num_puts - 2) // 2))
    assert report.counts.is_closed
    assert download(s3, "data") == expected


RUN_BUILD = """
import os, signal, sys, threading, time
from shards.builder.build import BuildConfig, build_dataset

def die_after(seconds):
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    if len(sys.argv) > 4:
        threading.Thread(target=die_after, args=(float(sys.argv[4]),), daemon=True).start()
    config = BuildConfig(modality="fundus", size=int(sys.argv[3]), jobs=2, salt="0123456789abcdef",
                         state=os.environ["STATE"])
    print(os.getpid(), flush=True)
    build_dataset([sys.argv[1]], sys.argv[2], config)
"""


def start_build(folder: Path, state: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start the program above: source, destination, size, and perhaps the second at which it is killed."""
    script = folder / "run_build.py"
    script.write_text(RUN_BUILD)
    environment = {**os.environ, "PYTHONPATH": str(WHERE), "STATE": str(state)}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def write_noise(folder: Path) -> Path:
    """Images whose shard is uploaded in two parts of at most 16 MiB."""
    folder.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (1024, 1024, 3), np.uint8)
        (folder / f"{number}.png").write_bytes(encode(pixels, compress_level=1))
    return folder


def test_kill_9_within_an_upload(s3, faults, tmp_path):
    """The parts that had arrived are no object, and the next build gives their room back."""
    noise, state, started = write_noise(tmp_path / "noise"), tmp_path / "state", []

    def kill() -> None:
        os.kill(int(started[0].stdout.readline()), signal.SIGKILL)

    faults.add("call", key=r"\.tar$", method="PUT", attempts=(2,), call=kill)
    started.append(start_build(tmp_path, state, noise, f"{s3.uri}/data", 1024))
    with started[0] as process:
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert s3.uploads()
    assert not [key for key in s3.keys("data/") if not key.endswith(BUILD_LOCK)]
    faults.clear()
    build(noise, f"{s3.uri}/data", size=1024, state=state)
    assert not s3.uploads()
    build(noise, tmp_path / "whole", size=1024, state=state)
    assert download(s3, "data") == files_of(tmp_path / "whole")


@pytest.mark.soak
@pytest.mark.timeout(60 * REPEATS)
def test_kill_9_at_random_moments(s3, tmp_path, images, expected):
    moments = random.Random(1)
    num_killed = num_begun = num_finished = 0
    for repeat in range(REPEATS):
        place, state = f"{s3.uri}/data{repeat}", tmp_path / f"state{repeat}"
        with start_build(tmp_path, state, images, place, 64, moments.uniform(1, 5)) as process:
            status = process.wait(timeout=60)
        assert status in (0, -signal.SIGKILL)
        num_killed += status != 0
        left = s3.keys(f"data{repeat}/")
        num_begun += bool(left)
        num_finished += f"data{repeat}/dataset.json" in left
        build(images, place, state=state)
        assert download(s3, f"data{repeat}") == expected
        assert not s3.uploads()
    print(f"{num_killed} of {REPEATS} killed, {num_begun} had begun to write, {num_finished} had finished")
    assert num_killed


FULL_DISK = """
import os, sys, tempfile
from pathlib import Path
from shards.builder.build import BuildConfig, build_dataset
from shards.support.errors import FrepaError
disk, source, place, state = sys.argv[1:]
tempfile.tempdir = disk
config = BuildConfig(modality="fundus", size=64, jobs=1, salt="0123456789abcdef", state=state)
(Path(disk) / "others").write_bytes(bytes((1 << 20) - (150 << 10)))
try:
    build_dataset([source], place, config)
except FrepaError as error:
    print(error)
    left = [p.name for p in Path(disk).rglob("*") if ".frepa-tmp-" in p.name or p.name.startswith("tmp")]
    assert not left, left
    sys.exit(error.exit_code)
"""


def test_the_disk_of_the_temporary_file_is_full(s3, tmp_path, images, expected):
    place, state = f"{s3.uri}/data", tmp_path / "state"
    result = run_on_small_disk(FULL_DISK, "1m", images, place, state)
    assert result.returncode == 5, result.stderr
    assert "no temporary file can be written: No space left on device" in result.stdout
    assert "TMPDIR" in result.stdout
    assert "Traceback" not in result.stderr
    assert s3.keys("data/") == []
    assert build(images, place, state=state).counts.samples == NUM_IMAGES
    assert download(s3, "data") == expected


def test_two_builders_at_one_destination(s3, tmp_path, images, expected, faults):
    """One comes while the other uploads: it is told so, and disturbs nothing."""
    place, refused = f"{s3.uri}/data", []

    def second_build() -> None:
        for state in ("state", "other"):
            salt = SALT if state == "state" else "of another state"
            with pytest.raises(EnvironmentFault, match=r"another (process|builder)") as caught:
                build(images, place, state=tmp_path / state, salt=salt)
            refused.append(str(caught.value))

    faults.add("call", key=r"-000001\.tar$", method="PUT", call=second_build)
    build(images, place, state=tmp_path / "state")
    assert str(tmp_path / "state") in refused[0]
    assert f"{place}/{BUILD_LOCK}" in refused[1]
    assert download(s3, "data") == expected
    with pytest.raises(DataError, match="another state folder"):
        build(images, place, state=tmp_path / "other", salt="of another state")
    assert download(s3, "data") == expected
    with open_store(place).lock("somebody else"), pytest.raises(EnvironmentFault, match=place):
        build(images, place, state=tmp_path / "state")


def test_a_builder_whose_lock_was_taken_away(s3, tmp_path, images, faults):
    """Somebody deletes the lock of a live builder and builds: the first one must not undo that."""
    place = f"{s3.uri}/data"

    def steal() -> None:
        s3.delete(f"data/{BUILD_LOCK}")
        build(images, place, source="other", state=tmp_path / "other", salt="of another state")

    faults.add("call", key=r"dataset\.json$", method="PUT", call=steal)
    with pytest.raises(EnvironmentFault, match=f"{place}/dataset.json: another program has written here"):
        build(images, place, state=tmp_path / "state")
    assert_whole_but_for_strangers(place)
    report = build(images, place, state=tmp_path / "state")
    assert report.counts.is_closed
    assert (report.counts.objects, report.num_reused) == (NUM_IMAGES, 3)
    assert_whole(place)


def assert_whole_but_for_strangers(place: str) -> None:
    """As `assert_whole`; but files that no snapshot names may lie there, of a builder that was refused."""
    from shards.audit.verify import verify_dataset

    report = verify_dataset(place, deep=True, jobs=1)
    assert report.ok, "\n".join(report.lines())
    assert set(report.remark_counts) <= {"unnamed_file"}


def test_a_place_that_is_denied_halfway(s3, tmp_path, images, expected, faults):
    """The rights end between two shards: what was committed is not done again."""
    place, state = f"{s3.uri}/data", tmp_path / "state"
    faults.add("denied", key=r"-000002", method="PUT", attempts=ALWAYS)
    with pytest.raises(EnvironmentFault, match=r"-000002\.tar: access is denied"):
        build(images, place, state=state)
    assert not s3.keys("data/dataset.json")
    faults.clear()
    assert build(images, place, state=state).num_reused == 2
    assert download(s3, "data") == expected
