"""Building: the same bytes however it went, every object accounted for, nothing private in the dataset."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
import zstandard
from PIL import Image

import shards.writer
from shards.atomic import TEMP_MARK
from shards.build import BuildConfig, build_dataset
from shards.formats import decode_image
from shards.hf_tokens import hf_map, hf_response, hf_token_indices
from shards.modalities import MODALITIES
from shards.publish import BuildReport
from shards.schema import load_snapshot, read_exclusions, read_index
from shards.state import lock
from shards.support.errors import ConfigError, DataError, EnvironmentFault
from tests.shards.images import draw, encode, read_tree, write_images

SALT = "0123456789abcdef"
FUNDUS = MODALITIES["fundus"].hf


def build(source: Path, root: Path, /, **options: object) -> BuildReport:
    options = {"modality": "fundus", "size": 64, "jobs": 1, "salt": SALT, **options}
    return build_dataset([source], root, BuildConfig(**options))


def index_rows(root: Path) -> list[dict]:
    snapshot = load_snapshot(root)
    return [row for shard in snapshot.shards for row in read_index(root, shard).to_pylist()]


def table_rows(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


NAMES = [f"patient_{number:02d}.{suffix}" for number in range(35) for suffix in ("png", "jpg")]


@pytest.fixture
def source(tmp_path) -> Path:
    """Seventy images: three shards."""
    return write_images(tmp_path / "source", NAMES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of a dataset of these images, built without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    build(write_images(folder / "source", NAMES), folder / "root")
    return read_tree(folder / "root")


# --- what is written


def test_plain_webdataset_reads_a_shard(tmp_path, source):
    build(source, tmp_path / "root")
    rows = {row["key"]: row for row in index_rows(tmp_path / "root")}
    tars = sorted(map(str, (tmp_path / "root" / "fundus").glob("*.tar")))
    assert len(tars) == 3
    seen = 0
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        row = rows[sample["__key__"]]
        pixels = decode_image(sample[row["image_ext"]])
        assert pixels.shape == (row["height"], row["width"], row["channels"])
        np.testing.assert_array_equal(
            np.load(io.BytesIO(sample["hf.npy"])), hf_token_indices(pixels, 16, 1.0, FUNDUS)
        )
        stored_map = np.load(io.BytesIO(zstandard.decompress(sample["hfmap.npy.zst"])))
        np.testing.assert_array_equal(stored_map, hf_map(hf_response(pixels, FUNDUS), 4))
        about = json.loads(sample["json"])
        assert about["height"] == row["height"]
        assert about["labels"] == {}
        seen += 1
    assert seen == len(rows) == 70


def test_index_points_at_the_members(tmp_path, source):
    root = tmp_path / "root"
    build(source, root)
    shard = load_snapshot(root).shards[0]
    data = (root / shard.path).read_bytes()
    assert len(data) == shard.num_bytes
    for row in read_index(root, shard).to_pylist():
        image = data[row["image_offset"] :][: row["image_size"]]
        assert decode_image(image).shape[:2] == (row["height"], row["width"])
        assert json.loads(data[row["json_offset"] :][: row["json_size"]])["object"] == row["object"]


def test_canonical_images(tmp_path):
    source = tmp_path / "source"
    write_images(source, ["a_large.png", "b_large.jpg"], height=100, width=150)
    write_images(source, ["c_small.png", "d_small.jpg"], 5, height=70, width=80)
    build(source, tmp_path / "root", size=80)
    rows = sorted(index_rows(tmp_path / "root"), key=lambda row: row["object"])
    assert [(row["height"], row["width"]) for row in rows] == [(80, 120), (80, 120), (70, 80), (70, 80)]
    assert [(row["source_height"], row["source_width"]) for row in rows] == [(100, 150)] * 2 + [(70, 80)] * 2
    assert [row["image_ext"] for row in rows] == ["png", "png", "png", "jpg"]


def test_jpeg_of_canonical_size_keeps_its_pixels_and_loses_its_metadata(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe"
    (tmp_path / "source").mkdir()
    data = encode(draw(0, 64, 70), "JPEG", exif=exif, comment=b"Jane Doe")
    (tmp_path / "source" / "x.jpg").write_bytes(data)
    build(tmp_path / "source", tmp_path / "root")
    shard = next((tmp_path / "root").rglob("*.tar")).read_bytes()
    (row,) = index_rows(tmp_path / "root")
    stored = shard[row["image_offset"] :][: row["image_size"]]
    assert row["image_ext"] == "jpg"
    assert b"Jane" in data
    assert b"Jane" not in shard
    np.testing.assert_array_equal(decode_image(stored), decode_image(data))


def test_pages_are_units_of_one_volume(tmp_path):
    pages = [Image.fromarray(draw(seed)) for seed in range(3)]
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    write_images(tmp_path / "source", ["a.png"], 9)
    (tmp_path / "source" / "b.tif").write_bytes(buffer.getvalue())
    report = build(tmp_path / "source", tmp_path / "root")
    assert (report.counts.objects, report.counts.units, report.counts.samples) == (2, 4, 4)
    single, *volume = sorted(index_rows(tmp_path / "root"), key=lambda row: (row["object"], row["unit"]))
    assert (single["volume"], single["slice"]) == (None, None)
    assert [row["slice"] for row in volume] == [0, 1, 2]
    assert len({row["volume"] for row in volume}) == 1
    assert len({row["key"] for row in volume}) == 3


# --- the same bytes


def test_built_twice_gives_the_same_bytes(tmp_path, source, whole):
    build(source, tmp_path / "root")
    assert read_tree(tmp_path / "root") == whole


def test_neither_jobs_nor_place_nor_times_change_the_bytes(tmp_path, source, whole):
    for path in source.iterdir():
        os.utime(path, (1, 1))
    build(source.rename(tmp_path / "moved"), tmp_path / "root", jobs=2)
    assert read_tree(tmp_path / "root") == whole


def test_the_state_folder_carries_the_salt(tmp_path, source):
    for name in ("one", "two"):
        build(source, tmp_path / name, salt=None, state=tmp_path / "state")
    build(source, tmp_path / "three", salt=None)
    assert read_tree(tmp_path / "one") == read_tree(tmp_path / "two")
    keys = [{row["key"] for row in index_rows(tmp_path / name)} for name in ("one", "three")]
    assert not keys[0] & keys[1]
    with pytest.raises(ConfigError, match="another salt"):
        build(source, tmp_path / "one", state=tmp_path / "state")


def test_a_second_build_does_nothing_again(tmp_path, source, monkeypatch):
    first = build(source, tmp_path / "root")
    before = read_tree(tmp_path / "root")
    monkeypatch.setattr(shards.writer, "decode_page", lambda *args, **options: pytest.fail("decoded again"))
    second = build(source, tmp_path / "root")
    assert read_tree(tmp_path / "root") == before
    assert (first.num_reused, second.num_reused) == (0, 3)
    assert (first.snapshot, first.counts) == (second.snapshot, second.counts)


KILLED_BUILD = """
import os, signal, sys, time
from pathlib import Path
import shards.atomic
from shards.build import BuildConfig, build_dataset

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


@pytest.mark.parametrize("renames", [2, 3, 4, 9, 12, 13])
def test_killed_between_writing_and_renaming(tmp_path, source, whole, renames):
    """A build renames salt, plan, 3 x (tar, index), quarantine, duplicates, keys, snapshot, pointer."""
    root = tmp_path / "root"
    command = [sys.executable, "-c", KILLED_BUILD, str(source), str(root), str(renames)]
    killed = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (root / "dataset.json").exists()
    build(source, root)
    assert read_tree(root) == whole
    assert not any(TEMP_MARK in name for name in read_tree(tmp_path))


RUN_BUILD = """
import sys
from pathlib import Path
from shards.build import BuildConfig, build_dataset
if __name__ == "__main__":
    config = BuildConfig(modality="fundus", size=64, jobs=2, salt="0123456789abcdef")
    build_dataset([Path(sys.argv[1])], Path(sys.argv[2]), config)
"""


def test_kill_9_of_a_pool_in_the_middle(tmp_path):
    names = [f"{number:03d}.png" for number in range(200)]
    source = write_images(tmp_path / "source", names, height=160, width=160)
    build(source, tmp_path / "whole")
    script = tmp_path / "run_build.py"
    script.write_text(RUN_BUILD)
    root = tmp_path / "root"
    environment = {**os.environ, "PYTHONPATH": str(Path(shards.writer.__file__).parents[1])}
    command = [sys.executable, str(script), str(source), str(root)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 40
    while not list(root.glob("fundus/*.index.parquet")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
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
    assert read_tree(root) == read_tree(tmp_path / "whole")


def test_a_damaged_shard_is_written_again(tmp_path, source):
    root = tmp_path / "root"
    build(source, root)
    before = read_tree(root)
    tar, index = root / "fundus" / "images-000001.tar", root / "fundus" / "images-000002.index.parquet"
    tar.write_bytes(tar.read_bytes()[:-700])
    index.unlink()
    assert build(source, root).num_reused == 1
    assert read_tree(root) == before


# --- growing


def test_a_second_modality_extends_the_dataset(tmp_path, source):
    root = tmp_path / "root"
    first = build(source, root)
    before = read_tree(root)
    pinned = load_snapshot(root)
    other = write_images(tmp_path / "other", ["a.png", "b.png"], 500)
    (other / "c.png").write_bytes((source / "patient_00.png").read_bytes())
    second = build(other, root, modality="dermoscopy", source="clinic")

    snapshot = load_snapshot(root)
    assert snapshot.hash == second.snapshot != first.snapshot
    assert snapshot.modalities == ["dermoscopy", "fundus"]
    assert [item.path for item in snapshot.shards if item.modality == "fundus"] == [
        item.path for item in pinned.shards
    ]
    assert snapshot.hf_digests == {name: MODALITIES[name].hf.digest() for name in ("dermoscopy", "fundus")}
    assert snapshot.counts == first.counts + second.counts
    assert second.counts.duplicates == 1
    (duplicate,) = table_rows(root / "duplicates.parquet")
    assert (duplicate["modality"], duplicate["kind"]) == ("dermoscopy", "pixels")
    assert duplicate["duplicate_of"] in {row["key"] for row in index_rows(root)}

    assert load_snapshot(root, first.snapshot) == pinned
    unchanged = [name for name in before if name not in ("dataset.json", "duplicates.parquet")]
    after = read_tree(root)
    assert all(after[name] == before[name] for name in unchanged)
    build(source, root)  # once more the first: nothing moves
    assert read_tree(root) == after


def test_what_does_not_fit_the_dataset_is_refused(tmp_path, source):
    root = tmp_path / "root"
    build(source, root)
    before = read_tree(root)
    for options, words in (
        ({"size": 96}, "size is 96, the dataset's is 64"),
        ({"source": "more", "patch_size": 8}, "patch_size is 8"),
        ({"source": "more", "hf": {"cutoff_cycles": 9.0}}, "hf is"),
        ({"min_std": 2.0}, "built with another min_std"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(source, root, **options)
    with pytest.raises(DataError, match="another state folder"):
        build(source, root, state=tmp_path / "other_state", salt="f" * 16)
    write_images(source, ["new.png"], 900)
    with pytest.raises(DataError, match="of other files"):
        build(source, root)
    assert read_tree(root) == before


def test_an_unfinished_build_of_other_files_is_planned_anew(tmp_path, source):
    root = tmp_path / "root"
    command = [sys.executable, "-c", KILLED_BUILD, str(source), str(root), "9"]
    subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert len(list(root.rglob("*.index.parquet"))) == 3
    for path in sorted(source.iterdir())[5:]:
        path.unlink()
    build(source, root)
    build(source, tmp_path / "fresh")
    assert read_tree(root) == read_tree(tmp_path / "fresh")


# --- accounting


def bad_inputs(folder: Path) -> dict[str, str]:
    """Write one of each bad input; return the reason code that each must get."""
    good = encode(draw(700))
    jpeg = encode(draw(701), "JPEG")
    flat = np.full((90, 90), 90, np.uint8)
    contents = {
        "garbage.png": (b"no image at all", "not_an_image"),
        "header_only.png": (good[:16] + bytes(range(200)), "damaged"),
        "cut.png": (good[: len(good) // 2], "truncated"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "zero.png": (b"", "zero_bytes"),
        "bomb.png": (encode(np.zeros((300, 300), np.uint8)), "too_many_pixels"),
        "flat.png": (encode(flat), "flat"),
        "pixel.png": (encode(flat[:1, :1]), "too_small"),
        "scan.dcm": (bytes(128) + b"DICM", "unsupported_format"),
        "notes.txt": (b"hello", "not_an_image"),
        ".DS_Store": (b"\0\0\0\1Bud1", "not_an_image"),
        "empty.txt": (b"", "zero_bytes"),
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    (folder / "broken.png").symlink_to(folder / "nowhere")
    return {name: reason for name, (_, reason) in contents.items()} | {"broken.png": "unreadable_file"}


EXCLUDED = {"scan.dcm", "notes.txt", ".DS_Store", "empty.txt"}


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_object_is_accounted_for(tmp_path, jobs):
    source = write_images(tmp_path / "source", [f"good_{number:02d}.png" for number in range(40)])
    expected = bad_inputs(source)
    (source / "same_bytes.png").write_bytes((source / "good_00.png").read_bytes())
    (source / "same_pixels.png").write_bytes(encode(draw(1), compress_level=1))
    root = tmp_path / "root"
    report = build(source, root, max_pixels=80_000, jobs=jobs)

    quarantine, duplicates = table_rows(root / "quarantine.parquet"), table_rows(root / "duplicates.parquet")
    order = sorted(path.name for path in source.iterdir())
    found = {order[row["object"]]: row["reason"] for row in quarantine}
    assert found == expected
    assert {order[row["object"]] for row in quarantine if row["status"] == "excluded"} == EXCLUDED
    assert {(order[row["object"]], row["kind"]) for row in duplicates} == {
        ("same_bytes.png", "bytes"),
        ("same_pixels.png", "pixels"),
    }
    counts = report.counts
    assert counts.is_closed
    assert counts.objects == counts.units == 40 + len(expected) + 2
    assert (counts.samples, counts.quarantined) == (40, len(expected) - len(EXCLUDED))
    assert (counts.excluded, counts.duplicates) == (len(EXCLUDED), 2)
    assert sum(report.quarantined.values()) == counts.quarantined
    assert sum(report.excluded.values()) == counts.excluded

    rows = index_rows(root)
    everywhere = [row["object"] for row in rows] + [row["object"] for row in quarantine]
    everywhere += [row["object"] for row in duplicates if row["kind"] == "bytes"]
    assert sorted(everywhere) == list(range(counts.objects))
    (same_pixels,) = read_exclusions(root)
    keys = {row["key"]: order[row["object"]] for row in rows}
    assert keys[same_pixels] == "same_pixels.png"
    assert {keys[row["duplicate_of"]] for row in duplicates} == {"good_00.png", "good_01.png"}


def test_a_shard_of_bad_units_only(tmp_path):
    source = write_images(tmp_path / "source", [f"z{number}.png" for number in range(32)])
    for number in range(32):  # the first shard
        pixels = np.full((90, 90), number, np.uint8)
        (source / f"a{number:02d}.png").write_bytes(encode(pixels))
    report = build(source, tmp_path / "root")
    assert report.quarantined == {"flat": 32}
    assert report.num_shards == 2
    assert [item.path for item in load_snapshot(tmp_path / "root").shards] == ["fundus/images-000001.tar"]
    assert build(source, tmp_path / "root").num_reused == 2


def test_a_bug_is_no_bad_data(tmp_path, source, monkeypatch):
    def fail(*args: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(shards.writer, "hf_response", fail)
    with pytest.raises(TypeError, match="a bug"):
        build(source, tmp_path / "root")
    assert not (tmp_path / "root" / "dataset.json").exists()
    assert not any(TEMP_MARK in name for name in read_tree(tmp_path))


# --- privacy


def private_source(tmp_path) -> Path:
    source = write_images(tmp_path / "source", [f"JaneDoe/Eye{number}.png" for number in range(3)])
    (source / "JaneDoe" / "EyeGarbage.png").write_bytes(b"garbage")
    (source / "JaneDoe" / "EyeSame.png").write_bytes((source / "JaneDoe" / "Eye0.png").read_bytes())
    return source


def test_no_name_is_in_the_dataset(tmp_path):
    source = private_source(tmp_path)
    table = tmp_path / "Doe.csv"
    rows = "".join(f"source/JaneDoe/Eye{number}.png,sick,Doe-1970\n" for number in range(3))
    table.write_text("filename,label,patient\n" + rows)
    build(source, tmp_path / "root", labels=str(table), shard_bytes=1)
    files = read_tree(tmp_path / "root")
    for name, data in files.items():
        for secret in (b"Doe", b"Eye", str(tmp_path).encode(), SALT.encode()):
            assert secret not in data, name
            assert secret not in name.encode()
    patients = {row["patient"] for row in index_rows(tmp_path / "root")}
    assert len(patients) == 1
    assert all(row["labels"] == '{"label":"sick"}' for row in index_rows(tmp_path / "root"))
    assert any(b"sick" in data for data in files.values())  # what is asked for is found by such a search


def test_parquet_holds_no_name_under_its_compression(tmp_path):
    source = private_source(tmp_path)
    build(source, tmp_path / "root")
    for path in (tmp_path / "root").rglob("*.parquet"):
        table = pq.read_table(path)
        text = repr(table.to_pylist()) + repr(table.schema.metadata)
        assert "Doe" not in text
        assert "Eye" not in text


def test_keep_names(tmp_path):
    build(private_source(tmp_path), tmp_path / "root", keep_names=True)
    shard = next((tmp_path / "root").rglob("*.tar")).read_bytes()
    (row, *_) = index_rows(tmp_path / "root")
    assert json.loads(shard[row["json_offset"] :][: row["json_size"]])["name"] == "0/JaneDoe/Eye0.png"


def test_the_state_folder_is_private_and_knows_the_names(tmp_path):
    source = private_source(tmp_path)
    build(source, tmp_path / "root")
    state = tmp_path / "root.state"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in state.iterdir())
    known = {row["key"]: row for row in table_rows(state / "fundus-images.keys.parquet")}
    for row in index_rows(tmp_path / "root"):
        assert known[row["key"]]["path"] == os.fsencode(source / "JaneDoe" / f"Eye{row['object']}.png")
        assert known[row["key"]]["reason"] == ""
    (bad,) = table_rows(tmp_path / "root" / "quarantine.parquet")
    assert known[bad["key"]]["path"].endswith(b"EyeGarbage.png")
    assert known[bad["key"]]["reason"] == "not_an_image"


# --- labels


def test_folder_labels_and_splits(tmp_path):
    names = ["train/sick/a.png", "train/well/b.png", "test/sick/c.png"]
    source = write_images(tmp_path / "source", names)
    build(source, tmp_path / "root", labels="folder")
    labels = [json.loads(row["labels"]) for row in index_rows(tmp_path / "root")]
    assert sorted(label["split"] + label["label"] for label in labels) == [
        "testsick",
        "trainsick",
        "trainwell",
    ]
    report = build(source, tmp_path / "trained", labels="folder", splits=("train",))
    assert (report.counts.samples, report.excluded) == (2, {"other_split": 1})


def test_changed_labels_are_not_taken_for_the_same_source(tmp_path, source):
    table = tmp_path / "labels.csv"
    table.write_text("filename,label\nsource/patient_00.png,1\n")
    build(source, tmp_path / "root", labels=str(table))
    table.write_text("filename,label\nsource/patient_00.png,2\n")
    with pytest.raises(DataError):
        build(source, tmp_path / "root", labels=str(table))


# --- the world around


def test_an_empty_folder_leaves_nothing_behind(tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(DataError, match="to mend it"):
        build(tmp_path / "source", tmp_path / "root")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_of_text_files(tmp_path):
    (tmp_path / "source").mkdir()
    for number in range(3):
        (tmp_path / "source" / f"{number}.txt").write_text(f"words {number}")
    with pytest.raises(DataError, match=r"not_an_image 3.*to mend it"):
        build(tmp_path / "source", tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_images_of_which_none_can_be_used(tmp_path):
    write_images(tmp_path / "source", ["a.png", "b.png"], height=30, width=30)
    with pytest.raises(DataError, match=r"too_small 2.*min_side"):
        build(tmp_path / "source", tmp_path / "root")
    assert not list((tmp_path / "root").rglob("*.parquet"))
    assert build(tmp_path / "source", tmp_path / "root", min_side=16).counts.samples == 2


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
exec(open(sys.argv[4]).read().split("if __name__")[0])
try:
    config = BuildConfig(modality="fundus", size=64, jobs=int(sys.argv[5]), salt="0123456789abcdef")
    if __name__ == "__main__":
        build_dataset([Path(sys.argv[1])], Path(sys.argv[2]), config)
except FrepaError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_disk_that_takes_no_more(tmp_path, source, whole, jobs):
    """A limit on the size of files fails like a full disk: in the middle of a write."""
    (tmp_path / "build.py").write_text(RUN_BUILD)
    (tmp_path / "limited.py").write_text(LIMITED_BUILD)
    root = tmp_path / "root"
    environment = {**os.environ, "PYTHONPATH": str(Path(shards.writer.__file__).parents[1])}
    arguments = [source, root, 200_000, tmp_path / "build.py", jobs]
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
    with lock(tmp_path / "root"), pytest.raises(EnvironmentFault, match="another process"):
        build(source, tmp_path / "root")
    with lock(tmp_path / "root.state"), pytest.raises(EnvironmentFault, match="another process"):
        build(source, tmp_path / "root")
    assert build(source, tmp_path / "root").counts.samples == 70


def test_a_source_that_changes_during_the_build(tmp_path, source, monkeypatch):
    victim = source / "patient_30.png"
    changed = encode(draw(999))

    def change(*args: object) -> None:
        victim.write_bytes(changed)

    monkeypatch.setattr("shards.build.save_plan", change)
    with pytest.raises(DataError, match=r"patient_30\.png: changed since"):
        build(source, tmp_path / "root")
    monkeypatch.undo()
    assert build(source, tmp_path / "root").counts.samples == 70


def test_settings_that_cannot_be():
    for options in (
        {"modality": "petscan"},
        {"modality": "ct", "source": "Has.Dot"},
        {"modality": "ct", "patch_size": 6},
        {"modality": "ct", "size": 16, "patch_size": 32},
        {"modality": "ct", "max_pixels": 10**9},
        {"modality": "ct", "colour": True},
    ):
        with pytest.raises(ValueError, match="validation error"):
            BuildConfig(**options)
    with pytest.raises(ConfigError, match="cutof"):
        BuildConfig(modality="ct", hf={"cutof": 1}).hf_params()


def test_destination_inside_the_source(tmp_path, source):
    with pytest.raises(ConfigError, match="inside the source"):
        build(source, source / "root")
