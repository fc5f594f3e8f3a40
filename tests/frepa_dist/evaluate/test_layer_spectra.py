"""Relative log-amplitude: closed cases, the authors' way written out, and a whole run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from frepa_dist.evaluate.layer_spectra import SpectraResult, relative_log_amplitude
from tests.commands import frepa


def test_a_checkerboard_on_a_ground():
    rows = torch.arange(8)
    board = 1 - 2 * ((rows[:, None] + rows[None, :]) % 2).float()
    found = relative_log_amplitude((4 + 0.5 * board)[None, None])
    assert found.shape == (1, 5)
    assert float(found[0, 0]) == 0
    assert float(found[0, 4]) == pytest.approx(math.log(0.5 / 4), abs=1e-5)
    assert float(found[0, 2]) < -15  # nothing there but what is added before the logarithm


@pytest.mark.parametrize("side", [7, 8])
def test_equals_the_way_of_the_authors(side):
    maps = torch.randn(3, 5, side, side, generator=torch.Generator().manual_seed(0)) + 2
    found = relative_log_amplitude(maps).numpy()
    logs = np.log(np.abs(np.fft.fft2(maps.numpy())) + 1e-6)
    shifted = np.fft.fftshift(logs, axes=(-2, -1)).mean(axis=1)  # zero frequency in the middle
    half = np.stack([np.diag(image)[side // 2 :] for image in shifted])
    half = half - half[:, :1]
    np.testing.assert_allclose(found[:, : half.shape[1]], half, atol=1e-4)


def test_blur_lowers_and_sharpening_raises_high_frequencies():
    maps = torch.rand(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = (maps + maps.roll(1, -1) + maps.roll(1, -2) + maps.roll((1, 1), (-1, -2))) / 4
    plain, low, high = (
        relative_log_amplitude(values)[:, -1].mean() for values in (maps, blurred, 2 * maps - blurred)
    )
    assert low < plain < high


def test_every_layer_of_a_hierarchical_backbone(make_backbone_run, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    run, _ = make_backbone_run("swin_pico")
    out, page = tmp_path / "result.json", tmp_path / "page.html"
    told = frepa("evaluate", "layer-spectra", run, tmp_path, "--num", 3, "--out", out, "--page", page)
    assert told.returncode == 0, told.stderr
    result = SpectraResult.model_validate_json(out.read_text())
    assert [row.side for row in result.rows] == [16, 16, 8, 4, 4, 2, 2]
    for row in result.rows:
        assert (row.frequencies[0], row.frequencies[-1], row.amplitude[0]) == (0, 1, 0)
        assert row.amplitude[-1] == pytest.approx(np.mean(row.by_image))
        assert row.low <= row.amplitude[-1] <= row.high
        assert row.layer in told.stdout
    assert page.read_text().count("<svg") == 2
