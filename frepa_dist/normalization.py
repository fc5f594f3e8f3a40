"""How images in [0, 1] are prepared for a network: the same functions in training and in evaluation.

Shapes: B batch, C channels, S image side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST_RANGE = 1 / 255  # a flat image has none; a range below one grey level is noise


def min_max_scale(images: Tensor) -> Tensor:
    """Make each image's smallest value 0 and its largest 1, over channels and pixels; a flat one becomes 0.

    Args:
        images: (B, C, S, S) floating point, in [0, 1].
    """
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp_min(SMALLEST_RANGE)


def standardize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract the mean and divide by the spread of each channel of (B, C, S, S)."""
    # channel by channel: constants travel as kernel arguments, and no copy waits for the device
    channels = zip(images.unbind(1), mean, std, strict=True)
    return torch.stack([(channel - m) / s for channel, m, s in channels], dim=1)
