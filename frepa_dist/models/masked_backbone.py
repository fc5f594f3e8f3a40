"""Masked modelling for backbones that see the whole image (SimMIM, Xie et al., arXiv 2111.09886).

Swin, ConvNeXt and ResNets cannot leave tokens out as MAE does. Cells, as large as one position of the last
map (32 pixels), are hidden in the image instead, all of it is encoded, a linear head predicts the cells from
the map, and the loss is that of MAE on the hidden ones. As in SimMIM the head is one layer.

Hidden pixels have one fixed color, and not that of a learned token: so the encoder is the plain backbone, of
which nothing else must be exported, averaged or kept equal between student and teacher. The color is not 0,
the mean of normalized images: a convolution without bias makes 0 of it, and each LayerNorm over channels that
are all 0 multiplies the gradient by 1 / sqrt(eps), a thousand; a fresh ConvNeXt's came out at 10^9 and more.

What only some cells tell is the encoding of the image in which all others are hidden, averaged over the
positions of those cells: that is Z of RetMAE for the visible cells, and Z_c for the high-frequency ones.

Shapes: B batch, S image side, p cell side, N = (S / p)^2 cells, K cells shown, D width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from frepa_dist.losses import masked_patch_loss
from frepa_dist.masking import random_masking
from frepa_dist.models.backbones import Backbone, pool
from frepa_dist.models.init import init_layers, load_strictly, read_weights
from frepa_dist.models.initialize import adapt_weights, find_weights
from frepa_dist.models.patches import patchify, reconstruction_target, unpatchify
from frepa_dist.models.vit_mae import MaeOutput, gather_tokens
from shards.support.errors import ConfigError

HEAD = "decoder_pred."
# of normalized images: about one standard deviation off their mean, and of a hue that no grey image has
HIDDEN = (1.0, -1.0, 1.0)


def show_cells(images: Tensor, ids_keep: Tensor, cell_size: int) -> Tensor:
    """Hide all but some cells of normalized images.

    Args:
        images: (B, 3, S, S).
        ids_keep: (B, K) row-major indices of the cells that stay.
        cell_size: p.

    Returns:
        (B, 3, S, S), the color `HIDDEN` in every hidden cell.
    """
    B, _, S, _ = images.shape
    side = S // cell_size
    shown = images.new_zeros(B, side * side).scatter(1, ids_keep, 1.0).view(B, side, 1, side, 1) > 0
    cells = images.reshape(B, 3, side, cell_size, side, cell_size).unbind(1)
    # chosen, not multiplied: what is hidden may be anything, infinity too; channel by channel: constants
    # travel as kernel arguments, and no copy waits for the device
    channels = [torch.where(shown, own, color) for own, color in zip(cells, HIDDEN, strict=True)]
    return torch.stack(channels, dim=1).reshape(B, 3, S, S)


def map_tokens(features: Tensor) -> Tensor:
    """Bring a map (B, D, h, w) into row-major tokens (B, h w, D)."""
    return features.flatten(2).transpose(1, 2)


class CellTrunk(nn.Module):
    """What the masked backbone and its encoder alone have in common.

    Attributes:
        width: D.
        image_size: S.
        patch_size: p, the stride of the backbone's map.
    """

    def __init__(self, encoder: Backbone) -> None:
        super().__init__()
        self.encoder = encoder
        self.width, self.image_size, self.patch_size = encoder.width, encoder.image_size, encoder.stride

    def embed(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Give the mean feature of normalized images (B, 3, S, S), or of their cells (B, K), shown alone.

        Returns:
            (B, D) float32.
        """
        if ids_keep is None:
            return pool(self.encoder(images), is_map=True)
        features = self.encoder(show_cells(images, ids_keep, self.patch_size))
        return pool(gather_tokens(map_tokens(features), ids_keep), is_map=False)

    def map(self, images: Tensor) -> Tensor:
        """Give the backbone's map of whole images: (B, 3, S, S) normalized -> (B, D, S / p, S / p)."""
        return self.encoder(images)  # type: ignore[no-any-return]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay although they have more than one dimension."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}


class CellEncoder(CellTrunk):
    """A backbone that embeds an image, or some of its cells: what an EMA teacher is.

    Its parameter names are a subset of `MaskedBackbone`'s.
    """

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """See `embed`."""
        return self.embed(images, ids_keep)


class MaskedBackbone(CellTrunk):
    """Backbone on the image with hidden cells, linear head, loss on those; a `methods.base.Student`.

    Args:
        encoder: a hierarchical backbone.
        norm_pix_loss: predict the cells normalized one by one.
        target_low_pass_cycles: see `patches.reconstruction_target`.

    Raises:
        ConfigError: the backbone is a vision transformer, or normalizes over the batch.
    """

    def __init__(
        self, encoder: Backbone, *, norm_pix_loss: bool = True, target_low_pass_cycles: float | None = None
    ) -> None:
        super().__init__(encoder)
        check_maskable(encoder)
        self.norm_pix_loss, self.target_low_pass_cycles = norm_pix_loss, target_low_pass_cycles
        self.num_patches = (self.image_size // self.patch_size) ** 2
        self.decoder_pred = nn.Linear(self.width, self.patch_size**2 * 3)
        init_layers(self.decoder_pred)

    def patchify(self, images: Tensor) -> Tensor:
        """See `patches.patchify`: with the cell size."""
        return patchify(images, self.patch_size)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """See `patches.unpatchify`: with the cell size."""
        return unpatchify(patches, self.patch_size)

    def forward(self, images: Tensor, noise: Tensor | None = None, mask_ratio: float = 0.75) -> MaeOutput:
        """Hide, encode, predict and compare; arguments as of `vit_mae.MaskedAutoencoderViT.forward`."""
        if noise is None:
            noise = torch.rand(len(images), self.num_patches, device=images.device)
        ids_keep, _, mask = random_masking(noise, mask_ratio)
        tokens = map_tokens(self.encoder(show_cells(images, ids_keep, self.patch_size)))
        pred = self.decoder_pred(tokens)
        target = reconstruction_target(images, self.patch_size, self.target_low_pass_cycles)
        loss = masked_patch_loss(pred, target, mask, norm_pix_loss=self.norm_pix_loss)
        latent = gather_tokens(tokens, ids_keep)
        return MaeOutput(loss, pred, mask, latent, pool(latent, is_map=False))


def check_maskable(encoder: Backbone) -> None:
    """Make sure that hiding cells makes sense for a backbone.

    Raises:
        ConfigError: it does not.
    """
    if encoder.can_drop_tokens:
        raise ConfigError(
            f"{encoder.name} can leave its patches out: hiding them would be a waste",
            where="method.model.backbone",
            allowed="hierarchical backbones: swin*, swinv2*, convnext*, convnextv2*, resnet*",
            fix="leave `backbone` out and choose the vision transformer by `size`",
        )
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules()):
        raise ConfigError(
            f"{encoder.name} has BatchNorm: its statistics depend on how a batch is cut, and those of images "
            "that are mostly hidden differ between student and teacher",
            where="method.model.backbone",
            fix="choose a backbone whose norms work within one image",
        )


def load_backbone_weights(model: MaskedBackbone, path: Path) -> str:
    """Load a run folder (this network's or Frepa's), an exported folder, or a file of timm's names, strictly.

    Returns:
        What was loaded, in words.

    Raises:
        DataError: there are no weights, or they do not fit; the keys are named.
    """
    file = find_weights(path)
    weights = read_weights(file)
    head = {key: weights.pop(key) for key in list(weights) if key.startswith(HEAD)}
    trunk, notes = adapt_weights(weights, model.encoder)
    load_strictly(model.encoder.trunk, trunk, file)
    if head:
        load_strictly(
            model.decoder_pred, {key.removeprefix(HEAD): value for key, value in head.items()}, file
        )
    loaded = "encoder and head loaded" if head else "encoder loaded, head freshly initialized"
    return "; ".join([loaded, *notes])
