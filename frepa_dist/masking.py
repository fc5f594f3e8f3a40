"""Which tokens are masked: pure functions of noise that was drawn elsewhere.

Shapes: B batch, N tokens, K tokens kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shards.support.errors import ConfigError


class Masking(NamedTuple):
    """A split of N tokens into kept and removed ones.

    Attributes:
        ids_keep: (B, K) the tokens kept, in order of their noise.
        ids_restore: (B, N) where each token stands in the sequence "kept, then removed".
        mask: (B, N) float32, 1 = removed.
    """

    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor


def num_kept(num_tokens: int, mask_ratio: float) -> int:
    """Return how many tokens stay, rounded down as in the reference MAE.

    Raises:
        ConfigError: no token would stay, or none would be masked.
    """
    kept = int(num_tokens * (1 - mask_ratio))
    if not 0 < kept < num_tokens:
        raise ConfigError(
            f"mask_ratio {mask_ratio} keeps {kept} of {num_tokens} tokens",
            allowed="a ratio that keeps some tokens and masks some",
        )
    return kept


def random_masking(noise: Tensor, mask_ratio: float) -> Masking:
    """Keep the tokens of the smallest noise.

    Args:
        noise: (B, N) float32; the tokens of the largest values are removed, ties go by position.
        mask_ratio: share of the tokens to remove.
    """
    kept = num_kept(noise.shape[1], mask_ratio)
    order = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(order, dim=1)
    return Masking(order[:, :kept], ids_restore, (ids_restore >= kept).float())


def mask_first(noise: Tensor, indices: Tensor) -> Tensor:
    """Raise the noise of the tokens named, so that they are removed before any other.

    Args:
        noise: (B, N) in [0, 1).
        indices: (B, M) tokens, such as the high-frequency ones (RetMAE's HF masking).

    Returns:
        (B, N) noise in [0, 2); among the tokens named, the order stays that of their noise.
    """
    return noise.scatter_add(1, indices, torch.ones_like(indices, dtype=noise.dtype))
