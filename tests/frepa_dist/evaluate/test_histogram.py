"""Shifts of histograms: closed cases, numpy's histograms, and the command."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from frepa_dist.evaluate.histogram import (
    HistogramConfig,
    HistogramResult,
    histograms,
    run_histogram,
    total_variation,
)
from tests.commands import frepa


def test_total_variation_of_known_distributions():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    q = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(total_variation(p, q), torch.tensor([0.25, 1.0]))
    assert float(total_variation(p, p).sum()) == 0


def test_histograms_are_those_of_numpy_with_what_lies_outside():
    images = 0.5 + 0.4 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, :3] = torch.tensor([0.0, 1.0, 0.5])
    found = histograms(images, 16)
    assert found.shape == (2, 3, 18)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 3))
    edges = [-np.inf, *np.arange(17) / 16, np.inf]
    for i in range(2):
        for c in range(3):
            values = images[i, c].numpy().ravel()
            counts, _ = np.histogram(np.where(values == 1, 0.99, values), np.array(edges))
            np.testing.assert_allclose(found[i, c].numpy(), counts / 1024)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise of one mean and deviation in every tile, no level of 0."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = np.clip(rng.normal(128, 12, (128, 128)), 40, 220).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_zero_masking_shifts_what_it_masks_and_noise_hardly_anything(folder, tmp_path):
    out, page = tmp_path / "result.json", tmp_path / "page.html"
    told = frepa(
        *("evaluate", "histogram", folder, "--size", 128, "--bins", 24, "--modality", "oct"),
        *("--out", out, "--page", page),
    )
    assert told.returncode == 0, told.stderr
    result = HistogramResult.model_validate_json(out.read_text())
    by_name = {row.corruption: row for row in result.rows}
    noise, zero = by_name["62.5% of tiles as noise"], by_name["62.5% of tiles zero"]
    # 4 x 4 tiles: the share that was masked is a multiple of 1 / 16; of the smallest level there is little
    for value in zero.by_image:
        assert value * 16 == pytest.approx(round(value * 16), abs=0.05)
    assert noise.mean < 0.05 < 0.3 < zero.mean
    assert noise.low <= noise.mean <= noise.high
    # the histogram of all together is the mean of those of each
    assert zero.pooled == pytest.approx(zero.mean, abs=0.01)
    assert sum(noise.after) == pytest.approx(1)
    assert "62.5% of tiles zero" in told.stdout
    shown = page.read_text()
    assert (shown.count("<img"), shown.count("<svg")) == (6, 1)


def test_the_seed_decides_what_is_masked(folder):
    first, again, other = (
        run_histogram(folder, config=HistogramConfig(image_size=64, num=2, seed=seed), num_resamples=10)
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first.rows[1].by_image != other.rows[1].by_image
