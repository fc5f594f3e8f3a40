"""Filters and spectra against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from frepa_dist.spectrum import (
    decay_gains,
    disc_low_pass,
    energy_kept,
    gaussian_high_pass,
    gaussian_low_pass,
    half_spectrum_counts,
    high_band_error,
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


def test_a_disc_keeps_what_lies_in_it():
    inside, outside = wave(32, 3, 4), wave(32, 4, 4)  # rho of 5 and of 5.7
    image = 2 + inside + outside
    torch.testing.assert_close(disc_low_pass(image, 5.0), 2 + inside)
    torch.testing.assert_close(disc_low_pass(wave(33, 3, 4), 5.0), wave(33, 3, 4))


def test_high_band_error_is_the_share_of_detail_that_is_missing():
    images = torch.rand(3, 2, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    pred = images + torch.rand(3, 2, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    errors = high_band_error(pred, images, 4.0)
    for error, own, target in zip(errors, pred, images, strict=True):
        missing = gaussian_high_pass((own - target)[None], 4.0).square().mean().sqrt()
        torch.testing.assert_close(
            error, missing / gaussian_high_pass(target[None], 4.0).square().mean().sqrt()
        )
    tone = images.mean(dim=(-2, -1), keepdim=True).expand_as(images)
    torch.testing.assert_close(high_band_error(tone, images, 4.0), torch.ones(3, dtype=torch.float64))
    assert not high_band_error(images.float(), images.float(), 4.0).any()


def test_high_band_error_of_a_flat_target_is_not_a_number():
    images = torch.rand(2, 3, 50, 50, generator=torch.Generator().manual_seed(5))
    images[0] = 0.7
    assert high_band_error(images.flip(0), images, 4.0).isnan().tolist() == [True, False]
    images[0, 0, 3, 3] += 1 / 255  # one pixel by one grey level is detail
    assert not high_band_error(images.flip(0), images, 4.0).isnan().any()


def test_the_e_folding_radius_is_root_two_of_the_cutoff():
    gains = decay_gains(16, (3.0, 5.0), torch.device("cpu"), torch.float64)
    assert gains.shape == (2, 16, 9)
    assert float(gains[1, 3, 4]) == pytest.approx(math.exp(-1))  # rho = 5
    image = torch.rand(1, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    by_gain = torch.fft.irfft2(torch.fft.rfft2(image) * gains[0], s=(16, 16))
    torch.testing.assert_close(gaussian_low_pass(image, 3 / math.sqrt(2)), by_gain)


@pytest.mark.parametrize("size", [8, 9])
def test_columns_of_the_half_spectrum_count_for_the_whole(size):
    image = torch.rand(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    half = torch.fft.rfft2(image).abs().square() * half_spectrum_counts(
        size, torch.device("cpu"), torch.float64
    )
    torch.testing.assert_close(half.sum(), torch.fft.fft2(image).abs().square().sum())


def test_energy_kept_is_that_of_the_high_band_alone():
    low, high = wave(32, 0, 3), wave(32, 8, 6)
    image = (3 + 2 * low + high).float()[None, None]
    restored = (7 + 5 * low + 0.5 * high).float()[None, None]
    torch.testing.assert_close(energy_kept(restored, image, 9.5), torch.tensor([0.25]))
    flat = torch.full((1, 1, 32, 32), 7.0)
    assert energy_kept(image, flat, 9.5).isnan().all()
    torch.testing.assert_close(energy_kept(flat, image, 9.5), torch.zeros(1))


def test_energy_kept_is_of_the_squares_that_count_and_of_odd_sides_too():
    images = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(3))
    restored = images * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(energy_kept(restored, images, 1.0, weight), torch.tensor([1.0, 4.0]))
    varying = (images - images.mean(dim=(-2, -1), keepdim=True)).square().sum(dim=(1, 2, 3))
    between = (2 * images - 2 * images.mean(dim=(-2, -1), keepdim=True)).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(energy_kept(2 * images, images, 1e-9), between / varying)
