"""The masked autoencoder (He et al., arXiv 2111.06377), with the state-dict names of facebookresearch/mae.

Official MAE and RETFound checkpoints therefore load strictly (`models.mae_checkpoint`). The layers are
timm's. Two variants differ from the reference: a further input channel (RetMAE's "HF input"), and a
low-passed target (PixMIM).

Shapes: B batch, C channels, S image side, p patch side, N patches, K patches kept, D encoder width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from frepa_dist.losses import masked_patch_loss
from frepa_dist.masking import random_masking
from frepa_dist.models.init import TOKEN_STD, init_layers, sincos_position_embedding
from frepa_dist.models.patches import patchify, reconstruction_target, unpatchify
from frepa_dist.models.response import InputChannelConfig, append_input_channel
from shards.support.errors import ConfigError

SizeName = Literal["tiny", "small", "base", "large"]


class VitSize(NamedTuple):
    """Widths, depths and numbers of attention heads of encoder and decoder."""

    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int


# base and large are those of the MAE paper; tiny and small have DeiT's encoder and a decoder in proportion
VIT_SIZES: Mapping[SizeName, VitSize] = {
    "tiny": VitSize(192, 12, 3, 128, 4, 4),
    "small": VitSize(384, 12, 6, 256, 6, 8),
    "base": VitSize(768, 12, 12, 512, 8, 16),
    "large": VitSize(1024, 24, 16, 512, 8, 16),
}


class MaeOutput(NamedTuple):
    """What a forward pass of the autoencoder gives.

    Attributes:
        loss: 0-dim float32, the error on the removed patches.
        pred: (B, N, p * p * C) prediction, normalized patch by patch where the loss is.
        mask: (B, N) float32, 1 = removed.
        latent: (B, 1 + K, D) class token and visible patches after the final norm; (B, K, D) of a network
            without a class token.
        pooled: (B, D) float32, the mean of the visible patches.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor
    latent: Tensor
    pooled: Tensor


def create_blocks(width: int, depth: int, heads: int) -> nn.ModuleList:
    """Create pre-norm transformer blocks, with biases and LayerNorm at eps 1e-6 as in the reference."""
    from timm.models.vision_transformer import Block

    norm = partial(nn.LayerNorm, eps=1e-6)
    return nn.ModuleList(
        Block(width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth)
    )


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens (B, N, D) by index (B, K) -> (B, K, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class EncoderTrunk(nn.Module):
    """What the autoencoder and its encoder alone have in common: the encoder's weights, and `encode`.

    Args:
        size: widths and depths.
        image_size: S, a multiple of the patch size.
        patch_size: p.
        in_channels: C.
        input_channel: a further channel that the encoder computes from the images it is given.
        activation_checkpointing: recompute the blocks in the backward pass to save memory.
    """

    def __init__(
        self,
        size: VitSize,
        *,
        image_size: int,
        patch_size: int,
        in_channels: int,
        input_channel: InputChannelConfig | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ConfigError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}",
                fix="choose an image size that the patches fill",
            )
        self.image_size, self.patch_size, self.in_channels = image_size, patch_size, in_channels
        self.width, self.num_patches = size.width, (image_size // patch_size) ** 2
        self.input_channel, self.activation_checkpointing = input_channel, activation_checkpointing

        from timm.layers import PatchEmbed

        num_inputs = in_channels + (input_channel is not None)
        self.patch_embed = PatchEmbed(image_size, patch_size, num_inputs, size.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.pos_embed = nn.Parameter(
            sincos_position_embedding(size.width, image_size // patch_size), requires_grad=False
        )
        self.blocks = create_blocks(size.width, size.depth, size.heads)
        self.norm = nn.LayerNorm(size.width, eps=1e-6)

        init_layers(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=TOKEN_STD)

    def run_blocks(self, blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
        """Apply blocks in turn, recomputing them in the backward pass if so configured."""
        for block in blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return tokens

    def encode(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode all patches, or those named.

        Args:
            images: (B, C, S, S) normalized, any float dtype; it is cast to that of the weights. The input
                channel, where there is one, is computed from all of each image.
            ids_keep: (B, K) patches to encode, row-major indices; None for all of them.

        Returns:
            (B, 1 + K, D) class token and patches in the order of `ids_keep`, after the final norm.
        """
        if self.input_channel is not None:
            images = append_input_channel(images, self.input_channel)
        tokens = self.patch_embed(images.to(self.patch_embed.proj.weight.dtype)) + self.pos_embed[:, 1:]
        if ids_keep is not None:
            tokens = gather_tokens(tokens, ids_keep)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([cls_token, tokens], dim=1)
        return self.norm(self.run_blocks(self.blocks, tokens))  # type: ignore[no-any-return]

    def embed(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """See `methods.base.Student`: the mean patch token; the class token is left out."""
        return self.encode(images, ids_keep)[:, 1:].mean(dim=1)

    def map(self, images: Tensor) -> Tensor:
        """Give the patch tokens after the final norm as a map: (B, C, S, S) -> (B, D, S / p, S / p)."""
        side = self.image_size // self.patch_size
        return self.encode(images)[:, 1:].transpose(1, 2).reshape(len(images), self.width, side, side)


class MaeEncoder(EncoderTrunk):
    """The encoder alone; its state dict is the encoder's part of `MaskedAutoencoderViT`'s."""

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """See `encode`."""
        return self.encode(images, ids_keep)


class MaskedAutoencoderViT(EncoderTrunk):
    """Encoder on the visible patches, decoder on all of them, loss on the masked ones.

    Args:
        size: widths and depths.
        image_size: S, a multiple of the patch size.
        patch_size: p.
        in_channels: C.
        norm_pix_loss: predict the patches normalized one by one.
        input_channel: see `EncoderTrunk`; it is hidden with its patch, and never predicted.
        target_low_pass_cycles: see `reconstruction_target`.
        activation_checkpointing: recompute the blocks in the backward pass to save memory.
    """

    def __init__(
        self,
        size: VitSize,
        *,
        image_size: int,
        patch_size: int,
        in_channels: int,
        norm_pix_loss: bool = True,
        input_channel: InputChannelConfig | None = None,
        target_low_pass_cycles: float | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            size,
            image_size=image_size,
            patch_size=patch_size,
            in_channels=in_channels,
            input_channel=input_channel,
            activation_checkpointing=activation_checkpointing,
        )
        self.norm_pix_loss, self.target_low_pass_cycles = norm_pix_loss, target_low_pass_cycles
        width = size.decoder_width
        self.decoder_embed = nn.Linear(size.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(
            sincos_position_embedding(width, image_size // patch_size), requires_grad=False
        )
        self.decoder_blocks = create_blocks(width, size.decoder_depth, size.decoder_heads)
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, patch_size**2 * in_channels)

        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_norm, self.decoder_pred):
            init_layers(module)
        nn.init.normal_(self.mask_token, std=TOKEN_STD)

    def patchify(self, images: Tensor) -> Tensor:
        """See `patchify`: with the model's patch size."""
        return patchify(images, self.patch_size)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """See `unpatchify`: with the model's patch size."""
        return unpatchify(patches, self.patch_size)

    def decode(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict all patches (B, N, p * p * C) from the visible ones (B, 1 + K, D)."""
        tokens = self.decoder_embed(latent)
        num_masked = ids_restore.shape[1] + 1 - tokens.shape[1]
        masked = self.mask_token.expand(len(tokens), num_masked, -1)
        patches = gather_tokens(torch.cat([tokens[:, 1:], masked], dim=1), ids_restore)
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + self.decoder_pos_embed
        tokens = self.decoder_norm(self.run_blocks(self.decoder_blocks, tokens))
        return self.decoder_pred(tokens)[:, 1:]  # type: ignore[no-any-return]

    def forward(self, images: Tensor, noise: Tensor | None = None, mask_ratio: float = 0.75) -> MaeOutput:
        """Mask, encode, decode and compare.

        Args:
            images: (B, C, S, S) normalized; the target is computed in float32, so keep them in it.
            noise: (B, N) float32, the largest values are masked; None draws it from torch's generator.
            mask_ratio: share of the patches to mask.
        """
        if noise is None:
            noise = torch.rand(len(images), self.num_patches, device=images.device)
        ids_keep, ids_restore, mask = random_masking(noise, mask_ratio)
        latent = self.encode(images, ids_keep)
        pred = self.decode(latent, ids_restore)
        target = reconstruction_target(images, self.patch_size, self.target_low_pass_cycles)
        loss = masked_patch_loss(pred, target, mask, norm_pix_loss=self.norm_pix_loss)
        return MaeOutput(loss, pred, mask, latent, pool_tokens(latent))


def pool_tokens(tokens: Tensor) -> Tensor:
    """Average the patches of (B, 1 + K, D), without the class token, in float32 -> (B, D)."""
    return tokens[:, 1:].float().mean(dim=1)


def create_vit_mae(
    size: SizeName,
    *,
    image_size: int = 224,
    patch_size: int = 16,
    in_channels: int = 3,
    norm_pix_loss: bool = True,
    input_channel: InputChannelConfig | None = None,
    target_low_pass_cycles: float | None = None,
    fused_attention: bool = True,
    activation_checkpointing: bool = False,
) -> MaskedAutoencoderViT:
    """Create a freshly initialized masked autoencoder of a named size.

    Raises:
        ConfigError: the image size is not a multiple of the patch size.
    """
    model = MaskedAutoencoderViT(
        VIT_SIZES[size],
        image_size=image_size,
        patch_size=patch_size,
        in_channels=in_channels,
        norm_pix_loss=norm_pix_loss,
        input_channel=input_channel,
        target_low_pass_cycles=target_low_pass_cycles,
        activation_checkpointing=activation_checkpointing,
    )
    use_fused_attention(model, fused_attention)
    return model


def use_fused_attention(model: nn.Module, fused: bool) -> None:
    """Choose between PyTorch's fused attention and explicit matrix products; the result is the same.

    Fused is faster but for bf16 on a CPU, where its backward pass takes several times as long. It reaches all
    of timm's attention that has the choice: vision transformers and Swin; SwinV2's cosine attention is never
    fused.
    """
    for module in model.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = fused  # type: ignore[assignment]
