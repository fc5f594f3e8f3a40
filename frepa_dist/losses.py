"""Reconstruction losses: pure functions on patches, in float32 whatever the model computes in.

Shapes: B batch, N patches, P values in a patch.
"""

from __future__ import annotations

from torch import Tensor

PATCH_VARIANCE_EPS = 1e-6  # of the reference MAE


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
