"""The high-pass curve: tone is lost, the raw end is the plain probe, and a command writes it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from frepa_dist.evaluate.highpass import CUTOFFS, HighPassResult, high_pass, run_highpass
from frepa_dist.evaluate.probe import run_probe
from frepa_dist.evaluate.task import ProbeTask
from tests.commands import frepa

NUM = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Bright and dark images of one and the same texture: tone is all that tells them apart."""
    folder = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    for number in range(NUM):
        label = ("dark", "bright")[number % 2]
        (folder / label).mkdir(exist_ok=True)
        pixels = rng.normal(90 if label == "dark" else 150, 25, (64, 64))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / label / f"{number}.png")
    return folder


def test_what_stands_on_tone_falls_to_chance(folder, small_encoder, tmp_path):
    out, page = tmp_path / "result.json", tmp_path / "page.html"
    told = frepa(
        "evaluate", "high-pass", small_encoder, folder, "--cutoffs", "0,20", "--out", out, "--page", page
    )
    assert told.returncode == 0, told.stderr
    (data,) = json.loads(out.read_text())
    result = HighPassResult.model_validate(data)
    assert result.accuracy[0] == result.auroc[0] == 1
    assert result.accuracy[1] == pytest.approx(0.5, abs=0.2)
    assert result.chance == 0.5
    assert [sum(right) / len(right) for right in result.correct] == pytest.approx(result.accuracy)
    assert result.accuracy_low[1] <= result.accuracy[1] <= result.accuracy_high[1]
    assert "20 cycles" in told.stdout
    assert page.read_text().count("<svg") == 2
    probe = run_probe(small_encoder, ProbeTask(images=str(folder)))
    assert (result.auroc[0], result.num_train) == (probe.auroc.value, sum(probe.num_train))
    assert result.leakage.startswith("not checked")


def test_equal_images_are_on_one_side(folder, small_encoder, tmp_path):
    for path in folder.glob("*/*.png"):
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
        shutil.copy(path, copy.with_name(f"again-{path.name}"))
    result = run_highpass(small_encoder, ProbeTask(images=str(tmp_path), num_resamples=20), cutoffs=(0.0,))
    twins = {name.removeprefix("again-") for name in result.names}
    assert len(result.names) == 2 * len(twins) == 2 * len(set(result.groups))


def test_the_filter_is_the_published_one():
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert high_pass(images, 0.0) is images
    rho2 = np.add.outer(*(np.fft.fftfreq(32, 1 / 32) ** 2,) * 2)
    gain = 1 - np.exp(-rho2 / (2 * 5.0**2))
    expected = np.fft.ifft2(np.fft.fft2(images.numpy()) * gain).real
    np.testing.assert_allclose(high_pass(images, 5.0), expected, atol=1e-5)
    assert CUTOFFS == (0, 5, 10, 20, 30, 40, 50)


def test_encoders_stand_beside_each_other(folder, small_encoder):
    result = run_highpass(small_encoder, ProbeTask(images=str(folder), num_resamples=20), cutoffs=(0.0,))
    assert len(result.names) == 6
    told = frepa("evaluate", "high-pass", small_encoder, small_encoder, folder, "--cutoffs", "x")
    assert told.returncode == 2
    assert "--cutoffs" in told.stderr
