"""Corruption of the spectrum: against the plain reference, and what is left of coefficients and means."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from frepa_dist.corruption import CorruptionConfig, corrupt
from frepa_dist.corruption.batch import draw_frequency
from frepa_dist.corruption.frequency import FrequencyDraws, disc_pass, dual_component_masking
from frepa_dist.corruption.plan import Mode, plan_corruptions
from frepa_dist.draws import SampleDraws
from frepa_dist.spectrum import radial_frequency

_SPEC = importlib.util.spec_from_file_location(
    "corruption_reference", Path(__file__).parents[2] / "tools" / "corruption_reference.py"
)
reference: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)
MODES: tuple[Mode, ...] = ("published", "hermitian")


def whole_plane(half: NDArray[Any]) -> NDArray[Any]:
    """Lay out a half spectrum (C, S, W) whole and centered, (C, S, S), by its conjugate symmetry."""
    channels, size, _ = half.shape
    whole = np.zeros((channels, size, size), half.dtype)
    for y in range(size):
        for x in range(size):
            mine = 0 < x < size // 2 or (x in (0, size // 2) and y <= size // 2)
            whole[:, y, x] = half[:, y, x] if mine else np.conj(half[:, -y % size, -x % size])
    return np.fft.fftshift(whole, axes=(1, 2))


def own_mirrors(size: int) -> NDArray[np.bool_]:
    """Find the four bins of a centered spectrum that are their own mirror."""
    mask = np.zeros((size, size), bool)
    mask[:: size // 2, :: size // 2] = True
    return mask


def reference_fill(z: NDArray[Any], stds: NDArray[Any], cells: NDArray[Any], mode: Mode) -> NDArray[Any]:
    """Numbers for every bin of which the reference makes what ours makes of one number for k and -k.

    Of two bins with the deviations s and s' (zero where not masked), half the sum of s a and s' b has the
    deviation sqrt(s^2 + s'^2) / 2; with q = sqrt(s^2 + s'^2), a = z s / q and b = z s' / q give z times that.
    """
    if mode == "hermitian":
        return z
    here = stds * cells
    there = np.roll(np.flip(here, (1, 2)), 1, (1, 2))
    both = np.sqrt(here**2 + there**2)
    shared = z * here / np.where(both > 0, both, 1)
    return np.where(own_mirrors(z.shape[-1]), z, shared)


def reference_masking(image: Tensor, draws: FrequencyDraws, i: int, cell: int, mode: Mode) -> NDArray[Any]:
    """Run the plain reference on one image with the draws that ours has."""
    pixels, size = image.double().numpy(), image.shape[-1]
    noise = draws.noise[i].double().numpy()
    parts = noise[..., 0] + (1j * noise[..., 1] if mode == "hermitian" else 0)
    spread = whole_plane(parts) / math.sqrt(2)
    spread = np.where(own_mirrors(size), spread.real * math.sqrt(2), spread)
    cuts = reference.edges(size, cell, centered=True)
    stds, cells = np.zeros(pixels.shape), np.zeros((size, size), bool)
    for y, rows in enumerate(cuts):
        for x, columns in enumerate(cuts):
            stds[:, rows, columns] = pixels[:, rows, columns].std(axis=(1, 2), keepdims=True)
            cells[rows, columns] = draws.cells[i, y, x]
    z = np.zeros(pixels.shape)
    if draws.fill is not None:
        z = reference_fill(whole_plane(draws.fill[i].double().numpy()), stds, cells, mode)

    def fill(c: int, rows: slice, columns: slice, mean: float, std: float) -> Any:
        return mean + std * z[c, rows, columns] if draws.fill is not None else 0

    result: NDArray[Any] = reference.frequency_masking(
        pixels,
        draws.cells[i].numpy(),
        cell,
        float(draws.strength[i]),
        float(draws.width[i]),
        fill=fill,
        noise=spread,
        hermitian=mode == "hermitian",
    )
    return result


def prepare(
    images: Tensor, mode: Mode, **settings: Any
) -> tuple[CorruptionConfig, FrequencyDraws, FrequencyDraws]:
    """Draw twice the same: ours uses the noise up."""
    config = CorruptionConfig.model_validate({"kinds": {"frequency": 1.0}, "mode": mode, **settings})
    draws = SampleDraws(range(len(images)), "cpu")
    plans = plan_corruptions(draws, config, images.shape[-1])
    once, again = (draw_frequency(plans, draws, images.shape[1:], config) for _ in range(2))
    return config, once, again


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fill", ["tile", "zero"])
@pytest.mark.parametrize(("size", "cell", "channels"), [(64, 16, 3), (64, 8, 1), (50, 8, 4), (36, 6, 2)])
def test_masking_equals_the_reference_for_equal_draws(
    mode: Mode, fill: str, size: int, cell: int, channels: int
) -> None:
    images = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(size))
    settings = {"cell": cell, "fill": fill, "noise_strength": 1e-2 * size / 512}
    config, draws, same = prepare(images, mode, **settings)
    expected = np.stack([reference_masking(images[i], same, i, cell, mode) for i in range(2)])
    result = dual_component_masking(images, draws, cell, config.mode)
    assert np.abs(expected - images.numpy()).max() > 0.1
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=5e-6)


def test_the_reference_with_its_own_draws_spreads_as_ours() -> None:
    """In mode `published` ours draws one number for k and -k; the authors draw two and lose half."""
    np.random.seed(0)  # noqa: NPY002 (the reference draws like the authors)
    size, cell = 64, 16
    image = torch.rand(1, size, size, generator=torch.Generator().manual_seed(1))
    cells = np.random.default_rng(0).random((4, 4)) < 0.6
    cells[1:3, 1:3] = False
    fields = {"cells": torch.from_numpy(cells)[None].expand(300, -1, -1)}
    fields |= {"strength": torch.full((300,), 5e-3), "width": torch.full((300,), 0.2)}
    draws = SampleDraws(range(300), "cpu")
    half = (1, size, size // 2 + 1)
    numbers = FrequencyDraws(
        **fields, noise=draws.normal("noise", (*half, 1)), fill=draws.normal("fill", half)
    )
    ours = dual_component_masking(image.expand(300, 1, -1, -1), numbers, cell, "published")
    theirs = np.stack(
        [reference.frequency_masking(image.double().numpy(), cells, cell, 5e-3, 0.2) for _ in range(300)]
    )
    spectra = [np.fft.fft2(x) for x in (ours.double().numpy(), theirs)]
    np.testing.assert_allclose(*(s.mean(0) for s in spectra), rtol=0, atol=5 * 6.5 / 300**0.5)
    powers = [np.abs(s - s.mean(0)).__pow__(2).mean(0)[0] for s in spectra]
    powers = [p[p > 1e-6 * p.max()] for p in powers]
    assert powers[0].mean() == pytest.approx(powers[1].mean(), rel=0.02)
    ratio = powers[0] / powers[1]
    assert np.abs(np.log(ratio)).max() < 0.7  # chi-squared of 300: a deviation of .08 to .12 each
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.01)


def shares(mode: Mode, num: int = 24) -> dict[float, float]:
    """Corrupt images at a ratio of .625 without noise; which share of coefficients is kept by how much.

    Measured on the spectra of the corrupted real images, outside the cells around zero frequency.
    """
    images = torch.rand(num, 1, 512, 512, generator=torch.Generator().manual_seed(0))
    config = CorruptionConfig(
        kinds={"frequency": 1},
        mode=mode,
        fill="zero",
        cell_ratio=(0.625, 0.625),
        noise_strength=0,
        noise_strength_std=0,
    )
    result = corrupt(images, SampleDraws(range(num), "cpu"), config).images
    gain = (torch.fft.fft2(result.double()) / torch.fft.fft2(images.double())).real
    gain = torch.fft.fftshift(gain, dim=(-2, -1))
    assert (gain[..., 241:272, 241:272] - 1).abs().max() < 0.05
    outside = torch.ones(512, 512, dtype=torch.bool)
    outside[239:273, 239:273] = False
    gain = gain[..., outside]
    counted = {level: ((gain - level).abs() < 0.1).double().mean().item() for level in (0.0, 0.5, 1.0)}
    assert sum(counted.values()) > 0.999
    return counted


def test_the_published_mode_halves_47_percent_and_leaves_14_percent_whole() -> None:
    counted = shares("published")
    assert counted[0.5] == pytest.approx(2 * 0.625 * 0.375, abs=0.01)
    assert counted[1.0] == pytest.approx(0.375**2, abs=0.01)
    assert counted[0.0] == pytest.approx(0.625**2, abs=0.01)


def test_the_hermitian_mode_keeps_a_coefficient_whole_or_masks_it() -> None:
    counted = shares("hermitian")
    assert counted[0.5] == 0
    assert counted[1.0] == pytest.approx(0.375, abs=0.01)
    assert counted[0.0] == pytest.approx(0.625, abs=0.01)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fill", ["tile", "zero"])
def test_the_mean_of_each_channel_stays(mode: Mode, fill: str) -> None:
    images = torch.rand(4, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    images *= torch.tensor([0.2, 1.0, 0.6])[:, None, None]
    config, draws, _ = prepare(images, mode, fill=fill, noise_strength=1e-2)
    result = dual_component_masking(images, draws, config.cell, mode)
    torch.testing.assert_close(result.mean((2, 3)), images.mean((2, 3)), rtol=0, atol=1e-6)
    assert (result - images).abs().mean() > 0.1


@pytest.mark.parametrize(("mode", "share"), [("hermitian", 1.0), ("published", 0.5**0.5)])
@pytest.mark.parametrize("size", [128, 512])
def test_the_perturbation_in_pixels_is_as_strong_as_derived(mode: Mode, share: float, size: int) -> None:
    """On a flat image, whose spectrum is S^2 mean at zero frequency, with nothing masked.

    Noise of deviation s S^2 mean g(k) at each bin has, after the inverse transform, the variance
    (s mean)^2 sum g^2 in the pixels; the real part of what is not symmetric keeps half of that. The sum is
    near pi (d S)^2 while little of the envelope is cut: the deviation in pixels is s mean d S sqrt(pi), and s
    goes with 512 / S.
    """
    config = CorruptionConfig(
        kinds={"frequency": 1}, mode=mode, cell_ratio=(0, 0), noise_strength_std=0, noise_width=(0.2, 0.2)
    )
    images = torch.full((4, 3, size, size), 0.4)
    images[:, 0] = 0.1  # the strength is that of the strongest channel, in all
    result = corrupt(images, SampleDraws(range(4), "cpu"), config).images
    axis = torch.fft.fftfreq(size, dtype=torch.float64)
    envelope = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 0.2**2))
    strength = 5e-4 * 512 / size
    expected = strength * 0.4 * math.sqrt(float(envelope.square().sum()) - 1) * share
    noise = (result - images).std((2, 3), correction=0)
    torch.testing.assert_close(noise, torch.full_like(noise, expected), rtol=0.04, atol=0)
    assert expected == pytest.approx(5e-4 * 0.4 * 0.2 * 512 * math.sqrt(math.pi) * share, rel=0.03)


def test_hermitian_noise_has_no_symmetry_in_the_pixels_and_published_noise_has() -> None:
    """Real noise on the spectrum is the same at x and -x; that is how the authors' perturbation looks."""
    images = torch.full((1, 1, 128, 128), 0.5)
    for mode, low, high in (("published", 0.999, 1.001), ("hermitian", -0.1, 0.1)):
        config = CorruptionConfig(kinds={"frequency": 1}, mode=mode, cell_ratio=(0, 0))
        noise = corrupt(images, SampleDraws([4], "cpu"), config).images[0, 0] - 0.5
        mirrored = noise.flip(0, 1).roll((1, 1), (0, 1))
        assert low < torch.corrcoef(torch.stack([noise.flatten(), mirrored.flatten()]))[0, 1] < high


@pytest.mark.parametrize(("size", "radius"), [(64, 16), (50, 7.5)])
def test_discs_cut_the_spectrum_in_two(size: int, radius: float) -> None:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    low, high = (disc_pass(images, radius, keep) for keep in ("low", "high"))
    torch.testing.assert_close(low + high, images, rtol=0, atol=1e-5)
    inside = radial_frequency(size) < radius
    for passed, kept in ((low, inside), (high, ~inside)):
        spectrum, whole = torch.fft.fft2(passed), torch.fft.fft2(images)
        torch.testing.assert_close(spectrum[..., kept], whole[..., kept], rtol=0, atol=1e-2)
        assert spectrum[..., ~kept].abs().max() < 1e-2
