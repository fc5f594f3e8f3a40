"""Copies of evaluation images in a dataset are found by their kind, and different images are not."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from shards.audit.leakage import find_leakage
from shards.audit.leakage_page import write_leakage_page
from shards.builder.build import BuildConfig, build_dataset
from shards.dataset import load_snapshot
from shards.support.errors import ConfigError, DataError
from tests.shards.fundus import draw_fundus

SIZE, STORED = 240, 200
NUM_OTHERS = 12


def jpeg(pixels, quality):
    return cv2.imdecode(
        cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR
    )


def crop(pixels, share):
    edge = round(SIZE * (1 - share) / 2)
    return pixels[edge:-edge, edge:-edge]


COPIES = {  # what was done to the copy, and the kind under which it is found
    "reencoded": (lambda p: p, "pixels"),
    "jpeg": (lambda p: jpeg(p, 60), "near"),
    "resized": (lambda p: cv2.resize(p, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA), "near"),
    "mirrored": (lambda p: p[:, ::-1], "near"),
    "turned": (lambda p: p[::-1, ::-1], "near"),
    "brighter": (lambda p: np.clip(p * 1.3 + 8, 0, 255).astype(np.uint8), "near"),
    "cropped": (lambda p: crop(p, 0.8), "near"),
    "bordered": (lambda p: cv2.copyMakeBorder(p, 0, 0, 50, 50, cv2.BORDER_CONSTANT), "near"),
}
NAMES = ["same", *COPIES]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """One image for each kind of copy, and as many that are in no dataset."""
    folder = tmp_path_factory.mktemp("evaluation")
    for seed, name in enumerate([*NAMES, *(f"other{n}" for n in range(len(NAMES)))]):
        Image.fromarray(draw_fundus(SIZE, seed)).save(folder / f"{name}.jpg", quality=95)
    return folder


@pytest.fixture(scope="module")
def dataset(evaluation, tmp_path_factory):
    """Root of a dataset with the copies among different images, one of a patient who is evaluated too."""
    source = tmp_path_factory.mktemp("source")
    shutil.copy(evaluation / "same.jpg", source / "exact.jpg")
    for name, (change, _) in COPIES.items():
        pixels = cv2.imread(str(evaluation / f"{name}.jpg"))
        cv2.imwrite(str(source / f"copy-{name}.png"), np.ascontiguousarray(change(pixels)))
    for seed in range(NUM_OTHERS):
        Image.fromarray(draw_fundus(SIZE, 1000 + seed)).save(source / f"different{seed}.png")
    names = sorted(path.name for path in source.iterdir())
    with (source / "labels.csv").open("w", newline="") as file:
        patients = {"different3.png": "Q7"}
        rows = [[name, patients.get(name, f"P-{name}")] for name in names]
        csv.writer(file).writerows([["filename", "patient"], *rows])
    root = tmp_path_factory.mktemp("dataset") / "shards"
    config = BuildConfig(modality="fundus", size=STORED, jobs=1)
    build_dataset([source / "labels.csv"], root, config)
    return root


def state_of(root: Path) -> Path:
    return root.with_name(f"{root.name}.state")


@pytest.fixture(scope="module")
def report(dataset, evaluation):
    files = sorted(evaluation.iterdir())
    patients = {place: "Q7" for place, path in enumerate(files) if path.stem == "other2"}
    return find_leakage(
        dataset, files, images=evaluation, states=[state_of(dataset)], patients=patients, jobs=1
    )


def kinds_of(report, name):
    return {leak.kind for leak in report.found if leak.file == f"{name}.jpg"}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found_by_their_kind(report, name):
    assert kinds_of(report, name) == {COPIES[name][1]}


def test_the_same_file_has_the_same_bytes_and_pixels(report):
    assert kinds_of(report, "same") == {"bytes", "pixels"}


def test_different_images_are_not_found_but_by_their_patient(report):
    others = {leak.file: leak.kind for leak in report.found if leak.file.startswith("other")}
    assert others == {"other2.jpg": "patient"}
    assert report.num_near > 0
    assert report.num_compared == report.num_near
    assert report.num_samples == len(NAMES) + NUM_OTHERS


def test_a_near_duplicate_says_how_it_differs(report):
    how = {leak.file: leak.how for leak in report.found if leak.kind == "near"}
    assert how["mirrored.jpg"] == "mirrored"
    assert how["turned.jpg"] == "turned by 180 degrees"
    assert how["cropped.jpg"] == "stored is its center (80%)"


def test_without_state_it_says_what_was_not_checked(dataset, evaluation):
    report = find_leakage(dataset, [evaluation / "same.jpg"], images=evaluation, most_near=0, jobs=1)
    assert kinds_of(report, "same") == {"pixels"}
    assert set(report.not_checked) == {"bytes", "patient", "near"}
    assert "--state" in report.summary()
    with pytest.raises(DataError, match=r"1 of 1 files found.*same\.jpg"):
        report.check()


def test_a_plain_image_and_a_broken_one_are_told(dataset, tmp_path):
    Image.new("RGB", (SIZE, SIZE), (90, 40, 20)).save(tmp_path / "plain.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    report = find_leakage(dataset, sorted(tmp_path.iterdir()), images=tmp_path, jobs=1)
    assert report.found == []
    assert report.num_plain == 1
    assert list(report.unreadable) == ["broken.png"]
    report.check()
    assert "too plain" in report.summary()


def test_the_page_shows_the_pairs(report, evaluation, tmp_path):
    out = tmp_path / "page.html"
    write_leakage_page(report, evaluation, out)
    text = out.read_text()
    assert text.count("data:image/png") == 2 * len(report.found)
    assert "Near duplicate" in text


def test_slices_of_a_volume_are_found_by_their_pixels(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        volume = rng.normal(0, 1, (6, 90, 90))
        smooth = [cv2.GaussianBlur(plane, (0, 0), 2) for plane in volume]
        np.save(tmp_path / f"{name}.npy", (np.stack(smooth) * 3000).astype(np.int16))
    (tmp_path / "source").mkdir()
    shutil.copy(tmp_path / "one.npy", tmp_path / "source")
    root = tmp_path / "shards"
    build_dataset([tmp_path / "source"], root, BuildConfig(modality="mri", size=64, jobs=1))
    files = [tmp_path / "one.npy", tmp_path / "two.npy"]
    report = find_leakage(root, files, images=tmp_path, jobs=1)
    assert load_snapshot(root).counts.samples == report.num_images / 2 == 6
    assert {(leak.file, leak.unit) for leak in report.found if leak.kind == "pixels"} == {
        ("one.npy", unit) for unit in range(6)
    }


def test_what_cannot_be_searched(dataset, evaluation, tmp_path):
    files = [evaluation / "same.jpg"]
    with pytest.raises(ConfigError, match="no 'ct'"):
        find_leakage(dataset, files, modalities=["ct"])
    with pytest.raises(ConfigError, match="no state folder"):
        find_leakage(dataset, files, states=[tmp_path])
