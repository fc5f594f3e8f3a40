"""What methods that corrupt whole images and decode them again have in common (Frepa, MFM).

Shapes: B micro-batch, S image side.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from frepa_dist.corruption import Corrupted, CorruptionConfig, corrupt
from frepa_dist.corruption.plan import check_size
from frepa_dist.draws import SampleDraws
from frepa_dist.methods.base import Batch, Preview, SubmoduleSpec
from frepa_dist.models.autoencoder import (
    AutoencoderOutput,
    BackboneAutoencoder,
    create_autoencoder,
    initialize,
)
from frepa_dist.models.backbones import BackboneSettings
from frepa_dist.normalization import min_max_scale, standardize
from shards.read.windows import to_unit_range
from shards.support.errors import ConfigError

logger = logging.getLogger(__name__)


def create_student(settings: BackboneSettings) -> BackboneAutoencoder:
    """Create the network of settings as training starts it, from `init` where that is set.

    Raises:
        ConfigError: timm has no weights for this backbone.
        DataError: the weights are missing or do not fit.
        EnvironmentFault: timm's weights cannot be fetched.
    """
    model = create_autoencoder(settings)
    if settings.init is not None:
        logger.info("%s: %s", settings.init, initialize(model, settings))
    return model


def check_corruption(settings: BackboneSettings, corruption: CorruptionConfig) -> None:
    """Make sure that images of the network's size can be corrupted.

    Raises:
        ValueError: they cannot, as pydantic's validators say it.
    """
    try:
        check_size(settings.image_size, corruption)
    except ConfigError as error:
        raise ValueError(str(error)) from error


def student_spec(settings: BackboneSettings) -> SubmoduleSpec:
    """How the loop keeps the network of settings."""
    return SubmoduleSpec(build=lambda: create_student(settings), kind="engine")


def clean_images(batch: Batch, settings: BackboneSettings) -> Tensor:
    """Return the images of a micro-batch in [0, 1], float32 (B, 3, S, S), what a student shall restore."""
    images = to_unit_range(batch["image"], batch["window"])
    return min_max_scale(images) if settings.min_max else images


def corrupt_batch(images: Tensor, batch: Batch, config: CorruptionConfig, *, view: int = 0) -> Corrupted:
    """Corrupt clean images; every draw is keyed by the sample's place in the plan."""
    return corrupt(images, SampleDraws(batch["draw_key"], images.device), config, view=view)


def run_student(
    student: nn.Module, images: Tensor, settings: BackboneSettings, num_decoded: int | None = None
) -> AutoencoderOutput:
    """Run the student on images (B, 3, S, S) in [0, 1] but for what a corruption added."""
    normalized = standardize(images, settings.mean, settings.std)
    output: AutoencoderOutput = student(normalized, num_decoded=num_decoded)
    return output


@torch.no_grad()
def restore_images(student: nn.Module, images: Tensor, settings: BackboneSettings) -> Tensor:
    """See `Method.restore`."""
    return run_student(student, images, settings).prediction.clamp(0, 1)


@torch.no_grad()
def preview_corruptions(
    student: nn.Module,
    images: Tensor,
    settings: BackboneSettings,
    corruption: CorruptionConfig,
    draw_keys: Sequence[int],
) -> list[Preview]:
    """Show what the student makes of each kind of corruption; see `Method.previews`."""
    clean = min_max_scale(images) if settings.min_max else images
    draws = SampleDraws(draw_keys, images.device)
    previews = []
    for kind in used_kinds(corruption):
        only = corruption.model_copy(update={"kinds": {kind: 1.0}})
        corrupted = corrupt(clean, draws, only)
        previews.append(
            Preview(
                name=kind.replace("_", " "),
                seen=corrupted.images.clamp(0, 1),
                predicted=restore_images(student, corrupted.images, settings),
                hidden=corrupted.hidden.bool(),
            )
        )
    return previews


def used_kinds(corruption: CorruptionConfig) -> list[str]:
    """Return the kinds of corruption that can be drawn, in the order of the settings."""
    return [kind for kind, share in corruption.kinds.items() if share > 0]


def kind_shares(
    kinds: Sequence[str], corruption: CorruptionConfig, device: torch.device
) -> dict[str, Tensor]:
    """Count the kinds of a micro-batch, as metrics; nothing waits for the device."""
    return {
        f"corruption/{kind}": torch.full((), kinds.count(kind) / len(kinds), device=device)
        for kind in used_kinds(corruption)
    }
