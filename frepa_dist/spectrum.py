"""Power spectra and Gaussian filters of images: pure functions on tensors.

Frequencies are in cycles per image side: one cycle per side is one bin of the FFT, whatever the resolution,
so the cut-offs that Frepa states in bins at 512 px mean the same here at any size.

Shapes: B batch, C channels, S image side (images are square).
"""

from __future__ import annotations

import torch
from torch import Tensor


def radial_frequency(size: int, device: torch.device | None = None) -> Tensor:
    """Distance of each bin of a 2-D FFT from zero frequency, (S, S), in cycles per image side."""
    axis = torch.fft.fftfreq(size, d=1 / size, device=device)
    return torch.hypot(axis[:, None], axis[None, :])


def gaussian_high_pass(images: Tensor, cutoff: float) -> Tensor:
    """Keep detail: multiply the spectrum by 1 - exp(-rho^2 / (2 cutoff^2)) (Frepa, arXiv 2407.14651).

    Args:
        images: (B, C, S, S), floating point. The mean of each channel goes to zero.
        cutoff: in cycles per image side, positive. At it the gain is 0.39.

    Returns:
        (B, C, S, S); with `gaussian_low_pass` of the same cut-off it adds up to `images`.
    """
    return images - gaussian_low_pass(images, cutoff)


def gaussian_low_pass(images: Tensor, cutoff: float) -> Tensor:
    """Keep tone: multiply the spectrum by exp(-rho^2 / (2 cutoff^2)); see `gaussian_high_pass`."""
    if cutoff <= 0:
        raise ValueError(f"the cut-off must be positive, not {cutoff}")
    size = images.shape[-1]
    gain = torch.exp(-radial_frequency(size, images.device)[:, : size // 2 + 1].square() / (2 * cutoff**2))
    low: Tensor = torch.fft.irfft2(torch.fft.rfft2(images) * gain, s=images.shape[-2:])
    return low


def radial_power_spectrum(images: Tensor) -> Tensor:
    """Mean power on rings around zero frequency.

    Args:
        images: (..., S, S), floating point.

    Returns:
        (..., S // 2 + 1): entry r is the mean of |F / S^2|^2 over the bins whose distance from zero rounds
        to r cycles per image side. The corners of the spectrum, beyond S / 2, belong to no ring.
    """
    size = images.shape[-1]
    power = (torch.fft.fft2(images).abs() / size**2).square()
    ring = radial_frequency(size, images.device).round().long().flatten()
    inside = ring <= size // 2
    ring = ring[inside]
    total = power.flatten(-2)[..., inside]
    sums = torch.zeros(*total.shape[:-1], size // 2 + 1, dtype=total.dtype, device=total.device)
    sums.index_add_(-1, ring, total)
    return sums / torch.bincount(ring, minlength=size // 2 + 1)


def high_band_share(images: Tensor, cutoff: float) -> Tensor:
    """Share of the power, zero frequency left out, at `cutoff` cycles per image side and above.

    Args:
        images: (..., S, S), floating point.
        cutoff: in cycles per image side.

    Returns:
        (...) in [0, 1]; 0 for an image without any variation.
    """
    power = torch.fft.fft2(images).abs().square()
    rho = radial_frequency(images.shape[-1], images.device)
    varying = power * (rho > 0)
    total = varying.sum(dim=(-2, -1))
    high = (varying * (rho >= cutoff)).sum(dim=(-2, -1))
    # rounding leaves some power in a flat image; less than this is far below one grey level of 255
    is_varying = total > torch.finfo(total.dtype).eps * power[..., 0, 0]
    return torch.where(is_varying, high / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
