"""The masked autoencoder as a method (He et al., arXiv 2111.06377), and what other methods share with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from frepa_dist.draws import SampleDraws
from frepa_dist.losses import PATCH_VARIANCE_EPS
from frepa_dist.masking import mask_first, num_kept
from frepa_dist.methods.base import (
    Batch,
    Comm,
    InputSettings,
    Losses,
    Method,
    MethodSettings,
    Preview,
    StepInfo,
    SubmoduleSpec,
)
from frepa_dist.methods.restoration import MEASURED_IMAGES
from frepa_dist.models.backbones import Backbone
from frepa_dist.models.mae_checkpoint import load_mae_checkpoint
from frepa_dist.models.masked_backbone import (
    CellEncoder,
    MaskedBackbone,
    check_maskable,
    load_backbone_weights,
)
from frepa_dist.models.masked_settings import ModelConfig
from frepa_dist.models.patches import patchify, reconstruction_target
from frepa_dist.models.response import InputChannelConfig
from frepa_dist.models.vit_mae import (
    VIT_SIZES,
    MaeEncoder,
    MaeOutput,
    MaskedAutoencoderViT,
    create_vit_mae,
)
from frepa_dist.normalization import standardize
from frepa_dist.spectrum import DETAIL_CYCLES, energy_kept
from shards.read.windows import to_unit_range

logger = logging.getLogger(__name__)

MASK_LEVEL = 0.5  # grey in which previews draw masked patches
BORROWED_TONE = (
    "Patches are predicted normalized one by one; they are drawn with the mean and spread of the true ones, "
    "so look at structure, not at tone, and compare their errors with those of the same kind only."
)


class ReconstructionConfig(MethodSettings):
    """What every method with a masked autoencoder has.

    Attributes:
        model: the network.
        mask_ratio: share of the patches that are masked.
        norm_pix_loss: predict the patches normalized one by one.
        hf_masking: mask the high-frequency (HF) tokens before any other (ablation of RetMAE).
        hf_input: the encoder computes a fourth channel from the view, `input_channel` (ablation of RetMAE).
            It is hidden with its patch and not predicted. A filter looks around: next to a masked patch it
            carries a little of that patch's tone.
        input_channel: how that channel is computed.
        target_low_pass_cycles: take what is finer than this many cycles per image side away from what is to
            be predicted (PixMIM, arXiv 2303.02416: 40 at 224 pixels); None: nothing.
    """

    model: ModelConfig = ModelConfig()
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    norm_pix_loss: bool = True
    hf_masking: bool = False
    hf_input: bool = False
    input_channel: InputChannelConfig = InputChannelConfig()
    target_low_pass_cycles: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check_masking(self) -> Self:
        num_kept(self.model.num_patches, self.mask_ratio)
        if self.hf_input and self.model.backbone is not None:
            raise ValueError(
                "hf_input with a backbone: its cells are hidden in the image before it is filtered, and the "
                "filter would answer to their edges; leave out one of the two"
            )
        return self


class MaeConfig(ReconstructionConfig):
    """Settings of plain MAE."""

    name: Literal["mae"] = "mae"


def create_backbone(config: ReconstructionConfig) -> Backbone:
    """Create the hierarchical backbone of a config.

    Raises:
        ConfigError: masking does not make sense for it.
    """
    model = config.model
    assert model.backbone is not None, "called for configs that name a backbone"
    backbone = Backbone(
        model.backbone, model.image_size, activation_checkpointing=model.activation_checkpointing
    )
    check_maskable(backbone)
    return backbone


def create_model(config: ReconstructionConfig) -> MaskedAutoencoderViT | MaskedBackbone:
    """Create the network of a config, freshly initialized, whatever `init` says.

    Raises:
        ConfigError: masking does not make sense for the backbone.
    """
    if config.model.backbone is not None:
        return MaskedBackbone(
            create_backbone(config),
            norm_pix_loss=config.norm_pix_loss,
            target_low_pass_cycles=config.target_low_pass_cycles,
        )
    return create_vit_mae(
        config.model.size,
        image_size=config.model.image_size,
        patch_size=config.model.patch_size,
        norm_pix_loss=config.norm_pix_loss,
        input_channel=config.input_channel if config.hf_input else None,
        target_low_pass_cycles=config.target_low_pass_cycles,
        activation_checkpointing=config.model.activation_checkpointing,
    )


def create_encoder(config: ReconstructionConfig) -> MaeEncoder | CellEncoder:
    """Create the encoder of a config alone: its parameter names are a subset of the whole network's."""
    if config.model.backbone is not None:
        return CellEncoder(create_backbone(config))
    return MaeEncoder(
        VIT_SIZES[config.model.size],
        image_size=config.model.image_size,
        patch_size=config.model.patch_size,
        in_channels=3,
        input_channel=config.input_channel if config.hf_input else None,
    )


def encoder_width(config: ReconstructionConfig) -> int:
    """Return the width of the encoder's features, without its weights."""
    with torch.device("meta"):
        return create_encoder(config).width


def create_student(config: ReconstructionConfig) -> MaskedAutoencoderViT | MaskedBackbone:
    """Create the network of a config as training starts it, from `init` where that is set.

    Raises:
        ConfigError: masking does not make sense for the backbone.
        DataError: the checkpoint is missing or does not fit.
    """
    model, path = create_model(config), config.model.init
    if path is None:
        return model
    if isinstance(model, MaskedBackbone):
        words = load_backbone_weights(model, path)
    else:
        words = load_mae_checkpoint(model, path)
    logger.info("%s: %s", path, words)
    return model


def normalize_images(batch: Batch, config: InputSettings) -> Tensor:
    """Scale the images of a micro-batch to float32 (B, 3, S, S) of the mean and spread of the model."""
    return standardize(to_unit_range(batch["image"], batch["window"]), config.mean, config.std)


def reconstruct(student: nn.Module, images: Tensor, batch: Batch, config: ReconstructionConfig) -> MaeOutput:
    """Run the student on normalized images (B, 3, S, S), masked by the batch's noise."""
    noise = batch["mask_noise"]
    if config.hf_masking:
        noise = mask_first(noise, batch["hf_indices"])
    output: MaeOutput = student(images, noise, config.mask_ratio)
    return output


def denormalize_patches(pred: Tensor, patches: Tensor, norm_pix_loss: bool) -> Tensor:
    """Undo the normalization of predicted patches (B, N, P) by mean and variance of the true ones.

    The inverse of `losses.normalize_patches`; nothing to undo without `norm_pix_loss`.
    """
    if not norm_pix_loss:
        return pred
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return pred * (variance + PATCH_VARIANCE_EPS).sqrt() + mean


@torch.no_grad()
def masked_detail(
    output: MaeOutput, images: Tensor, config: ReconstructionConfig, info: StepInfo
) -> dict[str, Tensor]:
    """See `restoration.detail_metrics`: of the patches that were hidden, each by itself, in grey.

    Put together, they would have edges of their own, which are no detail. Where patches are predicted
    normalized they get the spread of the true ones first.

    Args:
        output: of the network.
        images: (B, 3, S, S), what it was run on.
        config: the settings.
        info: where training stands.
    """
    if not info.is_logged:
        return {}
    size, images = config.model.patch_size, images[:MEASURED_IMAGES]
    target = reconstruction_target(images, size, config.target_low_pass_cycles)
    predicted = denormalize_patches(output.pred[: len(images)].float(), target, config.norm_pix_loss)
    squares = [p.reshape(*p.shape[:2], size, size, -1).mean(-1) for p in (predicted, patchify(images, size))]
    cutoff = DETAIL_CYCLES * size / config.model.image_size  # cycles per patch
    return {"hf_share": energy_kept(squares[0], squares[1], cutoff, output.mask[: len(images)]).nanmean()}


@torch.no_grad()
def preview_masked(
    student: nn.Module, images: Tensor, config: ReconstructionConfig, draw_keys: Sequence[int]
) -> list[Preview]:
    """Show what the decoder makes of randomly masked patches; see `Method.previews`.

    With `norm_pix_loss` patches drawn as they are predicted look wrong whatever the model is worth. Each is
    brought back by mean and spread of the true patch, which the picture thus borrows.
    """
    model = config.model
    generators = SampleDraws(draw_keys, "cpu").generators("preview")
    drawn = [generator.random(model.num_patches) for generator in generators]
    noise = torch.from_numpy(np.stack(drawn)).to(images)
    scale, shift = (images.new_tensor(values).view(-1, 1, 1) for values in (model.std, model.mean))
    normalized = (images - shift) / scale
    output = student(normalized, noise, config.mask_ratio)
    target = reconstruction_target(normalized, model.patch_size, config.target_low_pass_cycles)
    patches = denormalize_patches(output.pred, target, config.norm_pix_loss)
    predicted = (student.unpatchify(patches) * scale + shift).clamp(0, 1)  # type: ignore[operator]
    removed = student.unpatchify(output.mask[:, :, None].expand_as(patches))[:, :1] > 0  # type: ignore[operator]
    return [
        Preview(
            name=f"{config.mask_ratio:.0%} of {model.patch_size}-pixel patches hidden",
            seen=torch.where(removed, MASK_LEVEL, images),
            predicted=torch.where(removed, predicted, images),
            hidden=removed,
            note=BORROWED_TONE if config.norm_pix_loss else "",
        )
    ]


class Mae(Method):
    """Reconstruct the masked patches: one engine, one loss, `rec`."""

    name: ClassVar[str] = "mae"
    config_class = MaeConfig

    def __init__(self, config: MaeConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        self.config = config

    @classmethod
    def create_student(cls, config: MaeConfig) -> MaskedAutoencoderViT | MaskedBackbone:
        """See `Method`."""
        return create_model(config)

    @classmethod
    def previews(
        cls, student: nn.Module, images: Tensor, config: MaeConfig, draw_keys: Sequence[int]
    ) -> list[Preview]:
        """See `Method`."""
        return preview_masked(student, images, config, draw_keys)

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
        return Losses(
            terms={"rec": output.loss},
            weights={"rec": 1.0},
            metrics=masked_detail(output, images, self.config, info),
        )
