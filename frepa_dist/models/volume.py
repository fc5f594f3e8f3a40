"""From 2D to 3D: a 2D encoder slice by slice, then attention that alternates within slices and between them.

The maps of the slices are cut into patches; a transformer attends in turn within each slice and, at each
place of the map, between the slices; what it finds is added to the maps. Its last layer starts at zero, so
that at first the volume encoder is the 2D encoder (the volume head of Frepa, arXiv 2407.14651). Attention
that is divided so costs F P^2 + P F^2 instead of (F P)^2 (compare TimeSformer, arXiv 2102.05095).

Empty places (padding, missing slices) are attended to by none and count nowhere.

Shapes: B volumes or windows of volumes, F places of slices, S side of a slice in pixels, D width of the 2D
encoder, s its stride, h = w = S / s, p side of a patch of the map, P patches of a map, W width of the
transformer, K classes.
"""

from __future__ import annotations

from functools import partial
from typing import Self

import torch
from pydantic import Field, model_validator
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from frepa_dist.models.decoder import Decoder
from frepa_dist.models.init import init_layers
from shards.support.errors import ConfigError
from shards.support.settings import Settings


class VolumeSettings(Settings):
    """How slices become a volume.

    Attributes:
        num_slices: F, slices that are seen at once.
        overlap: slices that two windows of a longer volume have in common.
        width: W of the transformer, a multiple of 4 and of `num_heads`.
        depth: its blocks; the first attends within slices, the second between them, and so on.
        num_heads: of attention.
        mlp_ratio: width of the layer between, as a multiple of W.
        patch: p, side of a patch of the 2D encoder's map.
        between: whether slices attend to each other. False is the control: all blocks attend within slices,
            and no slice knows its number, so that the head sees a set of slices.
        slice_chunk: slices that go through the 2D encoder at once; bounds its memory.
    """

    num_slices: int = Field(default=16, ge=1)
    overlap: int = Field(default=4, ge=0)
    width: int = Field(default=192, ge=4, multiple_of=4)
    depth: int = Field(default=6, ge=1)
    num_heads: int = Field(default=4, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    patch: int = Field(default=2, ge=1)
    between: bool = True
    slice_chunk: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is no multiple of num_heads {self.num_heads}")
        if self.overlap >= self.num_slices:
            raise ValueError(f"overlap {self.overlap} must be smaller than num_slices {self.num_slices}")
        if self.between and self.depth < 2:
            raise ValueError("a depth of 1 has no block between slices; choose 2 or more")
        return self


def sincos(length: int, width: int, device: torch.device) -> Tensor:
    """Embed the places of a line: sines, then cosines, of wavelengths from 2 pi to 10,000 * 2 pi.

    Returns:
        (length, width) float32; `width` is even.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 2, device=device) / (width // 2))
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SliceMixer(nn.Module):
    """The transformer over the maps of the slices.

    Args:
        width: D of the maps.
        settings: of the transformer.
    """

    def __init__(self, width: int, settings: VolumeSettings) -> None:
        super().__init__()
        self.settings = settings
        self.mean: Tensor
        self.std: Tensor
        inner, patch = settings.width, settings.patch
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.embed = nn.Conv2d(width, inner, patch, stride=patch)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(inner, settings.num_heads, settings.mlp_ratio, qkv_bias=True, norm_layer=norm)
            for _ in range(settings.depth)
        )
        self.norm = norm(inner)
        self.project = nn.Linear(inner, width * patch**2)
        init_layers(self)
        nn.init.xavier_uniform_(self.embed.weight.flatten(1))
        nn.init.zeros_(self.project.weight)  # at first the maps pass as they are

    @torch.no_grad()
    def standardize_by(self, values: Tensor) -> None:
        """Take mean and spread of each channel from values (D, n) at places of training maps.

        What all slices have in common is the larger part of most encoders' maps, and would drown what tells
        them apart. Only what the transformer sees is standardized, not what it is added to.
        """
        std, mean = torch.std_mean(values.float(), dim=1)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, 1))

    def forward(self, maps: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let slices know of each other.

        Args:
            maps: (B, F, D, h, w); any h and w: they are filled up to whole patches with zeros.
            mask: (B, F) bool, true where a slice is; None: everywhere.

        Returns:
            (B, F, D, h, w), zero at empty places.
        """
        num, depth, _, height, across = maps.shape
        if mask is None:
            mask = torch.ones(num, depth, dtype=torch.bool, device=maps.device)
        maps = torch.where(mask[:, :, None, None, None], maps, 0)
        patch = self.settings.patch
        seen = (maps.flatten(0, 1) - self.mean[:, None, None]) / self.std[:, None, None]
        filled = functional.pad(seen, (0, -across % patch, 0, -height % patch))
        tokens = self.embed(filled)  # (B F, W, h / p, w / p)
        rows, columns = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2).reshape(num, depth, rows * columns, -1)  # (B, F, P, W)
        tokens = self._run(tokens + self._positions(depth, rows, columns, tokens.device), mask)
        found = self.project(self.norm(tokens)).flatten(0, 1).transpose(1, 2)  # (B F, D p p, P)
        found = functional.fold(found, (rows * patch, columns * patch), patch, stride=patch)
        found = found[:, :, :height, :across].reshape(maps.shape)
        return torch.where(mask[:, :, None, None, None], maps + found, 0)

    def _positions(self, depth: int, rows: int, columns: int, device: torch.device) -> Tensor:
        """(F, P, W), or (1, P, W) where slices have no number; half of W for the column, half for the row."""
        width = self.settings.width
        half = width // 2
        across = sincos(columns, half, device)[None].expand(rows, -1, -1)
        down = sincos(rows, half, device)[:, None].expand(-1, columns, -1)
        space = torch.cat([across, down], dim=2).reshape(1, rows * columns, width)
        if not self.settings.between:
            return space
        return space + sincos(depth, width, device)[:, None]

    def _run(self, tokens: Tensor, mask: Tensor) -> Tensor:
        num, depth, patches, width = tokens.shape
        # an empty place attends to itself, so that its row of attention has something to add up to 1
        seen = mask[:, None, :] | torch.eye(depth, dtype=torch.bool, device=mask.device)
        bias = torch.zeros(seen.shape, device=tokens.device).masked_fill_(~seen, float("-inf"))
        bias = bias.repeat_interleave(patches, dim=0)[:, None]  # (B P, 1, F, F)
        for number, block in enumerate(self.blocks):
            if number % 2 and self.settings.between:
                lines = tokens.transpose(1, 2).flatten(0, 1)  # (B P, F, W)
                lines = block(lines, attn_mask=bias)
                tokens = lines.reshape(num, patches, depth, width).transpose(1, 2)
            else:
                tokens = block(tokens.flatten(0, 1)).reshape(num, depth, patches, width)
        return tokens


class VolumeEncoder(nn.Module):
    """A 2D encoder and the transformer over its maps.

    A frozen encoder stays in evaluation mode. A trained one does too as far as BatchNorm goes: what it would
    learn from a chunk depends on how slices are cut into chunks, and on padding.

    Args:
        encoder: images (n, 3, S, S), prepared as it wants them -> maps (n, D, h, w).
        width: D.
        settings: of the transformer.
        train_encoder: whether the 2D encoder learns. If so its activations are recomputed in the backward
            pass chunk by chunk: those of one chunk are held at a time. If not, its parameters are frozen.
    """

    def __init__(
        self, encoder: nn.Module, width: int, settings: VolumeSettings, *, train_encoder: bool = False
    ) -> None:
        super().__init__()
        self.settings, self.width, self.train_encoder = settings, width, train_encoder
        self.encoder = encoder.requires_grad_(train_encoder)
        self.mixer = SliceMixer(width, settings)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Set training mode, but for what stays in evaluation mode."""
        super().train(mode)
        self.encoder.train(mode and self.train_encoder)
        for module in self.encoder.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def encode_slices(self, images: Tensor) -> Tensor:
        """Run the 2D encoder on slices (n, 3, S, S), `slice_chunk` at a time -> (n, D, h, w) float32.

        Raises:
            ConfigError: what comes out is no map of D channels.
        """
        maps = []
        for chunk in torch.split(images, self.settings.slice_chunk):
            if not self.train_encoder:
                with torch.no_grad():
                    found = self.encoder(chunk)
            elif torch.is_grad_enabled():
                found = checkpoint(self.encoder, chunk, use_reentrant=False)
            else:
                found = self.encoder(chunk)
            if found.ndim != 4 or found.shape[1] != self.width:
                raise ConfigError(
                    f"the 2D encoder gives {tuple(found.shape)} for {tuple(chunk.shape)}",
                    allowed=f"a map (n, {self.width}, h, w)",
                )
            maps.append(found.float())
        return torch.cat(maps)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode volumes.

        Args:
            images: (B, F, 3, S, S); any finite values at empty places.
            mask: (B, F) bool, true where a slice is; None: everywhere.

        Returns:
            (B, F, D, h, w), zero at empty places.
        """
        maps = self.encode_slices(images.flatten(0, 1))
        mixed: Tensor = self.mixer(maps.reshape(*images.shape[:2], *maps.shape[1:]), mask)
        return mixed


class ClassificationHead(nn.Module):
    """Classes of volumes, from the mean over their slices and places: LayerNorm and a linear layer.

    Args:
        width: D.
        num_classes: K.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, num_classes)
        init_layers(self)

    def pool(self, maps: Tensor, weight: Tensor) -> Tensor:
        """Add up the slices of windows, each with its share, and average over places.

        Args:
            maps: (n, F, D, h, w), windows.
            weight: (n, F) share of each slice (`volume_slots.Slots`), 0 at empty places.

        Returns:
            (n, D).
        """
        return torch.einsum("nfd,nf->nd", maps.mean(dim=(3, 4)), weight)

    def forward(self, sums: Tensor, totals: Tensor, members: Tensor) -> Tensor:
        """Classify.

        Args:
            sums: (n, D) as of `pool`, n windows of B volumes.
            totals: (n,) sum of the shares of each window.
            members: (B, n) float, 1 where a window is of a volume. A product of matrices, since adding by
                index is not reproducible on a GPU.

        Returns:
            (B, K) logits.
        """
        pooled = (members @ sums) / (members @ totals)[:, None]
        logits: Tensor = self.linear(self.norm(pooled))
        return logits


class DenseHead(nn.Module):
    """A map of classes for each slice, at its size: LayerNorm, 1x1 convolution, and a decoder.

    Args:
        width: D.
        num_classes: K.
        stride: s of the 2D encoder, a power of two.
        head_width: channels after the 1x1 convolution.
    """

    def __init__(self, width: int, num_classes: int, stride: int, *, head_width: int = 64) -> None:
        super().__init__()
        self.reduce = nn.Sequential(LayerNorm2d(width), nn.Conv2d(width, head_width, 1))
        self.decoder = Decoder(head_width, stride, out_channels=num_classes)

    def forward(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """(n, D, h, w) -> (n, K, *size) logits; bilinear where the decoder's own size is another one."""
        logits = self.decoder(self.reduce(maps))
        if logits.shape[2:] != size:
            logits = functional.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits  # type: ignore[no-any-return]
