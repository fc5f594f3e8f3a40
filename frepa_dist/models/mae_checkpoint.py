"""Official MAE and RETFound checkpoints, loaded strictly into a masked autoencoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from frepa_dist.models.init import (
    interpolate_position_embedding,
    is_grid_embedding,
    load_strictly,
    read_weights,
)
from frepa_dist.models.vit_mae import MaskedAutoencoderViT


def load_mae_checkpoint(model: MaskedAutoencoderViT, path: Path) -> str:
    """Load an official MAE or RETFound checkpoint, or a safetensors file of the same names, strictly.

    Files of the encoder alone load too, and leave the decoder as it was initialized. Position embeddings of
    another image size are interpolated. A model with a further input channel takes files of three channels:
    the new one starts with zeros in the patch projection, so that at first it changes nothing.

    Returns:
        What was loaded, in words.

    Raises:
        DataError: the file is not such a checkpoint, or does not fit the model; the keys are named.
    """
    weights = read_weights(path)
    encoder_only = not any(_is_decoder(key) for key in weights)
    resized = []
    for key in ("pos_embed", "decoder_pos_embed"):
        embedding = weights.get(key)
        if (
            embedding is not None
            and is_grid_embedding(embedding)
            and len(embedding[0]) != 1 + model.num_patches
        ):
            weights[key] = interpolate_position_embedding(embedding, model.num_patches)
            resized.append(key)
    fresh = {key: value for key, value in model.state_dict().items() if encoder_only and _is_decoder(key)}
    padded = _pad_patch_projection(weights, model)
    load_strictly(model, weights | fresh, path)
    words = "encoder loaded, decoder freshly initialized" if encoder_only else "encoder and decoder loaded"
    if padded:
        words += "; the patch projection of the added input channel starts at zero"
    return f"{words}; interpolated: {', '.join(resized)}" if resized else words


def _pad_patch_projection(weights: dict[str, Tensor], model: MaskedAutoencoderViT) -> bool:
    """Add zeros for an input channel that the file knows nothing of, in place; tell whether it was needed."""
    key = "patch_embed.proj.weight"
    kernel = weights.get(key)
    if kernel is None or model.input_channel is None or kernel.ndim != 4:
        return False
    if kernel.shape[1] != model.in_channels:
        return False
    weights[key] = torch.cat([kernel, kernel.new_zeros(len(kernel), 1, *kernel.shape[2:])], dim=1)
    return True


def _is_decoder(key: str) -> bool:
    return key.startswith(("decoder_", "mask_token"))
