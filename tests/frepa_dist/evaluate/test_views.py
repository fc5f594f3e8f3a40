"""Views: a file and the sample that the build makes of it look the same, and rank the same patches."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from frepa_dist.evaluate.views import (
    Grid,
    center_view,
    list_images,
    list_views,
    read_pixels,
    stack_images,
)
from shards.builder.build import BuildConfig, build_dataset
from shards.read.config import StreamConfig
from shards.read.reader import Sample
from shards.support.errors import ConfigError, DataError

GRID = Grid(64, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(7):
        image = np.full((90, 72 + 10 * (number % 3), 3), 128, np.uint8)
        image[5 : 5 + 9 * number, 4:40] = rng.integers(0, 255, (9 * number, 36, 3))
        image[60:, 50:] = rng.integers(90, 160, image[60:, 50:].shape)
        pixels = image[:, :, 0] if number == 3 else image
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.fixture(scope="module")
def dataset(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("dataset") / "shards"
    sources = tmp_path_factory.mktemp("sources")
    for path in list_images(folder):
        (sources / path.name).write_bytes(path.read_bytes())
    build_dataset([sources], root, BuildConfig(modality="histopathology", size=512, jobs=1))
    return root


def views_by_pixels(loaders):
    return {view.image.tobytes(): view.hf_order.tolist() for view in (load() for load in loaders)}


def test_files_and_shards_give_the_same_views(folder, dataset):
    from_files = list_views(folder, GRID, num=99, modality="histopathology")
    from_shards = list_views(dataset, GRID, num=99)
    assert list(from_files) == list(from_shards) == ["histopathology"]
    a, b = (views_by_pixels(found["histopathology"]) for found in (from_files, from_shards))
    assert len(a) == 7
    assert a == b
    for order in a.values():
        assert sorted(order) == list(range(16))


def test_probe_and_cka_see_the_same_pixels(folder):
    loaders = list_views(folder, GRID, num=99, modality="fundus")["fundus"]
    seen = {load().image.tobytes() for load in loaders}
    assert seen == {read_pixels(path, 64).tobytes() for path in list_images(folder)}
    assert stack_images([load() for load in loaders]).shape == (7, 3, 64, 64)


def test_strongest_patches_lie_on_the_detail(tmp_path):
    image = np.full((128, 192, 3), 128, np.uint8)
    image[64:96, 64:96] = np.random.default_rng(0).integers(0, 255, (32, 32, 3))
    Image.fromarray(image).save(tmp_path / "one.png")
    ((load,),) = list_views(tmp_path, GRID, num=1, modality="histopathology").values()
    # the centered square starts at column 32: the detail is the patch in row 2, column 1 of four
    assert load().hf_order[0] == 2 * 4 + 1


def test_ct_is_shown_in_the_reference_window():
    hounsfield = np.arange(-1024, 3072, dtype=np.int16).reshape(64, 64)
    sample = Sample("key", hounsfield, np.ones((16, 16), np.uint8), num_bytes=0)
    view = center_view(sample, StreamConfig(root=".", image_size=64, patch_size=16, hf_keep=1.0))
    assert view.image.dtype == np.uint8
    assert view.image.shape == (3, 64, 64)
    expected = np.clip((hounsfield + 1000) / 2000, 0, 1) * 255
    assert np.abs(view.image[0] - expected).max() <= 0.501
    assert np.array_equal(view.image[0], view.image[2])


def test_choice_is_seeded_and_without_repeats(dataset):
    def chosen(**kwargs):
        return [load().image.tobytes() for load in list_views(dataset, GRID, **kwargs)["histopathology"]]

    assert chosen(num=4, seed=1) == chosen(num=4, seed=1)
    assert len(set(chosen(num=4, seed=1))) == 4
    assert chosen(num=7, seed=1) != chosen(num=7, seed=2)


def test_errors(folder, dataset, tmp_path):
    with pytest.raises(ConfigError, match="--modality"):
        list_views(folder, GRID, num=3)
    with pytest.raises(ConfigError, match="no 'fundus'; allowed: histopathology"):
        list_views(dataset, GRID, num=3, modality="fundus")
    with pytest.raises(DataError, match="no image"):
        list_views(tmp_path, GRID, num=3, modality="fundus")
    with pytest.raises(DataError, match="cannot be read"):
        read_pixels(tmp_path / "none.png", 64)
