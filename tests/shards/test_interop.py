"""Anybody's `webdataset.WebDataset` reads the shards; what it does not know of is said here, too."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
import webdataset as wds
import zstandard

from shards.builder.build import BuildConfig, build_dataset
from shards.dataset import load_snapshot, read_index, read_table
from shards.read.kept import KeptSamples, exclusion_rows
from shards.read.reader import Sample, ShardReader
from tests.shards.images import draw, encode

NUM_PICTURES = 9


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Nine pictures, some JPEG, some grey, and one again in another file of the same pixels."""
    folder = tmp_path_factory.mktemp("interop")
    (folder / "source").mkdir()
    for n in range(NUM_PICTURES):
        pixels = draw(n, channels=1 if n % 4 == 0 else 3)
        kind, suffix = ("JPEG", "jpg") if n % 3 == 0 else ("PNG", "png")
        (folder / "source" / f"{n}.{suffix}").write_bytes(encode(pixels, kind))
    (folder / "source" / "again.png").write_bytes(encode(draw(1), compress_level=1))
    config = BuildConfig(modality="fundus", size=64, jobs=1, salt="0123456789abcdef")
    build_dataset([folder / "source"], folder / "dataset", config)
    return folder / "dataset"


def test_three_lines_read_pixels_tokens_and_facts(root):
    # the lines of the README, but for the place
    shards = sorted(map(str, root.glob("*/*.tar")))
    dataset = wds.WebDataset(shards, shardshuffle=False).decode("rgb8").rename(image="png;jpg")
    samples = {sample["__key__"]: sample for sample in dataset}

    assert len(samples) == NUM_PICTURES + 1
    rows = index_rows(root)
    assert list(samples) == [row["key"] for row in rows]
    for row in rows:
        sample = samples[row["key"]]
        assert sample["image"].shape == (row["height"], row["width"], 3)  # "rgb8" makes grey ones RGB
        assert sample["image"].dtype == np.uint8
        patches = (row["height"] // 16) * (row["width"] // 16)
        assert sorted(sample["hf.npy"].tolist()) == list(range(patches))
        assert isinstance(sample["json"], dict)


def test_the_pixels_are_those_of_our_reader(root):
    shards = sorted(map(str, root.glob("*/*.tar")))
    theirs = {s["__key__"]: s["image"] for s in wds.WebDataset(shards, shardshuffle=False).decode("rgb8")
              .rename(image="png;jpg")}  # fmt: skip
    snapshot = load_snapshot(root)
    kept = KeptSamples(snapshot, exclusion_rows(root, snapshot))
    assert len(kept) == NUM_PICTURES
    for ours in ShardReader(root, snapshot).read_many([kept.locate(number) for number in range(len(kept))]):
        assert isinstance(ours, Sample)
        rgb = ours.image if ours.image.ndim == 3 else cv2.cvtColor(ours.image, cv2.COLOR_GRAY2RGB)
        # two JPEG libraries may round differently
        assert np.abs(rgb.astype(int) - theirs[ours.key]).max() <= 3


def unpack(key: str, data: bytes) -> np.ndarray | None:
    """The two-line decoder of the README: webdataset itself has no reader of .zst."""
    if key.endswith("npy.zst"):
        return np.load(io.BytesIO(zstandard.decompress(data)))
    return None


def test_without_a_decoder_zst_members_stay_bytes(root):
    shards = sorted(map(str, root.glob("*/*.tar")))
    for sample in wds.WebDataset(shards, shardshuffle=False).decode("rgb8"):
        assert isinstance(sample["hfmap.npy.zst"], bytes)
    for sample in wds.WebDataset(shards, shardshuffle=False).decode(unpack, "rgb8"):
        height, width = next(sample[ext] for ext in ("png", "jpg") if ext in sample).shape[:2]
        assert sample["hfmap.npy.zst"].shape == (height // 4, width // 4)
        assert sample["hfmap.npy.zst"].dtype == np.uint8


def test_sixteen_bit_pixels_are_arrays(tmp_path, write_dataset, draw_image):
    write_dataset(tmp_path, {"ct": [4]})
    shards = sorted(map(str, tmp_path.glob("*/*.tar")))
    samples = list(wds.WebDataset(shards, shardshuffle=False).decode(unpack))
    assert len(samples) == 4
    for number, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["npy.zst"], draw_image(number, "ct"))


def test_the_tars_hold_what_the_duplicates_table_excludes(root):
    """Only the order leaves duplicates out: who reads the tars alone sees them, and can leave them out so."""
    snapshot = load_snapshot(root)
    table = read_table(root, snapshot, "duplicates").to_pylist()
    excluded = {row["key"] for row in table if row["shard"] is not None}
    assert len(excluded) == 1
    shards = sorted(map(str, root.glob("*/*.tar")))
    keys = [sample["__key__"] for sample in wds.WebDataset(shards, shardshuffle=False)]
    assert excluded < set(keys)
    kept = wds.WebDataset(shards, shardshuffle=False).select(lambda s: s["__key__"] not in excluded)
    assert len(list(kept)) == NUM_PICTURES


def index_rows(root) -> list[dict]:
    snapshot = load_snapshot(root)
    return [row for shard in snapshot.shards for row in read_index(root, shard).to_pylist()]
