"""Masking of tiles: against the plain reference, and what it does to grey levels."""

from __future__ import annotations

import csv
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from frepa_dist.corruption import CorruptionConfig, corrupt
from frepa_dist.corruption.tiles import noise_masking, spread_tiles, tile_stats, zero_masking
from frepa_dist.draws import SampleDraws

_SPEC = importlib.util.spec_from_file_location(
    "corruption_reference", Path(__file__).parents[2] / "tools" / "corruption_reference.py"
)
reference: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)
R625 = {"tile_ratio": (0.625, 0.625)}


def histogram_distance(a: Tensor, b: Tensor, bins: int = 64) -> float:
    """Total variation between the grey levels of two images, in [0, 1]."""
    counts = [torch.histc(x.clamp(0, 1), bins, 0, 1) / x.numel() for x in (a, b)]
    return float((counts[0] - counts[1]).abs().sum() / 2)


@pytest.mark.parametrize(("size", "tile", "channels"), [(64, 16, 3), (64, 8, 1), (74, 16, 4), (50, 32, 3)])
def test_noise_masking_equals_the_reference_for_equal_draws(size: int, tile: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(size)
    images = torch.rand(2, channels, size, size, generator=generator)
    grid = -(-size // tile)
    mask = torch.rand(2, grid, grid, generator=generator) < 0.6
    noise = torch.randn(images.shape, generator=generator)
    expected = [
        reference.histogram_masking(
            image.double().numpy(),
            cells.numpy(),
            tile,
            lambda c, rows, columns, mean, std, z=z: mean + std * z[c, rows, columns].double().numpy(),
        )
        for image, cells, z in zip(images, mask, noise.clone(), strict=True)
    ]
    result = noise_masking(images, mask, noise, tile)
    np.testing.assert_allclose(result.numpy(), np.stack(expected), rtol=0, atol=3e-6)


@pytest.mark.parametrize(("size", "tile", "num", "offset"), [(48, 16, 3, 0), (40, 16, 4, 12), (40, 16, 3, 0)])
def test_cut_tiles_are_measured_by_the_pixels_they_have(size: int, tile: int, num: int, offset: int) -> None:
    images = torch.rand(2, 3, size, size)
    stats = tile_stats(images, tile, num=num, offset=offset)
    for i in range(num):
        for j in range(num):
            rows, columns = (slice(max(k * tile - offset, 0), (k + 1) * tile - offset) for k in (i, j))
            pixels = images[:, :, rows, columns].double()
            torch.testing.assert_close(stats.mean[..., i, j].double(), pixels.mean((2, 3)), rtol=0, atol=1e-6)
            deviation = pixels.std((2, 3), correction=0)
            torch.testing.assert_close(stats.std[..., i, j].double(), deviation, rtol=0, atol=1e-6)
    values = torch.arange(float(num * num)).view(1, num, num)
    spread = spread_tiles(values, tile, size, offset)
    for y, x in ((0, 0), (size - 1, 0), (size // 2, size - 1), (3, 17)):
        assert spread[0, y, x] == values[0, (y + offset) // tile, (x + offset) // tile]


def test_bright_flat_tiles_have_no_deviation() -> None:
    stats = tile_stats(torch.full((1, 1, 64, 64), 0.9), 16, num=4)
    assert stats.std.max() < 1e-6


def test_grey_levels_stay_under_noise_and_not_under_zero() -> None:
    """At a ratio of .625, on an image whose pixels vary normally around a smooth shape."""
    axis = torch.arange(512) / 512
    shape = 0.5 + 0.3 * torch.sin(7 * axis)[:, None] * torch.cos(5 * axis)
    noise = SampleDraws([1], "cpu").normal("image", (3, 512, 512))
    images = (shape + 0.05 * noise).clamp(0, 1)
    draws = SampleDraws([2], "cpu")
    equalized = corrupt(images, draws, CorruptionConfig(kinds={"histogram": 1}, **R625))
    zero = corrupt(images, draws, CorruptionConfig(kinds={"zero": 1}, **R625))
    assert torch.equal(equalized.hidden, zero.hidden)
    assert 0.5 < equalized.hidden.float().mean() < 0.75
    assert histogram_distance(images, equalized.images) < 0.008
    assert histogram_distance(images, zero.images) > 0.5
    assert equalized.images.mean() == pytest.approx(float(images.mean()), abs=1e-3)
    assert equalized.images.var() == pytest.approx(float(images.var()), rel=0.02)


@pytest.mark.real_data
def test_grey_levels_of_real_images_stay_far_better_under_noise() -> None:
    root = os.environ.get("FREPA_TEST_DATA")
    if not root:
        pytest.skip("FREPA_TEST_DATA names no folder of images")
    for folder in ("fundus/odir5k", "mri/brain_tumor_mri", "xray/covid19_nih", "histopathology/lc25000_lung"):
        with (Path(root) / folder / "labels.csv").open(newline="") as stream:
            name = next(csv.DictReader(stream))["filename"]
        with Image.open(Path(root) / folder / name) as image:
            pixels = np.array(image.convert("RGB").resize((512, 512), Image.Resampling.BICUBIC))
        clean = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        draws = SampleDraws([2], "cpu")
        equalized = corrupt(clean, draws, CorruptionConfig(kinds={"histogram": 1}, **R625)).images
        zero = corrupt(clean, draws, CorruptionConfig(kinds={"zero": 1}, **R625)).images
        assert histogram_distance(clean, equalized) < histogram_distance(clean, zero) / 4, folder


def test_zero_masking_sets_whole_tiles_to_zero_and_nothing_else() -> None:
    images = torch.rand(2, 3, 40, 40) + 0.1
    mask = torch.tensor([[[True, False], [False, True]], [[False, False], [True, False]]])
    result = zero_masking(images, mask, 32)
    assert (result[0, :, :32, :32] == 0).all()
    assert (result[0, :, 32:, 32:] == 0).all()
    assert (result[1, :, 32:, :32] == 0).all()
    assert (result == 0).sum() == 3 * (32 * 32 + 8 * 8 + 8 * 32)


def test_random_patches_hide_an_exact_share_of_patches() -> None:
    images = torch.rand(3, 3, 64, 64) + 0.1
    config = CorruptionConfig(kinds={"random_patches": 1}, patch=8, patch_ratio=0.75)
    result = corrupt(images, SampleDraws([1, 2, 3], "cpu"), config)
    patches = result.hidden.view(3, 8, 8, 8, 8)
    assert torch.equal(patches.amax((2, 4)), patches.amin((2, 4)))
    assert result.hidden.sum((1, 2, 3)).tolist() == [48 * 64] * 3
    assert (result.images[result.hidden.expand_as(images)] == 0).all()
    assert not torch.equal(result.hidden[0], result.hidden[1])
