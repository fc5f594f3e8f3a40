"""Settings of a masked autoencoder: which network, and how images are normalized for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from frepa_dist.models.catalog import BACKBONES, check_image_size
from frepa_dist.models.vit_mae import SizeName
from shards.support.errors import ConfigError
from shards.support.settings import Settings


class ModelConfig(Settings):
    """The network, and how images are normalized for it.

    Attributes:
        size: name of its widths and depths.
        backbone: a hierarchical one of `models.catalog.BACKBONES` in place of the vision transformer of
            `size`; see `models.masked_backbone`. None: the vision transformer.
        image_size: side of the training views in pixels, a multiple of the patch size.
        patch_size: side of a patch in pixels; of a backbone the stride of its map, which is its default.
        mean, std: of the channels, of images scaled to [0, 1]; MAE takes those of ImageNet.
        init: an official MAE or RETFound checkpoint, or safetensors of the same names, to start from; for a
            backbone a run or exported folder, or a file of timm's names.
        activation_checkpointing: recompute the blocks in the backward pass: less memory, more time.
    """

    size: SizeName = "base"
    backbone: str | None = None
    image_size: int = Field(default=224, ge=1)
    patch_size: int = Field(default=16, ge=1)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    init: Path | None = None
    activation_checkpointing: bool = False

    @model_validator(mode="before")
    @classmethod
    def _take_stride(cls, data: Any) -> Any:
        """A backbone's cells are the positions of its map, unless something else is said (and refused)."""
        name = data.get("backbone") if isinstance(data, Mapping) else None
        if not isinstance(name, str) or name not in BACKBONES or "patch_size" in data:
            return data
        return {**data, "patch_size": BACKBONES[name].stride}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.backbone is not None:
            _check_backbone(self.backbone, self.image_size, self.patch_size)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if min(self.std) <= 0:
            raise ValueError("'std' must be positive")
        return self

    @property
    def num_patches(self) -> int:
        """N, of a view."""
        return (self.image_size // self.patch_size) ** 2


def _check_backbone(name: str, image_size: int, patch_size: int) -> None:
    """Make sure that cells of a backbone can be masked in images of a size.

    Raises:
        ValueError: they cannot, or there is no such backbone.
    """
    hierarchical = [key for key, entry in BACKBONES.items() if entry.family != "vit"]
    if name not in hierarchical:
        why = "a vision transformer is chosen by `size`" if name in BACKBONES else "no such backbone"
        raise ValueError(f"backbone {name!r}: {why}; allowed: {', '.join(hierarchical)}")
    try:
        check_image_size(name, image_size)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    stride = BACKBONES[name].stride
    if patch_size != stride:
        raise ValueError(f"patch_size {patch_size}: a cell of {name} has {stride} pixels; leave it out")
