"""The fourth input channel against the definition of the HF response and a plain Frangi filter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter

from frepa_dist.models.response import (
    InputChannelConfig,
    append_input_channel,
    high_frequency_response,
    vesselness,
)
from shards.hf.tokens import HFParams, hf_response_reference

KINDS = [InputChannelConfig(kind="response"), InputChannelConfig(kind="frangi", scales=(0.03, 0.05))]


def images(batch=3, size=48, dtype=torch.float32):
    """Smooth images with lines and noise in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 6, 6, generator=generator, dtype=dtype)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    smooth[:, :, size // 3 : size // 3 + 2] += 0.5
    smooth[:, :, :, size // 2 : size // 2 + 3] -= 0.4
    noise = 0.02 * torch.rand(batch, 3, size, size, generator=generator, dtype=dtype)
    return (smooth + noise).clamp(0, 1)


@pytest.mark.parametrize("size", [48, 49])
def test_the_response_is_the_definitions_filter(size):
    green = images(size=size, dtype=torch.float64)[:, 1]
    config = InputChannelConfig(background_sigma=0.05, cutoff_cycles=11, order=3)
    params = HFParams(fov="none", frame_taper=0, background_sigma=0.05, cutoff_cycles=11, order=3)
    expected = np.stack([hf_response_reference(one.numpy(), params) for one in green])
    np.testing.assert_allclose(high_frequency_response(green, config).numpy(), expected, atol=1e-12)
    low = high_frequency_response(green.float(), config).double().numpy()
    np.testing.assert_allclose(low, expected, atol=1e-5)


def plain_vesselness(image, sigmas, beta=0.5, share=0.5):
    best = np.zeros_like(image)
    for sigma in sigmas:
        yy, xx, yx = (
            gaussian_filter(image, sigma, order=order, mode="wrap", truncate=8)
            for order in ((2, 0), (0, 2), (1, 1))
        )
        hessian = np.stack([np.stack([yy, yx], -1), np.stack([yx, xx], -1)], -2)
        values = np.abs(np.linalg.eigvalsh(hessian))
        a, b = values.min(-1), values.max(-1)
        norm = np.hypot(a, b)
        c = share * norm.max()
        found = np.exp(-((a / b) ** 2) / (2 * beta**2)) * (1 - np.exp(-(norm**2) / (2 * c**2)))
        best = np.maximum(best, found)
    return best


def test_vesselness_equals_a_filter_in_space():
    size, sigmas = 48, (2.0, 3.0)
    green = images(size=size, dtype=torch.float64)[:, 1]
    config = InputChannelConfig(kind="frangi", scales=tuple(sigma / size for sigma in sigmas), beta=0.7)
    expected = np.stack([plain_vesselness(one.numpy(), sigmas, beta=0.7) for one in green])
    np.testing.assert_allclose(vesselness(green, config).numpy(), expected, atol=1e-6)


def test_vesselness_finds_bright_and_dark_lines_and_no_blob():
    axis = torch.arange(64, dtype=torch.float64)
    line = torch.exp(-((axis[:, None] - 20) ** 2) / 8).expand(64, 64)
    blob = torch.exp(-((axis[:, None] - 44) ** 2 + (axis[None] - 32) ** 2) / 8)
    config = InputChannelConfig(kind="frangi", scales=(2 / 64,))
    found = vesselness(torch.stack([line + blob, 1 - line - blob]), config)
    torch.testing.assert_close(found[0], found[1])
    assert found[0, 20, 5] > 0.5
    assert found[0, 44, 32] < 0.5 * found[0, 20, 5]
    assert found[0, 5, 5] < 1e-3


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_the_channel_is_appended_with_unit_spread_for_each_image(config):
    batch = images()
    extended = append_input_channel(batch, config)
    assert extended.shape == (3, 4, 48, 48)
    assert torch.equal(extended[:, :3], batch)
    channel = extended[:, 3]
    torch.testing.assert_close(channel.mean(dim=(1, 2)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(channel.square().mean(dim=(1, 2)), torch.ones(3))
    alone = append_input_channel(batch[1:2], config)
    torch.testing.assert_close(alone[0], extended[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_it_does_not_matter_whether_images_are_normalized(config):
    batch = images(dtype=torch.float64)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    normalized = append_input_channel((batch - mean) / std, config)
    torch.testing.assert_close(normalized[:, 3], append_input_channel(batch, config)[:, 3])
    turned = append_input_channel(batch.transpose(2, 3), config)
    torch.testing.assert_close(turned[:, 3], append_input_channel(batch, config)[:, 3].transpose(1, 2))


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_flat_images_have_none(config):
    batch = torch.tensor([0.0, 0.3, 1.0]).view(3, 1, 1, 1).expand(3, 3, 50, 50).clone()
    assert not append_input_channel(batch, config)[:, 3].any()
    assert not append_input_channel((batch - 0.456) / 0.224, config)[:, 3].any()
    batch[:, :, 20] += 1 / 255  # the faintest line there can be
    assert append_input_channel(batch, config)[:, 3].any(dim=2).any(dim=1).all()


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_half_precision_is_filtered_in_full(config):
    batch = images().bfloat16()
    channel = append_input_channel(batch, config)
    assert channel.dtype == torch.bfloat16
    assert torch.equal(channel[:, 3], append_input_channel(batch.float(), config)[:, 3].bfloat16())


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_the_first_use_may_be_an_evaluation(config):
    batch = images(size=34)  # a size of its own
    with torch.inference_mode():
        expected = append_input_channel(batch, config)
    trained = append_input_channel(batch.requires_grad_(), config)
    trained.square().sum().backward()
    assert torch.equal(trained.detach(), expected)
    assert batch.grad.isfinite().all()


@pytest.mark.parametrize("scales", [(), (0.0,), (0.1, -0.1), (0.5,), (math.nan,)])
def test_scales_that_cannot_be(scales):
    with pytest.raises(ValidationError, match="scale"):
        InputChannelConfig(kind="frangi", scales=scales)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_the_green_channel_alone_counts(config):
    batch = images()
    expected = append_input_channel(batch, config)[:, 3]
    other = batch.clone()
    other[:, [0, 2]] = images(batch=6)[3:, [0, 2]]
    assert torch.equal(append_input_channel(other, config)[:, 3], expected)
    assert not torch.allclose(append_input_channel(batch.roll(1, dims=1), config)[:, 3], expected, atol=0.1)
