"""Adversarial terms: what a discriminator asks of the student, and how it learns in return.

No formula is public for Frepa's adversarial learning (arXiv 2407.14651), so both forms here, and all their
numbers, are choices:

    image       a PatchGAN tells reconstructions from originals, each beside its own high-passed version, so
                that it judges detail and not tone alone; hinge loss.
    embedding   a discriminator tells which corruption an embedding came from; the encoder learns to hide it,
                by making its answer uniform.

In the warm-up of a term its discriminator rests. From the foot of the ramp on it learns in every step, and a
guard lowers the student's weight while it wins or has collapsed.

Shapes: B micro-batch, B' = B or 2 B corrupted views, S image side, E width and h, w sides of the embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from frepa_dist.adversarial import (
    AdversarialGuardConfig,
    Guard,
    class_accuracy,
    class_loss,
    confusion_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    r1_penalty,
    real_fake_accuracy,
    with_detail,
)
from frepa_dist.methods.base import Losses, SubmoduleSpec
from frepa_dist.methods.terms import TermConfig
from frepa_dist.models.discriminator import EmbeddingDiscriminator, PatchDiscriminator


class AdversaryConfig(TermConfig):
    """What both forms have; the discriminator's optimizer is `train.opponent`.

    Attributes:
        guard: when the weight is lowered.
    """

    weight: float = Field(default=0.01, ge=0)
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    ramp_fraction: float = Field(default=0.1, ge=0, le=1)
    guard: AdversarialGuardConfig = AdversarialGuardConfig()


class ImageAdversaryConfig(AdversaryConfig):
    """The discriminator of reconstructions.

    Attributes:
        width, num_layers: of the `PatchDiscriminator`.
        cutoff: of the high-pass, in cycles per image side.
        detail_gain: factor of the high-passed image.
        r1: weight of the penalty on its gradient at originals; 0 computes none.
    """

    width: int = Field(default=64, ge=1)
    num_layers: int = Field(default=3, ge=1)
    cutoff: float = Field(default=20.0, gt=0)
    detail_gain: float = Field(default=4.0, gt=0)
    r1: float = Field(default=0.0, ge=0)


class EmbeddingAdversaryConfig(AdversaryConfig):
    """The discriminator of embeddings.

    Attributes:
        hidden: its width inside.
    """

    hidden: int = Field(default=128, ge=1)


class Seen(NamedTuple):
    """What discriminators may judge.

    Attributes:
        prediction: (B, 3, S, S), reconstructed.
        target: (B, 3, S, S), the original.
        embedding: (B', E, h, w).
        kinds: (B',) int64, which corruption each embedding came from.
    """

    prediction: Tensor
    target: Tensor
    embedding: Tensor
    kinds: Tensor


class Adversary(ABC):
    """One adversarial term.

    Attributes:
        name: of the term.
        opponent: name of its discriminator among the networks.
        needs: the fields of `Seen` that the discriminator learns from.
    """

    name: ClassVar[str]
    opponent: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]

    def __init__(self, config: AdversaryConfig, chance: float) -> None:
        self.config = config
        self.guard = Guard(config.guard, chance)

    @abstractmethod
    def build(self) -> nn.Module:
        """Create the discriminator."""

    @abstractmethod
    def student_loss(self, nets: Mapping[str, nn.Module], seen: Seen) -> Tensor:
        """What the student minimizes through the frozen discriminator, 0-dim."""

    @abstractmethod
    def opponent_losses(self, discriminator: nn.Module, outputs: Mapping[str, Tensor]) -> Losses:
        """What the discriminator minimizes on what `outputs` gave; the guard watches."""

    def spec(self) -> SubmoduleSpec:
        """How the loop keeps the discriminator."""
        return SubmoduleSpec(build=self.build, kind="opponent")

    def guarded_loss(self, nets: Mapping[str, nn.Module], seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the student's loss times the guard's multiplier, and what to log."""
        loss = self.student_loss(nets, seen)
        multiplier = self.guard.multiplier.to(loss.device, loss.dtype)
        return multiplier * loss, {f"{self.name}/multiplier": multiplier}

    def outputs(self, seen: Seen) -> dict[str, Tensor]:
        """Keep what the discriminator learns from, without gradient."""
        return {name: getattr(seen, name).detach() for name in self.needs}


class ImageAdversary(Adversary):
    """A PatchGAN of reconstructions."""

    name = "adversarial_image"
    opponent = "image_discriminator"
    needs = ("prediction", "target")
    config: ImageAdversaryConfig

    def __init__(self, config: ImageAdversaryConfig) -> None:
        super().__init__(config, chance=0.5)

    def build(self) -> nn.Module:
        """See `Adversary`."""
        return PatchDiscriminator(6, self.config.width, self.config.num_layers)

    def _input(self, images: Tensor) -> Tensor:
        return with_detail(images, self.config.cutoff, self.config.detail_gain)

    def student_loss(self, nets: Mapping[str, nn.Module], seen: Seen) -> Tensor:
        """See `Adversary`."""
        return hinge_generator_loss(nets[self.opponent](self._input(seen.prediction)))

    def opponent_losses(self, discriminator: nn.Module, outputs: Mapping[str, Tensor]) -> Losses:
        """See `Adversary`."""
        real, fake = self._input(outputs["target"]), self._input(outputs["prediction"])
        real.requires_grad_(self.config.r1 > 0)
        # one call for both: an engine expects one forward pass before each backward
        logits = discriminator(torch.cat([real, fake]))
        on_real, on_fake = logits.chunk(2)
        losses = Losses({"hinge": hinge_discriminator_loss(on_real, on_fake)}, {"hinge": 1.0})
        if self.config.r1:
            losses.terms["r1"] = r1_penalty(on_real, real)
            losses.weights["r1"] = self.config.r1
        accuracy = real_fake_accuracy(on_real, on_fake)
        self.guard.observe(accuracy, logits)
        losses.metrics[f"{self.opponent}/accuracy"] = accuracy
        for name, side in (("real", on_real), ("fake", on_fake)):
            right = side.detach() > 0 if name == "real" else side.detach() < 0
            losses.metrics[f"{self.name}/accuracy_{name}"] = right.float().mean()
        return losses


class EmbeddingAdversary(Adversary):
    """A discriminator of the corruption that an embedding came from.

    Args:
        config: the settings.
        width: E.
        shares: of each kind among the samples.
    """

    name = "adversarial_embedding"
    opponent = "embedding_discriminator"
    needs = ("embedding", "kinds")
    config: EmbeddingAdversaryConfig

    def __init__(self, config: EmbeddingAdversaryConfig, width: int, shares: list[float]) -> None:
        super().__init__(config, chance=max(shares) / sum(shares))
        self._width, self._num_kinds = width, len(shares)

    def build(self) -> nn.Module:
        """See `Adversary`."""
        return EmbeddingDiscriminator(self._width, self._num_kinds, self.config.hidden)

    def student_loss(self, nets: Mapping[str, nn.Module], seen: Seen) -> Tensor:
        """See `Adversary`."""
        return confusion_loss(nets[self.opponent](seen.embedding))

    def opponent_losses(self, discriminator: nn.Module, outputs: Mapping[str, Tensor]) -> Losses:
        """See `Adversary`."""
        logits = discriminator(outputs["embedding"])
        accuracy = class_accuracy(logits, outputs["kinds"])
        self.guard.observe(accuracy, logits)
        return Losses(
            {"class": class_loss(logits, outputs["kinds"])},
            {"class": 1.0},
            {f"{self.opponent}/accuracy": accuracy},
        )
