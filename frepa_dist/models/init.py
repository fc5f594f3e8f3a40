"""Where the weights of a masked autoencoder start: position embeddings, layers, or a file.

The initial values are those of facebookresearch/mae: fixed sine-cosine positions, Xavier-uniform linear
layers (the patch projection counts as one), zero biases, tokens drawn from N(0, 0.02^2).
"""

from __future__ import annotations

import argparse
import math
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from shards.support.errors import DataError

TOKEN_STD = 0.02


def sincos_position_embedding(width: int, grid_size: int) -> Tensor:
    """Embed the places of a square grid, a zero row for the class token first.

    Args:
        width: of the embedding, divisible by 4. The first half encodes the column, the second the row; each
            is the sines, then the cosines, of `width / 4` wavelengths from 2 pi to 10,000 * 2 pi patches.
        grid_size: patches along a side.

    Returns:
        (1, 1 + grid_size^2, width) float32, places in row-major order.
    """
    assert width % 4 == 0, "the width holds sines and cosines of two coordinates"
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = line[None].expand(grid_size, -1, -1)
    rows = line[:, None].expand(-1, grid_size, -1)
    grid = torch.cat([columns, rows], dim=2).reshape(grid_size**2, width)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), grid]).float()[None]


def interpolate_position_embedding(embedding: Tensor, num_patches: int) -> Tensor:
    """Resize the grid part of a position embedding, bicubically; the class token's row stays.

    Args:
        embedding: (1, 1 + M, D), M a square number.
        num_patches: a square number.

    Returns:
        (1, 1 + num_patches, D); the very input where the sizes agree.
    """
    if embedding.shape[1] == 1 + num_patches:
        return embedding
    old, new = math.isqrt(embedding.shape[1] - 1), math.isqrt(num_patches)
    grid = embedding[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, num_patches, -1).to(embedding.dtype)
    return torch.cat([embedding[:, :1], grid], dim=1)


def is_grid_embedding(embedding: Tensor) -> bool:
    """Tell whether a tensor is (1, 1 + M, D) with M a square number."""
    if embedding.ndim != 3 or len(embedding) != 1 or embedding.shape[1] < 2:
        return False
    num_patches = embedding.shape[1] - 1
    return math.isqrt(num_patches) ** 2 == num_patches


@torch.no_grad()
def init_layers(model: nn.Module) -> None:
    """Initialize every linear layer and norm of a model; convolutions and bare parameters are left alone."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read named tensors from a safetensors file or a PyTorch checkpoint, without running any code of it.

    Official MAE and RETFound files hold the weights under `model`, beside the `argparse.Namespace` of their
    training, which is the one class let through.

    Raises:
        DataError: the file is missing, damaged, or holds anything but named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"the weights cannot be read: {error.strerror or error}", where=path) from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(
            "not a checkpoint that can be read safely",
            where=path,
            allowed="safetensors, or a PyTorch file of tensors and plain values",
            fix="fetch the file again, or convert it to safetensors",
        ) from error
    weights = data.get("model", data.get("state_dict", data)) if isinstance(data, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise DataError(
            "the file holds no named tensors",
            where=path,
            allowed="a state dict, or one under 'model' or 'state_dict'",
        )
    return dict(weights)


def load_strictly(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load a state dict into a model of exactly its names and shapes.

    Raises:
        DataError: a name or a shape differs; the first ones are named.
    """
    expected = model.state_dict()
    problems = [f"{key} is missing" for key in expected.keys() - weights.keys()]
    problems += [f"{key} is unknown" for key in weights.keys() - expected.keys()]
    problems += [
        f"{key} has shape {tuple(weights[key].shape)}, not {tuple(expected[key].shape)}"
        for key in expected.keys() & weights.keys()
        if weights[key].shape != expected[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise DataError(
            f"the weights do not fit the model: {', '.join(sorted(problems)[:6])}{more}",
            where=path,
            fix="choose the architecture, model size and patch size that they were trained with",
        )
    model.load_state_dict(weights)
