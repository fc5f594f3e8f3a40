"""The masked autoencoder written out plainly, to hold `frepa_dist.models.vit_mae` against.

Written from the paper (He et al., arXiv 2111.06377) and the names of facebookresearch/mae's checkpoints, with
nothing of this system or of timm: functions on a dictionary of weights, attention one head at a time, one
image at a time, patches cut by loops. Slow on purpose; run by the tests in float32 and float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def weight_shapes(
    width: int, depth: int, decoder_width: int, decoder_depth: int, num_patches: int, patch_size: int
) -> dict[str, tuple[int, ...]]:
    """List the names and shapes of an official checkpoint of three channels."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, num_patches + 1, width),
        "patch_embed.proj.weight": (width, 3, patch_size, patch_size),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "decoder_embed.weight": (decoder_width, width),
        "decoder_embed.bias": (decoder_width,),
        "mask_token": (1, 1, decoder_width),
        "decoder_pos_embed": (1, num_patches + 1, decoder_width),
        "decoder_norm.weight": (decoder_width,),
        "decoder_norm.bias": (decoder_width,),
        "decoder_pred.weight": (patch_size**2 * 3, decoder_width),
        "decoder_pred.bias": (patch_size**2 * 3,),
    }
    for prefix, d, count in (("blocks", width, depth), ("decoder_blocks", decoder_width, decoder_depth)):
        layers = {
            "norm1": (d,),
            "attn.qkv": (3 * d, d),
            "attn.proj": (d, d),
            "norm2": (d,),
            "mlp.fc1": (4 * d, d),
            "mlp.fc2": (d, 4 * d),
        }
        for i in range(count):
            for name, shape in layers.items():
                shapes[f"{prefix}.{i}.{name}.weight"] = shape
                shapes[f"{prefix}.{i}.{name}.bias"] = shape[:1]
    return shapes


def position_embedding(width: int, grid_size: int) -> Tensor:
    """Compute the fixed embedding (1, 1 + grid_size^2, width), entry by entry, in float64."""
    rows = [[0.0] * width]
    quarter = width // 4
    for y in range(grid_size):
        for x in range(grid_size):
            values = []
            for place in (x, y):
                for wave in (math.sin, math.cos):
                    values += [wave(place / 10000 ** (k / quarter)) for k in range(quarter)]
            rows.append(values)
    return torch.tensor([rows], dtype=torch.float64)


def cut_patches(image: Tensor, patch_size: int) -> Tensor:
    """Cut one image (3, S, S) into (N, patch_size^2 * 3) values, row by row, channels innermost."""
    patches = []
    for top in range(0, image.shape[1], patch_size):
        for left in range(0, image.shape[2], patch_size):
            patch = image[:, top : top + patch_size, left : left + patch_size]
            patches.append(
                torch.stack([patch[:, i, j] for i in range(patch_size) for j in range(patch_size)])
            )
    return torch.stack([patch.reshape(-1) for patch in patches])


def layer_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    """Normalize the last axis (biased variance, eps 1e-6), scale and shift."""
    centered = x - x.mean(-1, keepdim=True)
    spread = torch.sqrt((centered**2).mean(-1, keepdim=True) + 1e-6)
    return centered / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    """Apply a linear layer."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    """Multiply by the normal distribution's cumulative function."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(x: Tensor, weights: Weights, name: str, heads: int) -> Tensor:
    """Attend within one sequence (T, D), one head after the other."""
    width = x.shape[1]
    head_width = width // heads
    q, k, v = linear(x, weights, f"{name}.qkv").split(width, dim=1)
    mixed = []
    for head in range(heads):
        part = slice(head * head_width, (head + 1) * head_width)
        logits = q[:, part] @ k[:, part].T / math.sqrt(head_width)
        odds = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
        mixed.append(odds / odds.sum(dim=1, keepdim=True) @ v[:, part])
    return linear(torch.cat(mixed, dim=1), weights, f"{name}.proj")


def transformer(x: Tensor, weights: Weights, prefix: str, heads: int) -> Tensor:
    """Apply all the blocks of a prefix to one sequence (T, D)."""
    i = 0
    while f"{prefix}.{i}.norm1.weight" in weights:
        name = f"{prefix}.{i}"
        x = x + attention(layer_norm(x, weights, f"{name}.norm1"), weights, f"{name}.attn", heads)
        hidden = gelu(linear(layer_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1"))
        x = x + linear(hidden, weights, f"{name}.mlp.fc2")
        i += 1
    return x


def image_loss(
    image: Tensor, noise: Tensor, weights: Weights, heads: int, decoder_heads: int, mask_ratio: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask, encode, decode and compare one image.

    Args:
        image: (3, S, S), normalized.
        noise: (N,), distinct values; the patches of the smallest stay.
        weights: named as in `weight_shapes`.
        heads: attention heads of the encoder.
        decoder_heads: of the decoder.
        mask_ratio: share of the patches to remove.

    Returns:
        The mean squared error over removed, normalized patches; the prediction (N, P); the mask (N,), 1 =
        removed.
    """
    kernel = weights["patch_embed.proj.weight"]
    patch_size = kernel.shape[-1]
    patches = cut_patches(image, patch_size)
    num_patches = len(patches)
    keep = sorted(range(num_patches), key=lambda n: float(noise[n]))[: int(num_patches * (1 - mask_ratio))]

    flat_kernel = kernel.permute(2, 3, 1, 0).reshape(-1, kernel.shape[0])
    sequence = [weights["cls_token"][0, 0] + weights["pos_embed"][0, 0]]
    for n in keep:
        embedded = patches[n] @ flat_kernel + weights["patch_embed.proj.bias"]
        sequence.append(embedded + weights["pos_embed"][0, n + 1])
    latent = layer_norm(transformer(torch.stack(sequence), weights, "blocks", heads), weights, "norm")

    visible = linear(latent, weights, "decoder_embed")
    everything = [visible[0]] + [weights["mask_token"][0, 0]] * num_patches
    for position, n in enumerate(keep):
        everything[n + 1] = visible[position + 1]
    decoded = torch.stack(everything) + weights["decoder_pos_embed"][0]
    decoded = layer_norm(
        transformer(decoded, weights, "decoder_blocks", decoder_heads), weights, "decoder_norm"
    )
    prediction = linear(decoded, weights, "decoder_pred")[1:]

    errors = []
    for n in range(num_patches):
        if n in keep:
            continue
        mean = patches[n].mean()
        variance = ((patches[n] - mean) ** 2).sum() / (patches[n].numel() - 1)
        target = (patches[n] - mean) / torch.sqrt(variance + 1e-6)
        errors.append(((prediction[n] - target) ** 2).mean())
    mask = torch.tensor([0.0 if n in keep else 1.0 for n in range(num_patches)])
    return torch.stack(errors).mean(), prediction, mask


def batch_loss(
    images: Tensor, noise: Tensor, weights: Weights, heads: int, decoder_heads: int, mask_ratio: float = 0.75
) -> tuple[Tensor, Tensor, Tensor]:
    """`image_loss` of (B, 3, S, S) images: mean loss, predictions (B, N, P), masks (B, N)."""
    results = [
        image_loss(image, own_noise, weights, heads, decoder_heads, mask_ratio)
        for image, own_noise in zip(images, noise, strict=True)
    ]
    losses, predictions, masks = zip(*results, strict=True)
    return torch.stack(losses).mean(), torch.stack(predictions), torch.stack(masks)
