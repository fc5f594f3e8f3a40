"""Encoders of any family behind one face: images in, a map of features after the final norm out.

The networks are timm's (`models.catalog` lists them). A vision transformer can also encode some of its
patches alone; the others see the whole image or nothing.

Drop path is drawn from torch's global generator, and not by sample: with it on, what a sample meets depends
on how the global batch is cut into ranks and micro-batches. It is off by default.

Shapes: B batch, S image side, s stride, h = w = S / s, N = h w positions, K positions kept, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from frepa_dist.models.catalog import BACKBONES, check_image_size, find_backbone, timm_arguments
from frepa_dist.models.response import InputChannelConfig, append_input_channel
from frepa_dist.models.vit_mae import gather_tokens
from shards.support.errors import ConfigError
from shards.support.settings import Settings


class BackboneSettings(Settings):
    """The network of a method that works on whole images, and how images are prepared for it.

    Attributes:
        backbone: a name of `models.catalog.BACKBONES`.
        image_size: side of the training views in pixels.
        mean, std: of the channels, of images scaled to [0, 1]; ImageNet's by default.
        min_max: whether each image is scaled to [0, 1] by its own smallest and largest value first.
        init: where the weights start: `timm` takes its pretrained ones; a path is a run folder (its newest
            checkpoint), an exported folder, an MAE or RETFound checkpoint or a file of timm's names.
        neck_width: channels between encoder and decoder; None has no neck.
        decoder_min_width: fewest channels of a decoder stage.
        decoder_groups: groups of the decoder's GroupNorm.
        activation_checkpointing: recompute blocks in the backward pass: less memory, more time.
        drop_path: largest probability that a residual branch is left out, rising with depth.
        input_channel: a fourth channel, computed from the image that the encoder is given: `response` (of the
            high-pass filter), `frangi` (vesselness), or the settings of one; None for none.
    """

    backbone: str = "vit_base"
    image_size: int = Field(512, ge=1)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    min_max: bool = True
    init: Literal["timm"] | Path | None = None
    neck_width: int | None = Field(128, ge=1)
    decoder_min_width: int = Field(16, ge=1)
    decoder_groups: int = Field(8, ge=1)
    activation_checkpointing: bool = False
    drop_path: float = Field(0.0, ge=0, lt=1)
    input_channel: InputChannelConfig | None = None

    @field_validator("input_channel", mode="before")
    @classmethod
    def _expand_channel(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("backbone")
    @classmethod
    def _check_backbone(cls, name: str) -> str:
        if name not in BACKBONES:
            raise ValueError(f"no such backbone; allowed: {', '.join(BACKBONES)}")
        return name

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            check_image_size(self.backbone, self.image_size)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if min(self.std) <= 0:
            raise ValueError("'std' must be positive")
        return self

    @property
    def patch_size(self) -> int:
        """Side in pixels of a position of the encoder's map."""
        return BACKBONES[self.backbone].stride

    @property
    def num_patches(self) -> int:
        """N, positions of the map."""
        return (self.image_size // self.patch_size) ** 2


class Backbone(nn.Module):
    """A timm network without its head.

    Args:
        name: in the catalog.
        image_size: S.
        input_channel: a fourth channel, computed from the images; None for none.
        drop_path: largest probability that a residual branch is left out.
        activation_checkpointing: recompute blocks in the backward pass (not reentrant).

    Attributes:
        width: D.
        stride: s.
        image_size: S.
        can_drop_tokens: whether `ids_keep` may be given.

    Raises:
        ConfigError: no such backbone, or the image size does not fit.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        *,
        input_channel: InputChannelConfig | None = None,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        import timm

        super().__init__()
        entry = find_backbone(name)
        self.name, self.stride, self.image_size = name, entry.stride, image_size
        self.can_drop_tokens = entry.family == "vit"
        self.input_channel = input_channel
        self.in_channels = 3 if input_channel is None else 4
        arguments = timm_arguments(name, image_size, self.in_channels)
        # `Any`: timm has no type for what its models have in common
        self.trunk: Any = timm.create_model(
            entry.architecture, pretrained=False, num_classes=0, drop_path_rate=drop_path, **arguments
        )
        self.trunk.set_grad_checkpointing(activation_checkpointing)
        self.activation_checkpointing = activation_checkpointing
        self.width = int(self.trunk.num_features)

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode whole images, or some of their patches.

        Args:
            images: (B, 3, S, S) normalized, any float dtype; it is cast to that of the weights.
            ids_keep: (B, K) row-major indices of the positions to encode; vision transformers only.

        Returns:
            (B, D, h, w) after the final norm, or (B, K, D) in the order of `ids_keep`. A ResNet has no final
            norm: its last activation.

        Raises:
            ConfigError: `ids_keep` is given, and this backbone cannot leave any position out.
        """
        if self.input_channel is not None:
            images = append_input_channel(images, self.input_channel)
        x = images.to(next(self.trunk.parameters()).dtype)
        self._match_buffers(x.dtype)
        if ids_keep is not None:
            return self._encode_tokens(x, ids_keep)
        maps: list[Tensor] = self.trunk.forward_intermediates(
            x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return maps[-1]

    def _match_buffers(self, dtype: torch.dtype) -> None:
        """Bring floating-point buffers to the dtype of the weights.

        DeepSpeed's bf16 engine casts weights and leaves buffers, which SwinV2 adds and multiplies with them.
        None of them is in the state dict.
        """
        for module in self.trunk.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point() and buffer.dtype != dtype:
                    setattr(module, name, buffer.to(dtype))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay although they have more than one dimension.

        Position embeddings, relative-position tables, logit scales: timm's choice for each family.
        """
        chosen: set[str] = getattr(self.trunk, "no_weight_decay", set)()
        own = {name for name, _ in self.trunk.named_parameters()}
        return {f"trunk.{name}" for name in chosen & own}

    def _encode_tokens(self, x: Tensor, ids_keep: Tensor) -> Tensor:
        if not self.can_drop_tokens:
            raise ConfigError(
                f"{self.name} encodes whole images: none of its positions can be left out",
                where="backbone",
                allowed="vision transformers (vit_*) encode some of their patches",
                fix="choose a vision transformer, or a method that does not drop tokens",
            )
        trunk = self.trunk
        tokens = trunk.norm_pre(gather_tokens(trunk._pos_embed(trunk.patch_embed(x)), ids_keep))
        for block in trunk.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return trunk.norm(tokens)  # type: ignore[no-any-return]


class PooledEncoder(nn.Module):
    """A backbone and the mean over its map: what an EMA teacher is.

    Its parameter names are a subset of `BackboneAutoencoder`'s.
    """

    def __init__(self, encoder: Backbone) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Embed images (B, 3, S, S), or some of their patches (B, K) -> (B, D)."""
        return pool(self.encoder(images, ids_keep), is_map=ids_keep is None)


def pool(features: Tensor, *, is_map: bool) -> Tensor:
    """Mean over positions: (B, D, h, w) or tokens (B, K, D) -> (B, D) float32."""
    return features.flatten(2).float().mean(dim=2) if is_map else features.float().mean(dim=1)


def create_backbone(settings: BackboneSettings) -> Backbone:
    """Create the encoder of settings, freshly initialized, whatever `init` says.

    Raises:
        ConfigError: the image size does not fit the backbone.
    """
    return Backbone(
        settings.backbone,
        settings.image_size,
        input_channel=settings.input_channel,
        drop_path=settings.drop_path,
        activation_checkpointing=settings.activation_checkpointing,
    )
