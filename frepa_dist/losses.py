"""Reconstruction losses: pure functions, in float32 whatever the model computes in (float64 stays).

Every loss is a mean over rows, so that it does not depend on how a batch is cut; `rmse` by the batch, an
ablation, is the one exception.

Shapes: B batch, C channels, S image side; N patches, P values in a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from frepa_dist.spectrum import check_images, decay_gains, half_spectrum_counts

PATCH_VARIANCE_EPS = 1e-6  # of the reference MAE
HFL_CUTOFFS = (10.0, 20.0, 30.0, 40.0, 50.0)  # of Frepa, cycles per image side


def normalize_patches(patches: Tensor) -> Tensor:
    """Give each patch (B, N, P) mean 0 and variance 1 (unbiased, as in the reference MAE)."""
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + PATCH_VARIANCE_EPS).sqrt()


def masked_patch_loss(pred: Tensor, patches: Tensor, mask: Tensor, *, norm_pix_loss: bool) -> Tensor:
    """Mean squared error over the removed patches (He et al., MAE, arXiv 2111.06377).

    Args:
        pred: (B, N, P) prediction.
        patches: (B, N, P) the image's patches.
        mask: (B, N), 1 = removed.
        norm_pix_loss: predict the patches normalized one by one.

    Returns:
        0-dim float32. All images have the same number of removed patches, so the mean does not depend on how
        a batch is cut.
    """
    target = normalize_patches(patches.float()) if norm_pix_loss else patches.float()
    per_patch = (pred - target).square().mean(dim=-1)
    return (per_patch * mask).sum() / mask.sum()


def rmse(pred: Tensor, target: Tensor, *, per: Literal["image", "batch"] = "image") -> Tensor:
    """Root of the mean squared error (Frepa, arXiv 2407.14651).

    Args:
        pred: (B, C, S, S) prediction.
        target: (B, C, S, S).
        per: `image` takes the root for each image, then the mean over images; `batch` takes the root of the
            whole batch's mean squared error, as the authors' code does. That one depends on how a batch is
            cut: the mean over micro-batches is not the value of the whole.

    Returns:
        0-dim; the gradient at a perfect prediction is 0.
    """
    with torch.autocast(pred.device.type, enabled=False):
        difference = _difference(pred, target).flatten(1 if per == "image" else 0)
        norms = torch.linalg.vector_norm(difference, dim=-1)  # unlike sqrt, with a gradient at 0
        root: Tensor = norms.mean() / math.sqrt(difference.shape[-1])
        return root


def gradient_l1(pred: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the forward differences in y plus that of those in x (Frepa).

    Args:
        pred: (B, C, S, S) prediction.
        target: (B, C, S, S).

    Returns:
        0-dim. The last row and column have no forward difference and are left out.
    """
    with torch.autocast(pred.device.type, enabled=False):
        difference = _difference(pred, target)
        return sum((difference.diff(dim=dim).abs().mean() for dim in (-2, -1)), difference.new_zeros(()))


def hierarchical_frequency_loss(
    pred: Tensor, target: Tensor, cutoffs: Sequence[float] = HFL_CUTOFFS
) -> Tensor:
    """Sum over high-pass filters of the mean absolute error of what they let through (Frepa).

    The gain of a filter is 1 - exp(-rho^2 / cutoff^2), with cutoff 10, 20, ..., 50 bins at 512 pixels, which
    are cycles per image side. Mind the exponent: `spectrum.gaussian_high_pass` has rho^2 / (2 cutoff^2).

    The filters are linear, so one transform of the difference serves all of them: one forward FFT and one
    inverse FFT a filter instead of two of each for every filter. The inverse ones run in turn: in one batch
    they took up to twice as long on a CPU, for the memory they touch.

    Args:
        pred: (B, C, S, S) prediction.
        target: (B, C, S, S).
        cutoffs: K of them, in cycles per image side, positive.

    Returns:
        0-dim. Autograd keeps K times the size of the images, in float32, until the backward pass.
    """
    with torch.autocast(pred.device.type, enabled=False):
        difference = _difference(pred, target)
        size = check_images(difference)
        decays = decay_gains(size, tuple(cutoffs), difference.device, difference.dtype)
        spectrum = torch.fft.rfft2(difference)
        total = difference.new_zeros(())
        for decay in decays:
            total = total + torch.fft.irfft2(spectrum * (1 - decay), s=(size, size)).abs().mean()
        return total


def focal_frequency_loss(pred: Tensor, target: Tensor, alpha: float = 1.0) -> Tensor:
    """Squared error of the spectra, weighted by how wrong each bin is (Jiang et al., arXiv 2012.12821).

    The weight of a bin is |F|^alpha over its maximum in the same image and channel, F the orthonormal
    spectrum of the difference; no gradient flows through it. Frepa's authors saw aliasing in what it trains:
    an ablation.

    Args:
        pred: (B, C, S, S) prediction.
        target: (B, C, S, S).
        alpha: of the weight; 0 makes it the mean squared error.

    Returns:
        0-dim.
    """
    with torch.autocast(pred.device.type, enabled=False):
        difference = _difference(pred, target)
        size = check_images(difference)
        spectrum = torch.fft.rfft2(difference, norm="ortho")
        power = spectrum.real.square() + spectrum.imag.square()
        weight = power.detach().pow(alpha / 2)
        weight = weight / weight.amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        counts = half_spectrum_counts(size, power.device, power.dtype)
        loss: Tensor = (weight * power * counts).sum(dim=(-2, -1)).mean() / size**2
        return loss


def _difference(pred: Tensor, target: Tensor) -> Tensor:
    """Subtract in float32, or in float64 where the prediction is."""
    dtype = torch.promote_types(pred.dtype, torch.float32)
    return pred.to(dtype) - target.to(dtype)
