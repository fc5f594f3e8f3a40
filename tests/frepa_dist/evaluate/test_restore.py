"""Restoration: what is degraded, how it is measured, and that a decoder undoes some of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.signal import convolve2d

from frepa_dist.evaluate.degrade import Degradation, crop_to_even, degrade, is_grey
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.restore import RestoreResult, image_measures, run_restore, train_restorer
from frepa_dist.evaluate.restore_head import RestoreHead, RestoreTraining
from shards.support.errors import ConfigError, DataError
from shards.support.settings import validate
from tests.commands import frepa


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[None], 3, axis=0)


def smooth_image(seed, shape=(72, 90), *, is_color=False):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 225, (9, 9, 3 if is_color else 1), dtype=np.uint8).squeeze()
    pixels = np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC))
    return pixels.transpose(2, 0, 1) if is_color else grey(pixels)


def test_noise_has_the_deviation_asked_for():
    flat = grey(np.full((256, 256), 128))
    noisy = degrade(flat, Degradation(noise_sd=0.05), 0, 0)
    assert np.std(noisy[0] / 255.0) == pytest.approx(0.05, rel=0.03)
    assert is_grey(noisy)
    assert (degrade(flat, Degradation(noise_sd=0.05), 0, 0) == noisy).all()
    assert (degrade(flat, Degradation(noise_sd=0.05), 0, 1) != noisy).any()
    counts = degrade(flat, Degradation(noise_sd=0, photons=400), 0, 0)
    assert np.std(counts[0] / 255.0) == pytest.approx(math.sqrt(128 / 255 / 400), rel=0.03)
    color = degrade(smooth_image(0, is_color=True), Degradation(), 0, 0)
    assert not is_grey(color)


def test_half_the_resolution_keeps_what_is_smooth_and_loses_what_is_fine():
    config = Degradation(task="super-resolution")
    flat = grey(np.full((16, 24), 77))
    assert (degrade(flat, config, 0, 0) == flat).all()
    stripes = grey(np.tile([0, 255], (32, 16)))
    inner = degrade(stripes, config, 0, 0)[:, 8:-8, 8:-8]
    assert np.abs(inner.astype(int) - 128).max() <= 2
    assert crop_to_even(np.zeros((3, 7, 10), np.uint8)).shape == (3, 6, 10)


def test_degradations_without_effect_are_refused():
    with pytest.raises(ConfigError, match="nothing to restore"):
        validate(Degradation, {"noise_sd": 0}, where="test")


def naive_ssim(x, y):
    """Wang et al. 2004, equation 13, with an explicit window of 11 x 11 pixels, inside the border."""
    axis = np.arange(-5, 6)
    window = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    x, y = x.astype(float), y.astype(float)

    def mean(z):
        return convolve2d(z, window, mode="valid")

    a, b = mean(x), mean(y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * a * b + c1) * (2 * (mean(x * y) - a * b) + c2)
    return float((top / ((a**2 + b**2 + c1) * (mean(x * x) - a**2 + mean(y * y) - b**2 + c2))).mean())


def test_measures_of_known_cases_and_of_the_published_formula():
    clean = smooth_image(1)
    shifted = image_measures((clean + 10).astype(np.uint8), clean)
    assert shifted["psnr"] == pytest.approx(20 * math.log10(255 / 10))
    assert shifted["rmse"] == pytest.approx(10 / 255)
    same = image_measures(clean, clean)
    assert math.isnan(same["psnr"])
    assert (same["ssim"], same["rmse"]) == (1, 0)
    noisy = degrade(clean, Degradation(), 0, 0)
    assert image_measures(noisy, clean)["ssim"] == pytest.approx(naive_ssim(noisy[0], clean[0]), abs=1e-6)
    color = smooth_image(2, is_color=True)
    noisy = degrade(color, Degradation(), 0, 0)
    channels = [naive_ssim(a, b) for a, b in zip(noisy, color, strict=True)]
    assert image_measures(noisy, color)["ssim"] == pytest.approx(np.mean(channels), abs=1e-6)


def test_at_first_a_skip_passes_the_degraded_image():
    head = RestoreHead(8, 4, RestoreTraining(skip=True, head_width=8), gives_range=True)
    seen = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    restored = head(torch.randn(2, 8, 4, 4), seen)
    torch.testing.assert_close(restored, seen / 255, atol=1e-5, rtol=0)


@pytest.mark.parametrize("skip", [False, True])
def test_the_range_that_an_encoder_takes_away_is_given_back(skip):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = RestoreHead(8, 4, RestoreTraining(skip=skip, head_width=8), gives_range=True)
        seen = torch.randint(0, 101, (1, 3, 16, 16)).float()
        maps = torch.randn(1, 8, 4, 4)
        head.standardize_by(seen)
    restored, darker = head(maps, seen), head(maps, 0.5 * seen + 40)
    torch.testing.assert_close(darker, 0.5 * restored + 40 / 255, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        pixels = smooth_image(number, is_color=number > 9)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{number:02d}.png")
    rows = [f"{number:02d}.png,{'test' if number % 4 == 0 else 'train'}" for number in range(12)]
    (folder / "labels.csv").write_text("filename,split\n" + "\n".join(rows))
    return folder


def test_a_decoder_with_a_skip_beats_the_degraded_image_and_the_page_shows_it(
    folder, small_encoder, tmp_path
):
    out, page = tmp_path / "result.json", tmp_path / "page.html"
    told = frepa(
        *("evaluate", "restore", small_encoder, folder, "--labels", folder / "labels.csv", "--out", out),
        *("--train", "skip=true", "--train", "head_width=16", "--train", "epochs=12", "--page", page),
        *("--train", "learning_rate=5e-3", "--train", "batch_size=4", "--noise-sd", "0.15"),
    )
    assert told.returncode == 0, told.stderr
    result = RestoreResult.model_validate_json(out.read_text())
    assert result.names == ["00.png", "04.png", "08.png"]
    assert result.num_train == 9
    assert result.mean["psnr"] > result.degraded["psnr"] + 2
    assert result.mean["ssim"] > result.degraded["ssim"]
    assert all(
        mine > its
        for mine, its in zip(result.by_image["psnr"], result.degraded_by_image["psnr"], strict=True)
    )
    assert "the degraded image" in told.stdout
    shown = page.read_text()
    assert shown.count("<img") == 9
    assert "median" in shown


def test_without_a_skip_the_image_goes_through_the_encoder(folder, make_backbone_run):
    run, _ = make_backbone_run("convnext_twin")
    training = RestoreTraining(epochs=8, head_width=32, learning_rate=1e-2, batch_size=4, max_images=5)
    result = run_restore(
        str(run), folder, degradation=Degradation(task="super-resolution"), training=training
    )
    assert (result.num_train, len(result.names)) == (5, 3)
    assert result.degradation.noise_sd == Degradation().noise_sd
    assert result.mean["psnr"] > 12  # the range and the mean of a tile alone give about that
    assert load_encoder(str(run), "cpu").min_max


def test_the_same_seed_gives_the_same_decoder(folder, small_encoder):
    encoder = load_encoder(small_encoder, "cpu")
    training = RestoreTraining(epochs=1, head_width=8, max_tiles=1)
    paths = sorted(folder.glob("0[12].png"))
    first, second = (train_restorer(encoder, paths, Degradation(), training) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_folder_of_one_image_cannot_be_split(tmp_path, small_encoder):
    Image.new("L", (64, 64)).save(tmp_path / "only.png")
    with pytest.raises(DataError, match="all in one part"):
        run_restore(small_encoder, tmp_path)
