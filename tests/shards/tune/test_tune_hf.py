"""The search of HF parameters, on drawn vessels whose best band is known, and what it refuses."""

from __future__ import annotations

import builtins
import csv
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from shards.hf.modalities import find_modality
from shards.hf.tokens import HFParams
from shards.support.errors import ConfigError, DataError, EnvironmentFault
from shards.support.settings import read_config
from shards.tune.masked import SEARCH, VALIDATION, assign_parts, list_masked, load_masked, worsen
from shards.tune.recall import (
    BEST,
    DEFAULT,
    GRADIENT,
    IDEAL,
    RANDOM,
    measure,
    measure_random,
    objective,
    random_curve,
    recall,
    recall_curve,
    respond_by,
)
from shards.tune.search import TuneConfig, search, tune_hf

SIZE = 96


def draw_vessels(seed: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Thin lines in one half, strong coarse blobs all over. Returns (S, S) uint8 and its 0/255 mask."""
    rng = np.random.default_rng(seed)
    blobs = cv2.GaussianBlur(rng.normal(size=(size, size)), (0, 0), size / 24)
    image = 120 + 25 * blobs / blobs.std() + rng.normal(0, 1, (size, size))
    mask = np.zeros((size, size), np.uint8)
    for _ in range(5):
        ends = rng.integers(0, size, (2, 2)) // (1, 2)
        cv2.line(mask, tuple(map(int, ends[0][::-1])), tuple(map(int, ends[1][::-1])), 255, 2)
    image[mask > 0] -= 25
    return np.clip(image, 0, 255).astype(np.uint8), mask


def write_set(
    folder: Path, num: int = 6, columns: dict[str, list[str]] | None = None, first_seed: int = 0
) -> Path:
    """A folder of images and masks with its table."""
    rows: list[dict[str, Any]] = []
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(num):
        image, mask = draw_vessels(first_seed + number)
        names = {"filename": f"images/{number}.png", "mask": f"masks/{number}.png"}
        cv2.imwrite(str(folder / names["filename"]), image)
        cv2.imwrite(str(folder / names["mask"]), mask)
        rows.append(names | {key: values[number] for key, values in (columns or {}).items()})
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def config(**changes: Any) -> TuneConfig:
    """A short search that starts too low for the thin lines."""
    start = {"fov": "none", "log_offset": None, "low_pass_cycles": None, "cutoff_cycles": 2.0}
    options = {"modality": "mri", "size": SIZE, "patch_size": 8, "trials": 12, "hf": start}
    return TuneConfig(**options | changes)


# recall


def test_recall_is_a_share_of_the_best_possible() -> None:
    mask = np.array([0.0, 4, 0, 2, 1, 0, 0, 0], np.float32)
    assert recall(mask, mask, 0.25) == 1
    assert recall(np.array([9.0, 8, 0, 0, 0, 0, 0, 0]), mask, 0.25) == pytest.approx(4 / 6)
    assert recall(np.array([9.0, 0, 8, 0, 0, 0, 0, 0]), mask, 0.25) == 0
    assert recall(-mask, mask, 1.0) == 1


def test_objective_counts_groups_alike_and_worse_copies_by_their_weight() -> None:
    recalls = np.array([[1.0, 0.5, 0.5], [1.0, 0.5, 0.5], [0.6, 0.2, 0.0]])
    assert objective(recalls, ["a", "a", "b"], 0.0) == pytest.approx(0.8)
    assert objective(recalls, ["a", "a", "b"], 0.5) == pytest.approx((0.75 + 0.35) / 2)


def test_the_curve_of_the_best_possible_bounds_every_other(tmp_path: Path) -> None:
    files, _ = list_masked([write_set(tmp_path / "a", 2)], [], "group")
    images = [image for file in files if (image := load_masked(file, SIZE, 8, 0)) is not None]
    shares = [0.05, 0.25, 0.6, 1.0]
    ideal = recall_curve(images, None, 8, shares)
    found = recall_curve(images, respond_by(config().start()), 8, shares)
    assert (found <= ideal + 1e-6).all()
    assert (np.diff(found) > 0).all()
    assert found[-1] == pytest.approx(1)


def test_random_is_the_mean_over_draws(tmp_path: Path) -> None:
    files, _ = list_masked([write_set(tmp_path / "a", 1)], [], "group")
    image = load_masked(files[0], SIZE, 8, 0)
    assert image is not None
    rng = np.random.default_rng(0)
    draws = [recall(rng.random(image.mask.size), image.mask, 0.25) for _ in range(2000)]
    expected = measure_random([image], config().start(), 8, 0.25)
    assert expected.shape == (1, 3)
    assert expected == pytest.approx(np.mean(draws), abs=0.01)
    assert random_curve([image], config().start(), 8, [0.25, 1.0]) == pytest.approx([0.25, 1], abs=1e-6)


def test_worse_copies_are_noisy_and_lit_from_one_side() -> None:
    image = np.full((64, 64, 3), 100, np.uint8)
    noisy, lit = worsen(image, 64, 0)
    assert noisy.shape == lit.shape == image.shape
    assert 3 < noisy.std() < 8
    assert sorted((int(lit[:, 0].mean()), int(lit[:, -1].mean()))) == [40, 160]
    np.testing.assert_array_equal(worsen(image, 64, 0)[0], noisy)
    assert worsen(image[:, :, 0], 32, 0)[1].shape == (32, 32)


# the search


def test_the_search_finds_the_band_of_the_lines(tmp_path: Path) -> None:
    files, _ = list_masked([write_set(tmp_path / "a", 4)], [], "group")
    images = [image for file in files if (image := load_masked(file, SIZE, 8, 0)) is not None]
    settings = config()
    start = settings.start()
    best, tried, objectives = search(images, start, settings)
    assert len(tried) == len(objectives) == 12
    assert tried[0] == {}
    assert best.cutoff_cycles > 6
    assert max(objectives) > objectives[0] + 0.2
    values = objective(measure(images, respond_by(best), 8, 0.25), ["a"] * 4, settings.worse_weight)
    assert values == pytest.approx(max(objectives))
    assert search(images, start, settings)[0] == best  # by its seed


def test_a_run_writes_settings_that_a_build_takes_and_a_page(tmp_path: Path) -> None:
    sets = [write_set(tmp_path / "one", 6), write_set(tmp_path / "two", 5, first_seed=50)]
    with (sets[1] / "labels.csv").open("a") as table:
        table.write("images/0.png,\n")  # a row without a mask
    cv2.imwrite(str(sets[1] / "masks" / "3.png"), np.zeros((SIZE, SIZE), np.uint8))
    result = tune_hf(sets, tmp_path / "out", config(hold_out=("two",)))
    assert result.groups == ["one", "two"]
    assert [result.images[i].file.group for i in result.select(VALIDATION)].count("two") == 4
    assert {result.images[i].file.group for i in result.select(SEARCH)} == {"one"}
    assert set(result.recalls) == {DEFAULT, BEST, GRADIENT, RANDOM}
    assert set(result.curves) == {DEFAULT, BEST, GRADIENT, RANDOM, IDEAL}
    table = {(group, way): mean for group, way, _, mean, *_ in result.rows(VALIDATION)}
    assert table["all", BEST] > table["all", DEFAULT] + 0.1
    assert table["all", BEST] > table["all", RANDOM] + 0.1
    assert result.gain > 0.1
    assert len(result.left_out) == 2
    assert "2 images left out" in "\n".join(result.lines())

    read = read_config(tmp_path / "out" / "best.yaml")
    assert list(read) == ["modality", "hf"]
    built = find_modality(read["modality"]).hf.model_dump() | read["hf"]  # as a build and rehf do
    assert HFParams(**built) == result.best
    page = (tmp_path / "out" / "tune-hf.html").read_text()
    assert "3.png" in page[page.index("Left out") :]
    assert "best is better" in page


def test_no_gain_is_said(tmp_path: Path) -> None:
    result = tune_hf([write_set(tmp_path / "a", 4)], tmp_path / "out", config(trials=1))
    assert result.gain == 0
    assert "keep the default" in result.lines()[-1]
    assert "keep the default" in (tmp_path / "out" / "best.yaml").read_text()


# sets of images with masks


def test_parts_follow_the_splits_else_a_drawn_share(tmp_path: Path) -> None:
    splits = ["train", "train", "test", "val", "", "training"]
    one = write_set(tmp_path / "one", 6, {"split": splits, "group": ["x"] * 5 + ["y"]})
    files, _ = list_masked([one, write_set(tmp_path / "two", 6)], [], "group")
    assert [file.group for file in files] == ["x"] * 5 + ["y"] + ["two"] * 6
    parts = assign_parts(files[:5] + files[6:], validation=0.3, hold_out=(), seed=0)
    assert parts[:5] == [SEARCH, SEARCH, VALIDATION, VALIDATION, SEARCH]
    assert sorted(parts[5:]) == [SEARCH] * 4 + [VALIDATION] * 2
    assert parts == assign_parts(files[:5] + files[6:], validation=0.3, hold_out=(), seed=0)
    held = assign_parts(files, validation=0.3, hold_out=("x",), seed=0)
    assert held[:5] == [VALIDATION] * 5
    with pytest.raises(ConfigError, match=r"no group 'z'.*x, y, two"):
        assign_parts(files, validation=0.3, hold_out=("z",), seed=0)
    with pytest.raises(ConfigError, match="no image is left for search"):
        assign_parts(files, validation=0.3, hold_out=("x", "y", "two"), seed=0)


def test_a_folder_of_masks_goes_by_names(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "a", 3)
    files, left_out = list_masked([folder / "images"], [folder / "masks"], "group")
    assert [(file.image.name, file.mask.name) for file in files] == [
        (f"{i}.png", f"{i}.png") for i in range(3)
    ]
    assert left_out == []
    (folder / "masks" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png: no mask for it"):
        list_masked([folder / "images"], [folder / "masks"], "group")


def test_mask_pixels_outside_the_field_of_view_do_not_count(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "a", 2, {"fov": ["fov.png", ""]})
    fov = np.zeros((SIZE, SIZE), np.uint8)
    fov[:48] = 1  # 0/1 as well as 0/255
    cv2.imwrite(str(folder / "fov.png"), fov)
    files, _ = list_masked([folder], [], "group")
    image = load_masked(files[0], SIZE, 8, 0)
    assert image is not None
    mask = cv2.imread(str(folder / "masks" / "0.png"))[:, :, 0] > 0
    assert image.mask.sum() == pytest.approx(mask[:48].sum())
    assert not image.mask.reshape(12, 12)[6:].any()


def test_what_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_set(tmp_path / "a", 3)
    cv2.imwrite(str(folder / "masks" / "1.png"), np.full((SIZE, SIZE - 2), 255, np.uint8))
    with pytest.raises(DataError, match=r"masks/1\.png: the mask has 94 x 96 pixels, its image 96 x 96"):
        tune_hf([folder], tmp_path / "out", config())
    (folder / "masks" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"masks/1\.png: the mask cannot be read"):
        tune_hf([folder], tmp_path / "out", config())
    (folder / "masks" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1 files are missing.*masks/1\.png"):
        tune_hf([folder], tmp_path / "out", config())
    for number in range(3):
        cv2.imwrite(str(folder / "masks" / f"{number}.png"), np.zeros((SIZE, SIZE), np.uint8))
    with pytest.raises(DataError, match=r"3 images, and no mask with a pixel in it.*0\.png"):
        tune_hf([folder], tmp_path / "out", config())
    (folder / "labels.csv").write_text("filename,label\nimages/0.png,a\n")
    with pytest.raises(ConfigError, match=r"labels\.csv: there is no column 'mask'"):
        tune_hf([folder], tmp_path / "out", config())
    (folder / "labels.csv").write_text("filename,mask,split\nimages/0.png,masks/0.png,later\n")
    with pytest.raises(ConfigError, match="unknown split 'later'"):
        tune_hf([folder], tmp_path / "out", config())
    with pytest.raises(DataError, match="cannot be read"):
        tune_hf([folder / "images"], tmp_path / "out", config())
    with pytest.raises(ConfigError, match="1 folders of images, but 2 of masks"):
        tune_hf([folder], tmp_path / "out", config(), masks=[folder, folder])

    real_import = builtins.__import__

    def without_optuna(name: str, *args: Any, **options: Any) -> Any:
        if name == "optuna":
            raise ImportError(name)
        return real_import(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_optuna)
    with pytest.raises(EnvironmentFault, match=r"pip install 'frepa\[tune\]'"):
        tune_hf([folder], tmp_path / "out", config())
    assert not (tmp_path / "out").exists()
