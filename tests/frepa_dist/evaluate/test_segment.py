"""Segmentation on a frozen encoder: lines are learned, masks and parts are read, what is wrong is said."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from frepa_dist.evaluate.dense import DenseTraining
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.masks import dice
from frepa_dist.evaluate.pairs import Columns, load_image, load_mask, read_masked
from frepa_dist.evaluate.segment import (
    SegmentResult,
    encode_tiles,
    mask_loss,
    run_segment,
)
from shards.support.errors import ConfigError, DataError
from tests.commands import frepa
from tests.frepa_dist.evaluate.drawn import draw_masked


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw_masked(tmp_path_factory.mktemp("pictures"))


def test_a_decoder_learns_what_is_there_and_the_command_says_so(pictures, tmp_path, small_encoder):
    out, page = tmp_path / "result.json", tmp_path / "page.html"
    settings = ["--train", "epochs=15", "--train", "learning_rate=1e-2", "--train", "head_width=16"]
    said = frepa(
        *("evaluate", "segment", small_encoder, str(pictures), "--masks", str(pictures / "labels.csv")),
        *(*settings, "--out", str(out), "--page", str(page)),
    )
    result = SegmentResult.model_validate_json(out.read_text())
    assert result.names == ["image0.png", "image4.png"]
    assert result.num_train == 6
    assert result.mean["dice"] > 0.8
    assert result.mean["auroc"] > 0.95
    assert result.low["dice"] <= result.mean["dice"] <= result.high["dice"]
    assert "dice" in said.stdout
    assert page.read_text().count("<img") == 4  # the best and the worst of two images, each with its overlay


def test_the_second_observer_is_judged_beside(pictures, small_encoder):
    training = DenseTraining(epochs=1, max_tiles=1)
    result = run_segment(
        small_encoder, pictures, pictures / "labels.csv", columns=Columns(second="mask"), training=training
    )
    assert result.observer["dice"] == 1
    assert "auroc" not in result.observer


@pytest.mark.parametrize("name", ["test_efficientnet", "mobilenetv3_small_050"])
def test_maps_of_other_widths_than_the_pooled_features(name, pictures):
    encoder = load_encoder(f"timm:{name}", "cpu")
    images = torch.zeros(1, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8)
    assert encoder.encode(images).shape == (1, encoder.width)
    assert encoder.map(encoder.normalize(images)).shape[1] != encoder.width
    training = DenseTraining(epochs=1, max_tiles=1)
    result = run_segment(f"timm:{name}", pictures, pictures / "labels.csv", training=training, device="cpu")
    assert 0 <= result.mean["dice"] <= 1


def test_tiles_know_what_does_not_count(pictures, small_encoder):
    pair = read_masked(pictures, pictures / "labels.csv")[1]
    encoder = load_encoder(small_encoder, "cpu")
    # one tile around the small picture, and its mirror image
    tiles = encode_tiles(encoder, pair, DenseTraining(short_side=32), 0)
    assert tiles.masks.shape == (2, 64, 64)
    torch.testing.assert_close(tiles.masks[1], tiles.masks[0].flip(-1))
    assert 32 * 35 <= int((tiles.masks[0] >= 0).sum()) <= 32 * 36  # 40 columns, of which 80 / 90 count
    assert tiles.maps.dtype == torch.float16


def test_loss_is_of_what_counts():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 8, 8, generator=generator)
    masks = (torch.rand(1, 8, 8, generator=generator) < 0.4).float()
    masks[..., :3] = -1
    there = mask_loss(logits[..., 3:], masks[..., 3:])
    torch.testing.assert_close(mask_loss(logits, masks), there)
    perfect = torch.stack([-40 * (2 * masks - 1), 40 * (2 * masks - 1)], dim=1)
    assert float(mask_loss(perfect, masks)) == pytest.approx(0, abs=1e-3)


def test_a_split_is_made_by_patient(tmp_path):
    draw_masked(tmp_path, 8)
    rows = [[f"image{n}.png", f"mask{n}.png", f"p{n // 2}"] for n in range(8)]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["filename", "mask", "patient"], *rows])
    tests = [pair.is_test for pair in read_masked(tmp_path, tmp_path / "table.csv")]
    assert sum(tests) == 2
    assert tests[::2] == tests[1::2]


def test_a_patient_on_both_sides_is_refused(tmp_path):
    draw_masked(tmp_path, 4)
    rows = [
        [f"image{n}.png", f"mask{n}.png", ("train", "test")[n % 2], "p " if n < 2 else ""] for n in range(4)
    ]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["filename", "mask", "split", "patient"], *rows])
    with pytest.raises(DataError, match="one patient on both sides of the split: 1 patients"):
        read_masked(tmp_path, tmp_path / "table.csv")


def test_images_keep_their_size_unless_told(pictures):
    pair = read_masked(pictures, pictures / "labels.csv")[0]
    assert load_image(pair.image, None).shape == (3, 72, 90)
    assert load_image(pair.image, 36).shape == (3, 36, 45)


def test_masks_of_16_bits_and_of_formats_that_lose_something(tmp_path):
    y, x = np.ogrid[:64, :64]
    disc = np.hypot(y - 30, x - 30) < 8
    Image.fromarray((disc * 65535).astype(np.uint16)).save(tmp_path / "full.png")
    Image.fromarray(np.where(disc, np.where(y < 30, 1, 1000), 0).astype(np.uint16)).save(tmp_path / "few.tif")
    Image.fromarray(np.full((64, 64), 65535, np.uint16)).save(tmp_path / "all.png")
    for name, expected in (("full.png", disc), ("few.tif", disc), ("all.png", np.ones((64, 64), bool))):
        np.testing.assert_array_equal(load_mask(tmp_path / name, (64, 64)), expected)
    Image.fromarray((disc * 255).astype(np.uint8)).save(tmp_path / "lossy.jpg", quality=75)
    assert dice(load_mask(tmp_path / "lossy.jpg", (64, 64)), disc) > 0.98
    Image.fromarray((disc * 3).astype(np.uint8)).save(tmp_path / "dark.jpg", quality=95)
    with pytest.raises(DataError, match="may lose something, whose brightest pixel"):
        load_mask(tmp_path / "dark.jpg", (64, 64))


def test_tiles_of_many_images_are_shared_out():
    assert DenseTraining().share_tiles(40).max_tiles == 32
    assert DenseTraining(max_all_tiles=100).share_tiles(40).max_tiles == 2
    assert DenseTraining(max_all_tiles=100).share_tiles(1000).max_tiles == 1


def test_what_is_wrong_is_said(pictures, tmp_path):
    with pytest.raises(ConfigError, match="no column 'vessels'"):
        read_masked(pictures, pictures / "labels.csv", Columns(mask="vessels"))
    table = tmp_path / "table.csv"
    table.write_text("filename,mask\nimage0.png,none.png\nimage1.png,mask1.png\n")
    with pytest.raises(DataError, match=r"1 of 4 files are missing: .*none\.png"):
        read_masked(pictures, table)
    table.write_text("filename,mask,split\nimage0.png,mask0.png,test\n")
    with pytest.raises(DataError, match="all in one part of the split"):
        read_masked(pictures, table)
    (tmp_path / "image0.png").write_bytes((pictures / "image0.png").read_bytes())
    (tmp_path / "image1.png").write_bytes((pictures / "image1.png").read_bytes())
    for number in range(2):
        Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / f"mask{number}.png")
    table.write_text("filename,mask,split\nimage0.png,mask0.png,test\nimage1.png,mask1.png,train\n")
    with pytest.raises(DataError, match="5 x 5 pixels, its picture 72 x 90"):
        run_segment("random:tiny", tmp_path, table)
