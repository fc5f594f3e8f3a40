"""The masked autoencoder as a method (He et al., arXiv 2111.06377), and what other methods share with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from frepa_dist.masking import mask_first, num_kept
from frepa_dist.methods.base import (
    Batch,
    Comm,
    InputSettings,
    Losses,
    Method,
    MethodSettings,
    StepInfo,
    SubmoduleSpec,
)
from frepa_dist.models.vit_mae import (
    MaeOutput,
    MaskedAutoencoderViT,
    SizeName,
    create_vit_mae,
    load_mae_checkpoint,
)
from shards.read.windows import to_unit_range
from shards.support.settings import Settings

logger = logging.getLogger(__name__)


class ModelConfig(Settings):
    """The network, and how images are normalized for it.

    Attributes:
        size: name of its widths and depths.
        image_size: side of the training views in pixels, a multiple of the patch size.
        patch_size: side of a patch in pixels.
        mean, std: of the channels, of images scaled to [0, 1]; MAE takes those of ImageNet.
        init: an official MAE or RETFound checkpoint, or safetensors of the same names, to start from.
        activation_checkpointing: recompute the blocks in the backward pass: less memory, more time.
    """

    size: SizeName = "base"
    image_size: int = Field(default=224, ge=1)
    patch_size: int = Field(default=16, ge=1)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    init: Path | None = None
    activation_checkpointing: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
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


class ReconstructionConfig(MethodSettings):
    """What every method with a masked autoencoder has.

    Attributes:
        model: the network.
        mask_ratio: share of the patches that are masked.
        norm_pix_loss: predict the patches normalized one by one.
        hf_masking: mask the high-frequency (HF) tokens before any other (ablation of RetMAE).
    """

    model: ModelConfig = ModelConfig()
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    norm_pix_loss: bool = True
    hf_masking: bool = False

    @model_validator(mode="after")
    def _check_masking(self) -> Self:
        num_kept(self.model.num_patches, self.mask_ratio)
        return self


class MaeConfig(ReconstructionConfig):
    """Settings of plain MAE."""

    name: Literal["mae"] = "mae"


def create_model(config: ReconstructionConfig) -> MaskedAutoencoderViT:
    """Create the network of a config, freshly initialized, whatever `init` says."""
    return create_vit_mae(
        config.model.size,
        image_size=config.model.image_size,
        patch_size=config.model.patch_size,
        norm_pix_loss=config.norm_pix_loss,
        activation_checkpointing=config.model.activation_checkpointing,
    )


def create_student(config: ReconstructionConfig) -> MaskedAutoencoderViT:
    """Create the network of a config as training starts it, from `init` where that is set.

    Raises:
        DataError: the checkpoint is missing or does not fit.
    """
    model = create_model(config)
    if config.model.init is not None:
        logger.info("%s: %s", config.model.init, load_mae_checkpoint(model, config.model.init))
    return model


def normalize_images(batch: Batch, config: InputSettings) -> Tensor:
    """Scale the images of a micro-batch to float32 (B, 3, S, S) of the mean and spread of the model."""
    # channel by channel: constants travel as kernel arguments, and no copy waits for the device
    images = to_unit_range(batch["image"], batch["window"])
    channels = zip(images.unbind(1), config.mean, config.std, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


def reconstruct(student: nn.Module, images: Tensor, batch: Batch, config: ReconstructionConfig) -> MaeOutput:
    """Run the student on normalized images (B, 3, S, S), masked by the batch's noise."""
    noise = batch["mask_noise"]
    if config.hf_masking:
        noise = mask_first(noise, batch["hf_indices"])
    output: MaeOutput = student(images, noise, config.mask_ratio)
    return output


class Mae(Method):
    """Reconstruct the masked patches: one engine, one loss, `rec`."""

    name: ClassVar[str] = "mae"
    config_class = MaeConfig

    def __init__(self, config: MaeConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        self.config = config

    @classmethod
    def create_student(cls, config: MaeConfig) -> MaskedAutoencoderViT:
        """See `Method`."""
        return create_model(config)

    def submodules(self) -> dict[str, SubmoduleSpec]:
        """See `Method`."""
        return {"student": SubmoduleSpec(build=lambda: create_student(self.config), kind="engine")}

    def losses(
        self,
        nets: Mapping[str, nn.Module],
        batch: Batch,
        targets: Mapping[str, Tensor],
        pool: Mapping[str, Tensor],
        info: StepInfo,
        comm: Comm,
    ) -> Losses:
        """See `Method`."""
        images = normalize_images(batch, self.config.model)
        output = reconstruct(nets["student"], images, batch, self.config)
        return Losses(terms={"rec": output.loss}, weights={"rec": 1.0})
