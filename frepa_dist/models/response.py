"""A fourth input channel: where the fine detail of an image is, computed from the very image it is added to.

Two kinds, both from the green channel (the second one; of a grey image all three are alike), both scaled to
unit spread in each image, and both blind to a change of that channel's level and contrast, so that it does
not matter whether images are normalized yet:

- `response`: the filter that the high-frequency (HF) tokens are scored with, (1 - Gaussian) x Butterworth
  high-pass as one multiplier, periodic (RetMAE, ICLR 2026, its ablation "HF input"). The field of view is
  not looked for here: the rim of a fundus image responds, too.
- `frangi`: vesselness (Frangi et al., MICCAI 1998), bright and dark ridges alike.

A filter looks around: in a masked autoencoder the channel of a visible patch also depends on what lies within
a filter's reach in the masked patches beside it. Where an image is corrupted as a whole, it must be computed
from the corrupted image; from the clean one it would give the answer away.

Shapes: B batch, S image side, s number of scales.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from frepa_dist.spectrum import check_images, is_traced
from shards.support.settings import Settings

FLAT = 1e-5  # of the channel's level: less is rounding, far below one grey level of 255


class InputChannelConfig(Settings):
    """How the fourth channel is computed. No public source states the lengths.

    Attributes:
        kind: `response` or `frangi`.
        background_sigma: `response`: of the Gaussian background that is subtracted, as a share of S.
        cutoff_cycles: `response`: of the Butterworth high-pass, in cycles per S.
        order: `response`: of the Butterworth high-pass.
        scales: `frangi`: standard deviations of the Gaussian derivatives, as shares of S; the strongest
            answer counts.
        beta: `frangi`: sensitivity to blobs; 0.5 as published.
        structureness: `frangi`: sensitivity to weak structure, as a share of the largest norm of the Hessian
            in the image; 0.5 as published.
    """

    kind: Literal["response", "frangi"] = "response"
    background_sigma: float = Field(0.04, gt=0, le=1)
    cutoff_cycles: float = Field(13.4, gt=0)
    order: int = Field(2, ge=1, le=8)
    scales: tuple[float, ...] = (0.004, 0.008, 0.012)
    beta: float = Field(0.5, gt=0)
    structureness: float = Field(0.5, gt=0)

    @field_validator("scales")
    @classmethod
    def _check_scales(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if not scales or not all(0 < scale <= 0.25 for scale in scales):
            raise ValueError("give at least one scale, each above 0 and at most 0.25")
        return scales


def append_input_channel(images: Tensor, config: InputChannelConfig) -> Tensor:
    """Append the fourth channel.

    Args:
        images: (B, 3, S, S), normalized or not, any float dtype.
        config: which channel.

    Returns:
        (B, 4, S, S) in the images' dtype; the channel is computed in float32 (float64 stays) and is 0 for an
        image without any detail.
    """
    compute = high_frequency_response if config.kind == "response" else vesselness
    with torch.autocast(images.device.type, enabled=False):
        green = images[:, 1].to(torch.promote_types(images.dtype, torch.float32))
        channel = _standardize(compute(green, config), green)
    return torch.cat([images, channel[:, None].to(images.dtype)], dim=1)


def high_frequency_response(channel: Tensor, config: InputChannelConfig) -> Tensor:
    """Filter (B, S, S) by (1 - Gaussian) x Butterworth -> (B, S, S), as `shards.hf.tokens` defines it."""
    size = check_images(channel)
    gain = _filters(size, config, channel.device, channel.dtype)[0]
    response: Tensor = torch.fft.irfft2(torch.fft.rfft2(_centered(channel)) * gain, s=(size, size))
    return response


def vesselness(channel: Tensor, config: InputChannelConfig) -> Tensor:
    """Largest vesselness over all scales of (B, S, S) -> (B, S, S) in [0, 1].

    With the Hessian's eigenvalues |a| <= |b|: exp(-(a / b)^2 / (2 beta^2)) (1 - exp(-(a^2 + b^2) / (2 c^2))),
    c the share `structureness` of the largest norm sqrt(a^2 + b^2) in the image at that scale.
    """
    size = check_images(channel)
    spectrum = torch.fft.rfft2(_centered(channel))
    flat = FLAT * channel.abs().amax(dim=(-2, -1), keepdim=True)
    best = torch.zeros_like(channel)
    filters = _filters(size, config, channel.device, channel.dtype)
    # scale by scale: three images at a time
    for derivatives in filters.reshape(-1, 3, *filters.shape[1:]):
        yy, xx, yx = torch.fft.irfft2(spectrum[:, None] * derivatives, s=(size, size)).unbind(1)
        middle, half = (yy + xx) / 2, torch.hypot((yy - xx) / 2, yx)
        small, large = (middle.abs() - half).abs(), middle.abs() + half  # |a| and |b|
        norm2 = small.square() + large.square()
        peak = norm2.amax(dim=(-2, -1), keepdim=True)
        tiny = torch.finfo(channel.dtype).tiny
        ratio2 = (small / large.clamp_min(tiny)).square()
        structure = 1 - torch.exp(-norm2 / (2 * config.structureness**2 * peak).clamp_min(tiny))
        found = torch.exp(-ratio2 / (2 * config.beta**2)) * structure
        best = torch.maximum(best, torch.where(peak > flat.square(), found, 0.0))
    return best


def _centered(channel: Tensor) -> Tensor:
    """Take the mean away: the filters are blind to it, and its rounding is not detail."""
    return channel - channel.mean(dim=(-2, -1), keepdim=True)


def _standardize(values: Tensor, channel: Tensor) -> Tensor:
    """Give each map (B, S, S) mean 0 and standard deviation 1; 0 where it varies by no more than rounding."""
    values = _centered(values)
    spread = values.square().mean(dim=(-2, -1), keepdim=True).sqrt()
    level = channel.abs().amax(dim=(-2, -1), keepdim=True)
    return torch.where(spread > FLAT * level, values / spread.clamp_min(torch.finfo(values.dtype).tiny), 0.0)


def _filters(size: int, config: InputChannelConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Real multipliers in the layout of `rfft2`, (1 or 3 s, S, S // 2 + 1), kept for the next call."""
    create = _create_filters if is_traced() else _cached_filters
    return create(size, config, device, dtype)


@lru_cache(maxsize=8)
def _cached_filters(
    size: int, config: InputChannelConfig, device: torch.device, dtype: torch.dtype
) -> Tensor:
    # whoever asks first, evaluation or training: autograd refuses tensors made under inference mode
    with torch.inference_mode(False), torch.no_grad():
        return _create_filters(size, config, device, dtype)


def _create_filters(
    size: int, config: InputChannelConfig, device: torch.device, dtype: torch.dtype
) -> Tensor:
    rows = torch.fft.fftfreq(size, d=1 / size, dtype=torch.float64, device=device)[:, None]
    columns = torch.arange(size // 2 + 1, dtype=torch.float64, device=device)[None]
    rho2 = rows.square() + columns.square()  # cycles per S, squared
    if config.kind == "response":
        gaussian = torch.exp(-2 * (math.pi * config.background_sigma) ** 2 * rho2)
        power = rho2**config.order
        gain: Tensor = (1 - gaussian) * power / (power + config.cutoff_cycles ** (2 * config.order))
        return gain.to(dtype)[None]
    # at the highest frequency of an even size the sign of a mixed derivative is undefined
    mixed = rows * columns * ((2 * rows.abs() < size) & (2 * columns < size))
    filters = []
    for scale in config.scales:
        # second derivatives in units of the scale: (2 pi f sigma)^2, normalized as Lindeberg proposed
        decay = -((2 * math.pi * scale) ** 2) * torch.exp(-2 * (math.pi * scale) ** 2 * rho2)
        filters += [decay * rows.square().expand_as(rho2), decay * columns.square(), decay * mixed]
    return torch.stack(filters).to(dtype)
