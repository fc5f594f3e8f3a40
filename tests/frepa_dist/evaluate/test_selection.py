"""What trials are chosen by: nothing of the test part, and the same question whatever a run trained with."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from frepa_dist.evaluate import selection
from frepa_dist.evaluate.selection import (
    choose_images,
    measure_detail,
    measure_labeled,
    neighbor_auroc,
    token_recall,
)
from frepa_dist.evaluate.task import ProbeTask, read_parts
from frepa_dist.methods.base import Preview
from frepa_dist.runs import CONFIG
from shards.support.errors import ConfigError, DataError

STEP = 12


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """24 images, two classes that differ in brightness, a third of each in the test part."""
    folder = tmp_path_factory.mktemp("labeled")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(24):
        bright = number % 2
        pixels = rng.integers(100 * bright, 100 * bright + 120, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append([f"{number}.png", ("dark", "bright")[bright], "test" if number < 8 else "train"])
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["filename", "label", "split"], *rows])
    return folder


def task_of(images, labeled):
    return ProbeTask(images=str(images), labels=labeled / "labels.csv")


@pytest.mark.parametrize("neighbors", [None, 3])
def test_classes_are_told_apart_without_a_look_at_the_test_part(run_dir, labeled, tmp_path, neighbors):
    found = measure_labeled(run_dir, STEP, task_of(labeled, labeled), neighbors=neighbors)
    assert found == {"auroc": pytest.approx(1.0), "n": 16}
    other = tmp_path / "other"
    other.mkdir()
    for path in labeled.glob("*.png"):
        is_test = int(path.stem) < 8
        (other / path.name).write_bytes(b"no image" if is_test else path.read_bytes())
    again = measure_labeled(run_dir, STEP, task_of(other, labeled), neighbors=neighbors)
    assert again == found


def test_the_part_that_is_left_is_the_test_part_of_the_probe(run_dir, labeled, tmp_path, monkeypatch):
    rows = ["filename,label"]
    for number in range(24):  # 8 of them twice, which one side of a split has to hold
        shutil.copy(labeled / f"{number % 16}.png", tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{('dark', 'bright')[number % 2]}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    seen = []

    def extract(_, paths):
        seen.extend(path.name for path in paths)
        return np.random.default_rng(0).normal(size=(len(paths), 4))

    monkeypatch.setattr(selection, "extract_features", extract)
    task = task_of(tmp_path, tmp_path)
    measure_labeled(run_dir, STEP, task)
    parts = read_parts(task)
    assert seen == [f"{number}.png" for number in np.flatnonzero(parts.is_train)]


def test_a_part_of_the_images_has_the_same_share_of_each_class(run_dir, labeled):
    assert measure_labeled(run_dir, STEP, task_of(labeled, labeled), num=8)["n"] == 8


def test_neighbors_of_noise_know_nothing():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 8)), rng.integers(0, 2, 400)
    assert abs(neighbor_auroc(x, y, None, 10, 0) - 0.5) < 0.1
    assert neighbor_auroc(x + 4 * y[:, None], y, None, 10, 0) > 0.99
    with pytest.raises(DataError, match="too few"):
        neighbor_auroc(x[:2], np.array([0, 1]), None, 1, 0)


def test_more_neighbors_than_images_are_refused():
    x, y = np.eye(20), np.tile([0, 1], 10)
    with pytest.raises(ConfigError, match=r"20 neighbors.*16 images.*allowed: 1 to 16"):
        neighbor_auroc(x, y, None, 20, 0)


def test_a_rare_class_keeps_two_images_of_the_chosen():
    y = np.repeat([0, 1, 2, 3], [700, 10, 289, 1])
    kept = np.ones(1000, bool)
    chosen = choose_images(y, kept, 40, 0)
    assert np.bincount(y[chosen]).tolist() == [28, 2, 12, 1]
    assert choose_images(y, kept, 1000, 0).all()


def with_setting(run, key, value):
    config = yaml.safe_load((run / CONFIG).read_text())
    config["method"][key] = value
    (run / CONFIG).write_text(yaml.safe_dump(config))


def test_detail_is_measured_under_the_same_masks_whatever_a_run_trained_with(run_dir, small_dataset):
    def measured(mask_ratio):
        return measure_detail(run_dir, STEP, str(small_dataset), mask_ratio=mask_ratio, num=4)

    with_setting(run_dir, "norm_pix_loss", False)
    first = measured(0.75)
    assert first["n"] == 4
    assert 0 <= first["hf_recall"] <= 1
    with_setting(run_dir, "mask_ratio", 0.4)
    assert measured(0.75) == first
    assert measured(0.4)["high_band"] < first["high_band"]  # more of the image is the true one
    with_setting(run_dir, "norm_pix_loss", True)  # drawn with the spread of the truth
    assert np.isnan(measured(0.75)["hf_recall"])


def test_recall_is_one_of_the_truth_and_a_quarter_by_chance():
    generator = torch.Generator().manual_seed(0)

    def draw():
        sizes = torch.rand(32, 1, 8, 8, generator=generator).repeat_interleave(16, 2).repeat_interleave(16, 3)
        return (0.5 + 0.4 * sizes * torch.randn(32, 3, 128, 128, generator=generator)).clamp(0, 1)

    images, hidden = draw(), torch.ones(32, 1, 128, 128, dtype=torch.bool)
    assert token_recall(images, Preview("x", images, images, hidden), 16).eq(1).all()
    by_chance = token_recall(images, Preview("x", images, draw(), hidden), 16).mean()
    assert abs(by_chance - 0.25) < 0.06
    few = torch.zeros_like(hidden)
    few[..., :16, :16] = True
    assert token_recall(images, Preview("x", images, images, few), 16).isnan().all()
