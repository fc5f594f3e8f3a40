"""What of a student is exported, and which of timm's architectures it is."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from frepa_dist.config import RunConfig
from frepa_dist.models.backbones import Backbone
from frepa_dist.models.catalog import WINDOWED, Family, find_backbone, timm_arguments, window_size
from frepa_dist.models.vit_mae import VIT_SIZES, EncoderTrunk, MaskedAutoencoderViT, SizeName
from shards.support.errors import ConfigError

ARCHITECTURES = {
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
}
"""timm's models of the same widths; image and patch size are given as arguments."""

MAE_ENCODER_PARTS = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
FAMILY_NAMES: dict[Family, str] = {
    "vit": "Vision transformer without a class token",
    "swin": "Swin transformer",
    "swinv2": "Swin transformer V2",
    "convnext": "ConvNeXt, its last norm before the pooling",
    "convnextv2": "ConvNeXt V2, its last norm before the pooling",
    "resnet": "ResNet with GroupNorm instead of BatchNorm",
}


class Layout(NamedTuple):
    """An encoder as timm builds it.

    Attributes:
        architecture: timm's name.
        arguments: for timm, beside it.
        weights: under timm's names, without a head.
        width: D of its features.
        image_size: side of its images.
        first_conv, classifier: timm's names of the first layer, and of the head that is not there.
        network: the encoder in words, for the card.
        feature: what the feature of an image is, in words.
        min_max: whether each image is scaled by its own smallest and largest value.
    """

    architecture: str
    arguments: dict[str, Any]
    weights: dict[str, Tensor]
    width: int
    image_size: int
    first_conv: str
    classifier: str
    network: str
    feature: str
    min_max: bool


def describe_layout(student: nn.Module, config: RunConfig) -> Layout:
    """Say how timm builds the encoder of a student.

    Raises:
        ConfigError: timm cannot: the encoder computes an input channel of its own, or is of no known kind.
    """
    encoder = getattr(student, "encoder", student)
    if getattr(encoder, "input_channel", None) is not None:
        raise ConfigError(
            "this encoder computes a fourth input channel from each image, which timm cannot",
            where="method.model",
            allowed="encoders of three channels",
            fix="evaluate the run folder itself, or train without `input_channel`",
        )
    min_max = bool(getattr(config.method.input, "min_max", False))
    if isinstance(encoder, Backbone):
        return _backbone_layout(encoder, min_max)
    if isinstance(encoder, EncoderTrunk):
        return _mae_layout(encoder, config, min_max)
    raise ConfigError(
        f"no way is known to export a {type(encoder).__name__}",
        where="method.name",
        allowed=f"students that are a {MaskedAutoencoderViT.__name__}, or have a {Backbone.__name__}",
    )


def _backbone_layout(encoder: Backbone, min_max: bool) -> Layout:
    entry, timm_names = find_backbone(encoder.name), encoder.trunk.pretrained_cfg
    network = FAMILY_NAMES[entry.family]
    if entry.family in WINDOWED:
        network += f", windows of {window_size(encoder.image_size)} x {window_size(encoder.image_size)}"
    norm = (
        "last activation (it has no final norm)" if entry.family == "resnet" else "map after the final norm"
    )
    return Layout(
        architecture=entry.architecture,
        arguments=timm_arguments(encoder.name, encoder.image_size, encoder.in_channels),
        weights=_contiguous(encoder.trunk.state_dict()),
        width=encoder.width,
        image_size=encoder.image_size,
        first_conv=timm_names["first_conv"],
        classifier=timm_names["classifier"],
        network=f"{network}; one position of its map is {encoder.stride} x {encoder.stride} pixels",
        feature=f"The feature of an image is the mean over positions of the {norm}.",
        min_max=min_max,
    )


def _mae_layout(student: EncoderTrunk, config: RunConfig, min_max: bool) -> Layout:
    size: SizeName = config.method.input.size  # type: ignore[attr-defined]
    weights = {
        name: value for name, value in student.state_dict().items() if name.startswith(MAE_ENCODER_PARTS)
    }
    return Layout(
        architecture=ARCHITECTURES[size],
        # `fc_norm: false` keeps the norm before the pooling, where MAE has it: with `global_pool: avg` alone
        # timm moves it behind, and the weights no longer fit
        arguments={
            "img_size": student.image_size,
            "patch_size": student.patch_size,
            "global_pool": "avg",
            "fc_norm": False,
        },
        weights=_contiguous(weights),
        width=student.width,
        image_size=student.image_size,
        first_conv="patch_embed.proj",
        classifier="head",
        network=f"Vision transformer: {student.patch_size}-pixel patches, {len(student.blocks)} blocks, "
        f"{VIT_SIZES[size].heads} heads",
        feature="The feature of an image is the mean of its patch tokens after the final norm; the class "
        "token is left out.",
        min_max=min_max,
    )


def _contiguous(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in weights.items()}
