"""A frozen encoder, whatever it comes from; `evaluate.features` loads one.

Shapes: B batch, S image side, K patches kept, D width, h = w sides of a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from frepa_dist.evaluate.views import Grid
from frepa_dist.normalization import min_max_scale, standardize
from shards.support.errors import ConfigError


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder.

    Attributes:
        name: the source it was loaded from, with the step of a run.
        pool: normalized images (B, 3, S, S) and patches to keep (B, K) or None -> (B, D).
        width: D.
        image_size: S.
        patch_size: side of a patch in pixels, None where the encoder has no tokens (a convolutional one).
        mean, std: of the channels, of images scaled to [0, 1].
        device: where it runs.
        map: normalized images (B, 3, S, S) -> their features by place, (B, C, h, w), after the final norm;
            with gradient where one is wanted. None where the encoder has no such thing. C is D but where timm
            has layers between the last map and the mean of its places, or behind it.
        module: holds the parameters that `map` uses, frozen and in evaluation mode as it was loaded.
        min_max: whether each image is scaled to [0, 1] by its own smallest and largest value first.
    """

    name: str
    pool: Callable[[Tensor, Tensor | None], Tensor]
    width: int
    image_size: int
    patch_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    map: Callable[[Tensor], Tensor] | None = None
    module: nn.Module | None = None
    min_max: bool = False

    @property
    def grid(self) -> Grid:
        """Side of images and patches.

        Raises:
            ConfigError: the encoder has no tokens.
        """
        if self.patch_size is None:
            raise ConfigError("this encoder has no tokens", where=self.name, allowed="a vision transformer")
        return Grid(self.image_size, self.patch_size)

    @property
    def view_grid(self) -> Grid:
        """Side of images, and of patches or, of an encoder without tokens, of cells that fill an image."""
        return Grid(self.image_size, self.patch_size or math.gcd(self.image_size, 32))

    def normalize(self, images: Tensor) -> Tensor:
        """Prepare images as the encoder was trained with them.

        Args:
            images: (B, 3, S, S), uint8, or floating point in [0, 1].

        Returns:
            (B, 3, S, S) float32 of the encoder's mean and spread.
        """
        images = images.to(self.device)
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return standardize(min_max_scale(scaled) if self.min_max else scaled, self.mean, self.std)

    @torch.inference_mode()
    def embed(self, normalized: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Embed normalized images (B, 3, S, S), or only their patches `ids_keep` (B, K) -> (B, D) float32."""
        if ids_keep is not None:
            ids_keep = ids_keep.to(self.device)
        return self.pool(normalized.to(self.device), ids_keep).float()

    def encode(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Embed images uint8 (B, 3, S, S), or only their patches `ids_keep` (B, K) -> (B, D) float32."""
        return self.embed(self.normalize(images), ids_keep)


def to_map(tokens: Tensor) -> Tensor:
    """Row-major tokens (B, N, D) as a map (B, D, h, w)."""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)
