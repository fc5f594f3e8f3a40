"""Adversarial losses, and the guard that lowers their weight: pure functions of logits, in float32.

Every loss is a mean over rows, so that it does not depend on how a global batch is cut. Real is positive.

Shapes: B batch, C channels, S image side, K classes, R rows of logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from frepa_dist.spectrum import gaussian_high_pass
from shards.support.settings import Settings


def with_detail(images: Tensor, cutoff: float, gain: float = 1.0) -> Tensor:
    """Put an image and its high-passed version together: what a `PatchDiscriminator` judges.

    Args:
        images: (B, C, S, S) in [0, 1].
        cutoff: of `spectrum.gaussian_high_pass`, in cycles per image side.
        gain: factor of the detail, whose values are far smaller than the image's.

    Returns:
        (B, 2 C, S, S) float32.
    """
    with torch.autocast(images.device.type, enabled=False):
        images = images.float()
        return torch.cat([images, gain * gaussian_high_pass(images, cutoff)], dim=1)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """E[max(0, 1 - D(real))] + E[max(0, 1 + D(fake))] (Miyato et al., 2018), 0-dim.

    Args:
        real: logits of any shape.
        fake: logits of any shape.
    """
    return functional.relu(1 - real.float()).mean() + functional.relu(1 + fake.float()).mean()


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-E[D(fake)], 0-dim: what the generator minimizes, through a discriminator whose weights are frozen."""
    return -fake.float().mean()


def r1_penalty(logits: Tensor, inputs: Tensor) -> Tensor:
    """E[|grad D(x)|^2] over real data (Mescheder et al., 2018), 0-dim; its weight there is gamma / 2.

    Args:
        logits: (B, ...) of the discriminator on `inputs`; D(x) is the mean over an image's logits.
        inputs: (B, ...) that required a gradient before they were judged.
    """
    judged = logits.float().flatten(1).mean(dim=1).sum()
    (gradient,) = torch.autograd.grad(judged, inputs, create_graph=True)
    return gradient.float().flatten(1).square().sum(dim=1).mean()


def class_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy that the discriminator of classes minimizes, 0-dim.

    Args:
        logits: (B, K).
        classes: (B,) int64.
    """
    return functional.cross_entropy(logits.float(), classes)


def confusion_loss(logits: Tensor) -> Tensor:
    """KL(uniform || softmax), 0-dim, what the encoder minimizes: 0 where no class is likelier than another.

    Minimizing it is not the reverse of `class_loss`, whose negative has no minimum (Tzeng et al., 2015).

    Args:
        logits: (B, K) of a discriminator whose weights are frozen.
    """
    log_likelihood = functional.log_softmax(logits.float(), dim=-1)
    return -log_likelihood.mean() - math.log(logits.shape[-1])


def real_fake_accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """Share of logits with the right sign, both sides counted alike; a zero counts half. 0-dim, detached."""
    right = real.detach().float().sign().mean() - fake.detach().float().sign().mean()
    return 0.5 + 0.25 * right


def class_accuracy(logits: Tensor, classes: Tensor) -> Tensor:
    """Share of rows (B, K) whose largest logit is that of their class (B,); 0-dim, detached."""
    return (logits.detach().argmax(dim=-1) == classes).float().mean()


class AdversarialGuardConfig(Settings):
    """When the generator's adversarial term is lowered. No public source states the values: they are choices.

    Skill is 0 for an accuracy at chance and 1 for one of 100 %.

    Attributes:
        momentum: share of the moving averages that is kept in a step.
        high: the discriminator wins where the skill of its average accuracy is above this.
        low: it may have collapsed where that is at most this.
        spread: or where the average standard deviation of its logits is at most this.
        patience: steps in a row after which that is called a collapse.
        fall: factor of the multiplier in a step in which the discriminator wins or has collapsed.
        recovery: what the multiplier gains in any other step.
        floor: smallest multiplier; above 0 the generator can catch up with a discriminator that wins.
    """

    momentum: float = Field(default=0.98, ge=0, lt=1)
    high: float = Field(default=0.8, gt=0, le=1)
    low: float = Field(default=0.0, ge=0, lt=1)
    spread: float = Field(default=1e-3, ge=0)
    patience: int = Field(default=200, ge=1)
    fall: float = Field(default=0.95, gt=0, lt=1)
    recovery: float = Field(default=0.002, gt=0, le=1)
    floor: float = Field(default=0.1, ge=0, lt=1)


class Guard:
    """Watches one discriminator and gives the multiplier of its generator's term; never waits for a device.

    Per micro-batch `observe` (in `Method.opponent_losses`), per optimizer step `update` (in
    `Method.after_step`); `multiplier` is read in `Method.losses`, where it is constant during a step.

    Args:
        config: the limits.
        chance: accuracy of one who always says the likeliest: 1/2 for real and fake, else the share of the
            largest class.

    Attributes:
        multiplier: 0-dim, in [floor, 1].
        accuracy: 0-dim, the moving average.
        spread: 0-dim, the moving average of the standard deviation of the logits over rows.
        doubtful_steps: 0-dim, how many steps in a row looked like a collapse.
        updates: 0-dim, how many steps were observed.
    """

    STATE = ("multiplier", "accuracy", "spread", "doubtful_steps", "updates")

    def __init__(self, config: AdversarialGuardConfig, chance: float = 0.5) -> None:
        assert 0 <= chance < 1, f"nothing can be told apart where chance is right in {chance:.0%}"
        self.config, self.chance = config, chance
        self.multiplier, self.accuracy = torch.ones(()), torch.tensor(chance)
        self.spread, self.doubtful_steps, self.updates = torch.zeros(3).unbind()
        self._observed: list[Tensor] = []

    def observe(self, accuracy: Tensor, logits: Tensor) -> None:
        """Note a micro-batch: accuracy (0-dim) and logits, (R, K) of classes or of another shape.

        The moments are noted and not the deviation: their means do not depend on how a batch is cut.
        """
        rows = logits.detach().float()
        rows = rows if rows.ndim == 2 else rows.reshape(-1, 1)
        moments = torch.cat([rows.mean(dim=0), rows.square().mean(dim=0)])
        self._observed.append(torch.cat([accuracy.detach().float().reshape(1), moments]))

    @torch.no_grad()
    def update(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Advance by one step; every rank must call it. Nothing observed (the opponent rests): no change."""
        if not self._observed:
            return
        seen = mean_over_ranks(torch.stack(self._observed).mean(dim=0))
        self._observed.clear()
        for name in self.STATE:
            setattr(self, name, getattr(self, name).to(seen.device))
        mean, square = seen[1:].chunk(2)
        deviation = (square - mean.square()).clamp_min(0).mean().sqrt()
        config = self.config
        kept = torch.where(self.updates > 0, config.momentum, 0.0)
        self.accuracy = torch.lerp(seen[0], self.accuracy, kept)
        self.spread = torch.lerp(deviation, self.spread, kept)
        self.updates = self.updates + 1
        skill = (self.accuracy - self.chance) / (1 - self.chance)
        doubtful = (skill <= config.low) | (self.spread <= config.spread)
        self.doubtful_steps = torch.where(doubtful, self.doubtful_steps + 1, 0.0)
        lowered = (skill > config.high) | (self.doubtful_steps >= config.patience)
        changed = torch.where(lowered, self.multiplier * config.fall, self.multiplier + config.recovery)
        self.multiplier = changed.clamp(config.floor, 1.0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state, equal on all ranks."""
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            KeyError: a name is missing.
        """
        for name in self.STATE:
            setattr(self, name, state[name].clone())
