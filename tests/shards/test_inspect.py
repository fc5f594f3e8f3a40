"""Looking at a dataset: the words and the sheet."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.build import BuildConfig, build_dataset
from shards.formats import decode_image
from shards.inspect import contact_sheet, mark_tokens, summarize
from shards.schema import load_snapshot, read_index
from shards.support.errors import DataError, EnvironmentFault
from tests.shards.images import write_images

GREEN = (60, 255, 60)


@pytest.fixture
def root(tmp_path) -> Path:
    fundus = write_images(tmp_path / "a", ["well/a.png", "well/b.jpg", "sick/c.png"])
    (fundus / "broken.png").write_bytes(b"")
    (fundus / "zsame.png").write_bytes((fundus / "well" / "a.png").read_bytes())
    root = tmp_path / "root"
    build_dataset([fundus], root, BuildConfig(modality="fundus", size=64, jobs=1, labels="folder"))
    ct = write_images(tmp_path / "b", ["a.png"], 9, channels=1)
    build_dataset([ct], root, BuildConfig(modality="ct", size=64, jobs=1))
    return root


def test_summary_says_what_is_there_and_what_is_not(root):
    lines = summarize(root)
    text = "\n".join(lines)
    for words in (
        load_snapshot(root).hash,
        "fundus/images: 3 samples, 1 shards",
        "ct/images: 1 samples, 1 shards",
        "stored size 77 x 64 px",
        "source size 96 x 80 px",
        "3 color png; 3 with labels",
        "1 grey png; 0 with labels",
        "quarantined zero_bytes: 1",
        "duplicates by bytes: 1",
    ):
        assert words in text
    assert lines[-1] == "together: 6 objects, 6 units, 4 samples, 1 quarantined, 0 excluded, 1 duplicates"


def test_outline_runs_around_the_first_quarter_of_the_tokens():
    pixels = np.full((64, 64), 200, np.uint8)  # 4 x 4 patches
    tokens = np.array([5, 6, 9, 10, *(set(range(16)) - {5, 6, 9, 10})], np.uint16)
    drawn = mark_tokens(pixels, tokens, 16, side=64)
    marked = (drawn == GREEN).all(axis=2)
    y, x = np.nonzero(marked)
    assert 14 <= y.min() <= x.min() <= 16
    assert 47 <= y.max() <= 49
    assert 47 <= x.max() <= 49
    assert not marked[20:44, 20:44].any()  # not between tokens that touch
    assert marked[16, 20:44].all()


def test_contact_sheet_shows_each_sample_once(root, tmp_path):
    out = tmp_path / "sheet.png"
    contact_sheet(root, out, num=24, seed=3)
    sheet = np.asarray(Image.open(out))
    pairs = [tile for row in np.split(sheet, 2, axis=0) for tile in np.split(row, 3, axis=1)]
    has_marks = [(tile == GREEN).all(axis=2).any() for tile in pairs]
    assert has_marks == [True] * 4 + [False] * 2
    first = out.read_bytes()
    contact_sheet(root, out, num=24, seed=3)
    assert out.read_bytes() == first


def test_what_cannot_be_shown(root, tmp_path):
    with pytest.raises(DataError, match="frepa shards build"):
        summarize(tmp_path)
    with pytest.raises(EnvironmentFault):
        contact_sheet(root, tmp_path / "no" / "folder.png")
    snapshot = load_snapshot(root)
    shard = next(item for item in snapshot.shards if item.modality == "ct")
    path = root / shard.path
    data = bytearray(path.read_bytes())
    data[read_index(root, shard)["image_offset"][0].as_py() + 50] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="bytes of image are damaged"):
        contact_sheet(root, tmp_path / "sheet.png")


@pytest.mark.real_data
def test_tokens_of_real_photographs_lie_on_tissue(tmp_path):
    folder = os.environ.get("FREPA_TEST_DATA")
    if not folder:
        pytest.skip("FREPA_TEST_DATA does not name the folder of real images")
    source = Path(folder) / "fundus" / "drive" / "images"
    config = BuildConfig(modality="fundus", size=256, jobs=1)
    report = build_dataset([source], tmp_path / "root", config)
    assert report.counts.samples == report.counts.units == 40
    root = tmp_path / "root"
    for shard in load_snapshot(root).shards:
        with tarfile.open(root / shard.path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for key in {name.split(".")[0] for name in members}:
            pixels = decode_image(members[f"{key}.png"])
            ranked = np.load(io.BytesIO(members[f"{key}.hf.npy"]))
            rows, columns = (side // 16 for side in pixels.shape[:2])
            tissue = (pixels.max(axis=2) > 40)[: rows * 16, : columns * 16]
            share = tissue.reshape(rows, 16, columns, 16).mean(axis=(1, 3)).ravel()
            assert share[ranked[: len(ranked) // 4]].min() > 0.5
    contact_sheet(root, tmp_path / "sheet.png", num=12)
