"""The light decoder of images: from the maps of a degraded tile, and maybe that tile, to the clean one.

Shapes: n tiles, S side of a tile, D width, h = w = S / stride.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from frepa_dist.evaluate.dense import DenseTraining
from frepa_dist.models.volume import DenseHead
from frepa_dist.normalization import SMALLEST_RANGE

SKIP_WIDTH = 16  # channels of the decoder that meet the degraded image


class RestoreTraining(DenseTraining):
    """How the decoder of images is trained, by mean absolute error.

    Attributes:
        head_width: wider than that of masks: at a stride of 16 a position stands for 256 grey values.
        max_tiles: of an image.
        max_images: most images to learn from, and most to test on, drawn at random.
        skip: whether the decoder sees the degraded image too.
    """

    max_tiles: int = Field(default=8, ge=1)
    head_width: int = Field(default=256, ge=8)
    max_images: int = Field(default=200, ge=1)
    skip: bool = False


class RestoreHead(nn.Module):
    """Maps, and maybe the degraded tile, to the clean tile.

    Args:
        width: D.
        stride: of the encoder.
        training: `head_width` and `skip`.
        gives_range: whether each tile's own range is given back, for an encoder that took it away.
    """

    def __init__(self, width: int, stride: int, training: RestoreTraining, *, gives_range: bool) -> None:
        super().__init__()
        self.skip, self.gives_range = training.skip, gives_range
        out = SKIP_WIDTH if training.skip else 3
        self.dense = DenseHead(width, out, stride, head_width=training.head_width)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))
        if training.skip:
            self.mix = nn.Conv2d(SKIP_WIDTH + 3, SKIP_WIDTH, 3, padding=1)
            self.last = nn.Conv2d(SKIP_WIDTH, 3, 3, padding=1)
            nn.init.zeros_(self.last.weight)  # at first the degraded image passes as it is
            assert self.last.bias is not None
            nn.init.zeros_(self.last.bias)

    def forward(self, maps: Tensor, seen: Tensor) -> Tensor:
        """Restore tiles.

        Args:
            maps: (n, D, h, w).
            seen: (n, 3, S, S), the degraded tiles in [0, 255].

        Returns:
            (n, 3, S, S) in the units of [0, 1], not clipped.
        """
        scaled, low, span = self._scale(seen)
        found = self.dense(maps, (seen.shape[-2], seen.shape[-1]))
        if not self.skip:
            return low + span * (self.mean + self.std * found)  # type: ignore[no-any-return]
        standard = (scaled - self.mean) / self.std
        mixed = functional.relu(self.mix(torch.cat([found, standard], dim=1)))
        restored: Tensor = low + span * (scaled + self.std * self.last(mixed))
        return restored

    def _scale(self, seen: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Values, what to add and what to multiply by to have those of the tile in [0, 1]."""
        values = seen.float() / 255
        if not self.gives_range:
            return values, 0.0, 1.0
        low, high = values.amin(dim=(1, 2, 3), keepdim=True), values.amax(dim=(1, 2, 3), keepdim=True)
        span = (high - low).clamp_min(SMALLEST_RANGE)
        return (values - low) / span, low, span

    @torch.no_grad()
    def standardize_by(self, seen: Tensor) -> None:
        """Take mean and spread of the channels from training tiles (n, 3, S, S) uint8."""
        values = self._scale(seen)[0].transpose(0, 1).flatten(1)
        std, mean = torch.std_mean(values, dim=1)
        self.mean.copy_(mean[:, None, None])
        self.std.copy_(std.clamp_min(SMALLEST_RANGE)[:, None, None])
