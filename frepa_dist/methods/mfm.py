"""Masked frequency modeling (MFM; Xie et al., arXiv 2206.07706, ICLR 2023), a control beside Frepa.

A disc of low frequencies, or all but that disc, is set to zero in the whole image; the student predicts the
image, and is judged by the frequencies that were missing. It is also the example of a method in one file:
settings, networks, losses, and a name by which configs choose it.

Shapes: B micro-batch, S image side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from frepa_dist.corruption import CorruptionConfig
from frepa_dist.corruption.batch import to_device
from frepa_dist.methods.base import (
    Batch,
    Comm,
    Losses,
    Method,
    MethodSettings,
    Preview,
    StepInfo,
    SubmoduleSpec,
)
from frepa_dist.methods.restoration import detail_metrics
from frepa_dist.methods.whole_image import (
    check_corruption,
    clean_images,
    corrupt_batch,
    kind_shares,
    preview_corruptions,
    restore_images,
    run_student,
    student_spec,
    used_kinds,
)
from frepa_dist.models.autoencoder import BackboneAutoencoder, create_autoencoder
from frepa_dist.models.backbones import BackboneSettings
from frepa_dist.spectrum import half_spectrum_counts, radial_frequency

ROOT_EPS = 1e-12  # keeps the gradient of the root finite, as in the authors' code


class MfmConfig(MethodSettings):
    """Settings of MFM.

    Attributes:
        model: the network.
        corruption: shares of `low_pass` and `high_pass`, and the disc's radius; the authors take one half
            each and 16 cycles per image side, at 224 pixels.
        gamma: exponent of the distance between frequencies.
    """

    name: Literal["mfm"] = "mfm"
    model: BackboneSettings = BackboneSettings()
    corruption: CorruptionConfig = CorruptionConfig(kinds={"low_pass": 0.5, "high_pass": 0.5})
    gamma: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_corruption(self.model, self.corruption)
        if not set(used_kinds(self.corruption)) <= {"low_pass", "high_pass"}:
            raise ValueError("MFM hides frequencies: only 'low_pass' and 'high_pass' may be in 'corruption'")
        return self


def masked_frequency_loss(pred: Tensor, target: Tensor, hidden: Tensor, gamma: float = 1.0) -> Tensor:
    """Distance between the frequencies of two images where they were hidden, |F_pred - F_target|^gamma.

    The mean is over an image's hidden frequencies and channels, then over images. (The authors divide the sum
    over a batch by the number of frequencies hidden in it, which depends on how a batch is cut.)

    Args:
        pred: (B, C, S, S).
        target: (B, C, S, S).
        hidden: (B, S, S // 2 + 1) bool, in the layout of `rfft2`.
        gamma: exponent.

    Returns:
        0-dim float32.
    """
    with torch.autocast(pred.device.type, enabled=False):
        difference = torch.fft.rfft2(pred.float() - target.float(), norm="ortho")
        power = difference.real.square() + difference.imag.square()
        distance = (power + ROOT_EPS).sqrt().pow(gamma).mean(dim=1)
        weight = hidden * half_spectrum_counts(pred.shape[-1], pred.device)
        return torch.div((distance * weight).sum(dim=(1, 2)), weight.sum(dim=(1, 2))).mean()


def hidden_frequencies(kinds: Sequence[str], size: int, radius: float, device: torch.device) -> Tensor:
    """Return what the kinds of corruption hide, (B, S, S // 2 + 1) bool in the layout of `rfft2`."""
    disc = radial_frequency(size, device)[:, : size // 2 + 1] < radius
    is_low_pass = to_device(np.array([kind == "low_pass" for kind in kinds]), device)
    return disc ^ is_low_pass[:, None, None]  # a low-pass hides all but the disc


class Mfm(Method):
    """Predict the hidden frequencies: one engine, one loss, `frequency`."""

    name: ClassVar[str] = "mfm"
    config_class = MfmConfig

    def __init__(self, config: MfmConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        self.config = config

    @classmethod
    def create_student(cls, config: MfmConfig) -> BackboneAutoencoder:
        """See `Method`."""
        return create_autoencoder(config.model)

    @classmethod
    def previews(
        cls, student: nn.Module, images: Tensor, config: MfmConfig, draw_keys: Sequence[int]
    ) -> list[Preview]:
        """See `Method`."""
        return preview_corruptions(student, images, config.model, config.corruption, draw_keys)

    @classmethod
    def restore(cls, student: nn.Module, images: Tensor, config: MfmConfig) -> Tensor:
        """See `Method`."""
        return restore_images(student, images, config.model)

    def submodules(self) -> dict[str, SubmoduleSpec]:
        """See `Method`."""
        return {"student": student_spec(self.config.model)}

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
        config = self.config
        clean = clean_images(batch, config.model)
        corrupted = corrupt_batch(clean, batch, config.corruption)
        output = run_student(nets["student"], corrupted.images, config.model)
        hidden = hidden_frequencies(
            corrupted.kind, clean.shape[-1], config.corruption.pass_radius, clean.device
        )
        return Losses(
            terms={"frequency": masked_frequency_loss(output.prediction, clean, hidden, config.gamma)},
            weights={"frequency": 1.0},
            metrics={
                **kind_shares(corrupted.kind, config.corruption, clean.device),
                **detail_metrics(output.prediction, clean, info),
            },
        )
