"""Small masked autoencoders, weights for them, and the reference that they are held against."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

from frepa_dist.models.vit_mae import VIT_SIZES, create_vit_mae

_SPEC = importlib.util.spec_from_file_location(
    "mae_reference", Path(__file__).parents[3] / "tools" / "mae_reference.py"
)
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)


def shapes_of(size: str, num_patches: int, patch_size: int = 16) -> dict[str, tuple[int, ...]]:
    s = VIT_SIZES[size]
    return reference.weight_shapes(
        s.width, s.depth, s.decoder_width, s.decoder_depth, num_patches, patch_size
    )


def random_weights(size: str, num_patches: int, patch_size: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.02 * torch.randn(shape, generator=generator)
        for name, shape in shapes_of(size, num_patches, patch_size).items()
    }


def jiggle(model: nn.Module) -> None:
    """Move every weight off its initial value, so that no bias or norm is a no-op."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def small_model(size: str = "tiny", **settings) -> nn.Module:
    torch.manual_seed(0)
    model = create_vit_mae(size, image_size=32, patch_size=8, **settings)
    jiggle(model)
    return model


def inputs(image_size: int, num_patches: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(batch, 3, image_size, image_size, generator=generator)
    return images, torch.rand(batch, num_patches, generator=generator)
