"""Detection: heat of a decoder and of tokens finds drawn lesions, and is counted as the rules say."""

from __future__ import annotations

import csv

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from frepa_dist.evaluate.dense import DenseTraining, encode_maps
from frepa_dist.evaluate.detect import DetectResult, DetectSettings, judge_heat, run_detect
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.pairs import read_masked
from frepa_dist.evaluate.token_heat import embed_image, fit_token_probe, image_logits, predict_heat
from shards.support.errors import DataError
from tests.commands import frepa

SIDE = 64


def draw(folder, num=16, seed=0):
    """Every second image has a dark disc on bright noise; the others have no mask at all."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num):
        pixels = rng.integers(150, 210, (SIDE, SIDE))
        part = "test" if number % 4 < 2 else "train"
        mask = ""
        if number % 2:
            y, x = rng.integers(14, SIDE - 14, 2)
            disc = np.hypot(*np.ogrid[-y : SIDE - y, -x : SIDE - x]) < 10
            pixels[disc] -= 130
            mask = f"mask{number}.png"
            Image.fromarray(disc).save(folder / mask)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02d}.png")
        rows.append([f"{number:02d}.png", mask, part])
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["filename", "mask", "split"], *rows])
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("pictures"))


def test_a_decoder_finds_lesions_and_the_page_shows_it(pictures, small_encoder, tmp_path):
    out, page = tmp_path / "result.json", tmp_path / "page.html"
    told = frepa(
        *("evaluate", "detect", small_encoder, pictures, "--masks", pictures / "labels.csv", "--out", out),
        *("--train", "epochs=20", "--train", "learning_rate=1e-2", "--train", "head_width=16"),
        *("--train", "batch_size=8", "--page", page),
    )
    assert told.returncode == 0, told.stderr
    result = DetectResult.model_validate_json(out.read_text())
    assert (result.num_lesions, result.num_without, len(result.names), result.num_train) == (4, 4, 8, 8)
    assert result.recalls == sorted(result.recalls)
    assert result.froc == pytest.approx(np.mean(result.recalls))
    assert result.recalls[-1] == 1
    assert result.mean["lesion_iou"] > 0.4
    assert result.mean["auroc"] > 0.9
    # each image without lesions tells nothing of those
    assert [value is None for value in result.by_image["froc"]] == [True, False] * 4
    assert result.image_auroc is None
    assert f"FROC {result.froc:.3f}" in told.stdout
    assert page.read_text().count("<img") == 6


def test_tokens_of_a_probe_of_images_point_to_lesions(pictures, small_encoder):
    settings = DetectSettings(source="tokens", tolerance=8)
    result = run_detect(small_encoder, pictures, pictures / "labels.csv", settings=settings)
    assert result.image_auroc == 1
    assert result.mean["auroc"] > 0.8
    assert result.mean["pointing"] >= 0.5
    assert "iou" not in result.mean


def test_logits_of_tokens_add_up_to_that_of_the_image(pictures, small_encoder):
    encoder = load_encoder(small_encoder, "cpu")
    pairs = read_masked(pictures, pictures / "labels.csv", keep_empty=True)
    probe = fit_token_probe(encoder, pairs, DenseTraining())
    image = np.random.default_rng(0).integers(0, 255, (3, SIDE, SIDE), dtype=np.uint8)
    tokens = encode_maps(encoder, torch.from_numpy(image[None]))[0].flatten(1).T.numpy()
    whole = image_logits(probe, embed_image(encoder, image)[None])
    np.testing.assert_allclose(image_logits(probe, tokens).mean(), whole, rtol=1e-4)
    heat = predict_heat(encoder, probe, image)
    assert heat.shape == (SIDE, SIDE)
    logits = image_logits(probe, tokens).reshape(4, 4).astype(np.float32)
    np.testing.assert_allclose(heat, cv2.resize(logits, (SIDE, SIDE)), atol=1e-4)


def test_heat_is_judged_inside_the_field_of_view():
    heat = np.full((40, 40), -2, np.float32)
    heat[5, 5], heat[20, 20], heat[30, 35] = 9, 8, 10
    truth, where = np.zeros((40, 40), bool), np.ones((40, 40), bool)
    truth[18:23, 18:23] = truth[28:33, 33:38] = True
    where[:, 30:] = False  # the second lesion does not count, nor the heat there
    row, candidates = judge_heat(heat, truth, where, DetectSettings())
    np.testing.assert_allclose(candidates.lesion_scores, [8])
    np.testing.assert_allclose(candidates.false_scores, [9])
    assert row["pointing"] == 0
    assert row["iou"] == pytest.approx(1 / 26)  # one pixel of 25, and one beside
    assert row["lesion_precision"] == 0


def test_a_sure_decoder_still_ranks_its_candidates():
    y, x = np.ogrid[:300, :300]
    large = np.hypot(y - 100, x - 100) < 80
    small = np.hypot(y - 250, x - 250) < 15
    heat = np.where(large, 40 - np.hypot(y - 100, x - 100) / 4, np.where(small, 3.0, -20)).astype(np.float32)
    row, candidates = judge_heat(heat, large | small, np.ones_like(large), DetectSettings(max_false=1))
    assert candidates.lesion_scores.tolist() == [40, 3]  # as probabilities, 1 within 80 pixels of the first
    assert not candidates.false_scores.size
    assert row["dice"] == row["lesion_recall"] == 1


def test_small_lesions_are_not_asked_for():
    heat = np.full((40, 40), -5, np.float32)
    heat[5:8, 5:8], heat[20:30, 20:30] = 4, 6
    truth, where = heat > 0, np.ones((40, 40), bool)
    row, candidates = judge_heat(heat, truth, where, DetectSettings(min_area=20))
    assert (candidates.lesion_scores.tolist(), candidates.false_scores.tolist()) == ([6], [])
    assert row["dice"] == row["lesion_precision"] == row["auroc"] == 1


def test_rows_without_a_mask_are_left_out_on_demand(pictures):
    assert len(read_masked(pictures, pictures / "labels.csv")) == 8
    assert len(read_masked(pictures, pictures / "labels.csv", keep_empty=True)) == 16


def test_what_cannot_be_learned_is_said(pictures, small_encoder, tmp_path):
    with pytest.raises(DataError, match="nothing to tell apart"):
        run_detect(
            small_encoder,
            pictures,
            pictures / "labels.csv",
            settings=DetectSettings(source="tokens"),
            keep_empty=False,
        )
    table = tmp_path / "table.csv"
    table.write_text("filename,mask,split\n00.png,,test\n03.png,mask3.png,train\n02.png,,train\n")
    training = DenseTraining(epochs=1, head_width=8)
    with pytest.raises(DataError, match="no test image has a lesion"):
        run_detect(small_encoder, pictures, table, training=training)
