"""Power spectra and Gaussian filters of images: pure functions on tensors.

Frequencies are in cycles per image side: one cycle per side is one bin of the FFT, whatever the resolution,
so the cut-offs that Frepa states in bins at 512 px mean the same here at any size.

Shapes: B batch, C channels, S image side (images are square), K filters.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

DETAIL_CYCLES = 13.4  # per image side: where detail begins, as for the high-frequency tokens
CACHED_FILTERS = 16  # sizes, devices and sets of cut-offs; five filters of 512 px take 2.6 MB


def radial_frequency(
    size: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Distance of each bin of a 2-D FFT from zero frequency, (S, S), in cycles per image side."""
    axis = torch.fft.fftfreq(size, d=1 / size, device=device, dtype=dtype)
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
    gain = decay_gains(check_images(images), (math.sqrt(2) * cutoff,), images.device, images.dtype)
    low: Tensor = torch.fft.irfft2(torch.fft.rfft2(images) * gain[0], s=images.shape[-2:])
    return low


def disc_low_pass(images: Tensor, radius: float) -> Tensor:
    """Keep only what lies within a disc of the spectrum, rho <= radius: an ideal low-pass filter.

    PixMIM's target (Liu et al., arXiv 2303.02416) has a radius of 40 at 224 pixels; their code's disc lies
    half a bin off zero frequency, this one does not.

    Args:
        images: (..., S, S), floating point.
        radius: in cycles per image side.

    Returns:
        (..., S, S).
    """
    size = check_images(images)
    inside = radial_frequency(size, images.device)[:, : size // 2 + 1] <= radius
    low: Tensor = torch.fft.irfft2(torch.fft.rfft2(images) * inside, s=(size, size))
    return low


def decay_gains(
    size: int, radii: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Gaussian low-pass gains exp(-rho^2 / radius^2) in the layout of `rfft2`, kept for the next call.

    Args:
        size: S.
        radii: K of them, in cycles per image side, where the gain is 1 / e; sqrt(2) times the cut-off of
            `gaussian_low_pass`.
        device: where.
        dtype: float32 or float64.

    Returns:
        (K, S, S // 2 + 1); not to be written to.

    Raises:
        ValueError: a radius is not positive.
    """
    if min(radii) <= 0:
        raise ValueError(f"a cut-off must be positive: {radii}")
    create = _decay_gains if is_traced() else _cached_decay_gains
    return create(size, radii, device, dtype)


def is_traced() -> bool:
    """Whether operations are recorded on stand-ins for tensors, which no cache may keep or give out."""
    return torch.compiler.is_compiling() or torch._guards.detect_fake_mode() is not None


def _decay_gains(size: int, radii: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    rho2 = radial_frequency(size, device, torch.float64)[:, : size // 2 + 1].square()
    return torch.stack([torch.exp(-rho2 / radius**2) for radius in radii]).to(dtype)


@lru_cache(maxsize=CACHED_FILTERS)
def _cached_decay_gains(
    size: int, radii: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    # whoever asks first, evaluation or training: autograd refuses tensors made under inference mode
    with torch.inference_mode(False), torch.no_grad():
        return _decay_gains(size, radii, device, dtype)


def half_spectrum_counts(size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """How often each column of `rfft2` stands in the whole spectrum, (S // 2 + 1,): once or twice."""
    columns = torch.arange(size // 2 + 1, device=device)
    return torch.where((columns == 0) | (2 * columns == size), 1.0, 2.0).to(dtype)


def check_images(images: Tensor) -> int:
    """Return S of images (..., S, S).

    Raises:
        ValueError: they are not square.
    """
    height, width = images.shape[-2:]
    if height != width:
        raise ValueError(f"images must be square: {height} x {width}")
    return width


def high_band_error(pred: Tensor, target: Tensor, cutoff: float) -> Tensor:
    """How much of the detail a reconstruction misses, as a share of the detail there is.

    The root mean square, over channels and pixels, of `gaussian_high_pass` of (pred - target), divided by
    that of `gaussian_high_pass` of the target. A prediction without any detail of its own has 1, the target
    itself 0; detail at the wrong place can exceed 1.

    Args:
        pred: (B, C, S, S).
        target: (B, C, S, S).
        cutoff: in cycles per image side, positive.

    Returns:
        (B,) float32, or float64 for such images; NaN for a target without detail (take `nanmean`).
    """
    dtype = torch.promote_types(pred.dtype, torch.float32)
    pred, target = pred.to(dtype), target.to(dtype)
    size = check_images(target)
    gain = 1 - decay_gains(size, (math.sqrt(2) * cutoff,), target.device, dtype)[0]
    weight = gain.square() * half_spectrum_counts(size, target.device, dtype)

    def energy(images: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(images) / size  # Parseval: no way back is needed
        power = spectrum.real.square() + spectrum.imag.square()
        return torch.sum(power * weight, dim=(-3, -2, -1))

    detail = energy(target)
    # a flat image keeps some rounding
    has_detail = detail > (16 * torch.finfo(dtype).eps) ** 2 * target.square().sum(dim=(-3, -2, -1))
    error: Tensor = torch.where(has_detail, (energy(pred - target) / detail).sqrt(), torch.nan)
    return error


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


def energy_kept(restored: Tensor, images: Tensor, cutoff: float, weight: Tensor | None = None) -> Tensor:
    """Energy of a restoration in the high band, over that of the image: 1 where as much detail is there.

    Less where a restoration is smoother, more where detail is made up; whether it is at the right place is
    not asked. Energy is that of the spectrum at `cutoff` and above, and never that of the mean.

    Args:
        restored: (B, K, S, S): of each image K squares, channels or patches.
        images: (B, K, S, S), what they are to be.
        cutoff: in cycles per side of a square, positive.
        weight: (B, K), of each square in the sums over K; None: all alike.

    Returns:
        (B,) float32; NaN for an image without any detail (take `nanmean`).
    """
    size = check_images(images)
    is_high = radial_frequency(size, images.device)[:, : size // 2 + 1] >= cutoff
    bins = is_high * half_spectrum_counts(size, images.device)

    def energy(squares: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(squares.float(), norm="ortho")
        power = (spectrum.real.square() + spectrum.imag.square()).mul_(bins).sum(dim=(-2, -1))
        total: Tensor = (power if weight is None else power * weight).sum(dim=-1)
        return total

    detail = energy(images)
    # a flat image keeps some rounding
    has_detail = detail > (16 * torch.finfo(torch.float32).eps) ** 2 * images.float().square().sum((1, 2, 3))
    kept: Tensor = torch.where(has_detail, energy(restored) / detail, torch.nan)
    return kept
