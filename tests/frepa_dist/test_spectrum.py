"""Filters and spectra against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from frepa_dist.spectrum import (
    gaussian_high_pass,
    gaussian_low_pass,
    high_band_share,
    radial_power_spectrum,
)


def wave(size: int, cycles_y: int, cycles_x: int) -> torch.Tensor:
    axis = torch.arange(size, dtype=torch.float64) / size
    return torch.cos(2 * math.pi * (cycles_y * axis[:, None] + cycles_x * axis[None, :]))


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("cycles", [(0, 4), (3, 4), (-5, 2)])
def test_a_wave_is_scaled_by_the_gain_at_its_frequency(size, cycles):
    image = wave(size, *cycles)[None, None]
    cutoff = 6.0
    gain = math.exp(-(cycles[0] ** 2 + cycles[1] ** 2) / (2 * cutoff**2))
    torch.testing.assert_close(gaussian_low_pass(image, cutoff), gain * image)
    torch.testing.assert_close(gaussian_high_pass(image, cutoff), (1 - gain) * image)


def test_high_pass_removes_the_mean_and_the_two_parts_add_up():
    image = torch.rand(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5
    high = gaussian_high_pass(image, 3.0)
    assert high.mean(dim=(-2, -1)).abs().max() < 1e-12
    torch.testing.assert_close(high + gaussian_low_pass(image, 3.0), image)


def test_a_cutoff_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        gaussian_low_pass(torch.zeros(1, 1, 4, 4), 0.0)


def test_spectrum_equals_a_loop_over_the_bins():
    size = 12
    image = torch.rand(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    power = (torch.fft.fft2(image) / size**2).abs() ** 2
    rings: dict[int, list[float]] = {}
    for y in range(size):
        for x in range(size):
            fy, fx = (y if y <= size // 2 else y - size), (x if x <= size // 2 else x - size)
            rings.setdefault(round(math.hypot(fy, fx)), []).append(float(power[y, x]))
    expected = [sum(rings[r]) / len(rings[r]) for r in range(size // 2 + 1)]
    torch.testing.assert_close(radial_power_spectrum(image), torch.tensor(expected, dtype=torch.float64))


def test_spectrum_keeps_leading_dimensions():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    spectra = radial_power_spectrum(images)
    assert spectra.shape == (2, 3, 9)
    torch.testing.assert_close(spectra[1, 2], radial_power_spectrum(images[1, 2]))


def test_high_band_share_of_two_waves_and_of_a_flat_image():
    image = 3 + 2 * wave(32, 0, 3) + 1 * wave(32, 8, 6)
    torch.testing.assert_close(high_band_share(image, 9.5), torch.tensor(0.2, dtype=torch.float64))
    assert high_band_share(torch.full((50, 50), 7.0), 2.0) == 0
    assert high_band_share(torch.zeros(24, 24), 2.0) == 0
