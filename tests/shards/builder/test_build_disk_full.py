"""A build onto a disk that becomes full: at any of its files, and the same bytes once there is room."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shards.audit.verify import verify_dataset
from shards.stores.store import BUILD_LOCK
from tests.shards.building import build
from tests.shards.images import read_tree, write_images
from tests.small_disk import run_on_small_disk

FULL_DISK = """
import os, sys
import re
from pathlib import Path
from shards.builder.build import BuildConfig, build_dataset
from shards.support.errors import FrepaError
disk, copy, room = Path(sys.argv[1]), Path(sys.argv[3]), int(sys.argv[4])
source, what = sys.argv[2], sys.argv[5]
root, state = (disk / "root", copy / "state") if what == "root" else (copy / "root", disk / "state")
config = BuildConfig(modality="fundus", size=64, jobs=1, salt="0123456789abcdef", state=state)
others = disk / "others"
free = os.statvfs(disk).f_bavail * 4096
others.write_bytes(bytes(free - (room << 10)))
try:
    build_dataset([source], root, config)
    raise SystemExit("no error")
except FrepaError as error:
    print(error)
    assert error.exit_code == 5
    assert not (root / "dataset.json").exists()
    for folder in (root, state):
        left = [path.name for path in folder.rglob("*") if ".frepa-tmp-" in path.name]
        assert not left, left
others.unlink()
report = build_dataset([source], root, config)  # the same disk, and now there is room
print("reused", report.num_reused)
import shutil
if what == "root":
    shutil.copytree(root, copy / "root")
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Seventy images: three shards of some 400 KB."""
    folder = tmp_path_factory.mktemp("images")
    return write_images(folder, [f"{number:02d}.png" for number in range(70)])


@pytest.fixture(scope="module")
def expected(tmp_path_factory, images) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("whole") / "root"
    build(images, root)
    return read_tree(root)


@pytest.mark.parametrize(
    ("what", "room_kb", "says"),
    [
        ("root", 150, r"root/fundus/images-000000\.tar: cannot be written: No space left"),
        ("root", 1000, r"root/fundus/images-00000[12].*: cannot be written: No space left"),
        ("state", 12, r"state.*: cannot be written: No space left"),
    ],
)
def test_no_space_left(tmp_path, images, expected, what, room_kb, says):
    result = run_on_small_disk(FULL_DISK, "8m", images, tmp_path, room_kb, what)
    assert result.returncode == 0, result.stdout + result.stderr
    first, last = result.stdout.strip().splitlines()[0], result.stdout.strip().splitlines()[-1]
    assert re.search(says, first), first
    assert int(last.split()[-1]) == {150: 0, 1000: 2, 12: 0}[room_kb] or room_kb == 1000
    assert read_tree(tmp_path / "root").keys() | {BUILD_LOCK} == expected.keys() | {BUILD_LOCK}
    for path, data in expected.items():
        assert (tmp_path / "root" / path).read_bytes() == data, path
    assert verify_dataset(tmp_path / "root", deep=True, jobs=1).ok
