"""Images cut into square patches, and put together again.

Shapes: B batch, C channels, S image side, p patch side, N patches.
"""

from __future__ import annotations

import math

from torch import Tensor

from frepa_dist.spectrum import disc_low_pass


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, C, S, S) into patches (B, N, p * p * C), in the order row, column, channel."""
    B, C, S, _ = images.shape
    p = patch_size
    grid = images.reshape(B, C, S // p, p, S // p, p)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Put patches (B, N, p * p * C) back into images (B, C, S, S)."""
    B, N, _ = patches.shape
    p, side = patch_size, math.isqrt(N)
    grid = patches.reshape(B, side, side, p, p, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, side * p, side * p)


def reconstruction_target(images: Tensor, patch_size: int, low_pass_cycles: float | None = None) -> Tensor:
    """Cut the target out of normalized images, in float32: (B, C, S, S) -> (B, N, p * p * C).

    Args:
        images: what is to be reconstructed, without any further input channel.
        patch_size: p.
        low_pass_cycles: take away what is finer than this many cycles per image side first, as PixMIM does
            (Liu et al., arXiv 2303.02416; there 40 at 224 pixels); None leaves the images as they are.
    """
    if low_pass_cycles is not None:
        images = disc_low_pass(images.float(), low_pass_cycles)
    return patchify(images, patch_size)
