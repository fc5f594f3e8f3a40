"""A method with a student and one discriminator, as small as can be, for tests of the loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from frepa_dist.adversarial import (
    AdversarialGuardConfig,
    Guard,
    hinge_discriminator_loss,
    hinge_generator_loss,
    r1_penalty,
    real_fake_accuracy,
)
from frepa_dist.methods.base import Losses, Method, MethodSettings, StepInfo, SubmoduleSpec
from frepa_dist.methods.mae import ModelConfig
from frepa_dist.models.discriminator import PatchDiscriminator
from shards.read.windows import to_unit_range


class PairConfig(MethodSettings):
    """Settings: `r1` and `weight` of the losses, steps in which the discriminator rests."""

    name: Literal["pair"] = "pair"
    model: ModelConfig = ModelConfig(size="tiny", image_size=32)
    r1: float = 0.5
    weight: float = 0.1
    rests_before: int = 0


class Denoiser(nn.Module):
    """Three convolutions; (B, 3, S, S) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(self.layers[0].weight.dtype)).float()


class Pair(Method):
    """Remove a pattern from images; a discriminator tells the result from the originals."""

    name: ClassVar[str] = "pair"
    config_class = PairConfig

    def __init__(self, config: PairConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        self.guard = Guard(AdversarialGuardConfig())

    @classmethod
    def create_student(cls, config: PairConfig) -> nn.Module:
        return Denoiser()

    def submodules(self) -> dict[str, SubmoduleSpec]:
        return {
            "student": SubmoduleSpec(build=Denoiser, kind="engine"),
            "judge": SubmoduleSpec(build=lambda: PatchDiscriminator(3, 8, 2), kind="opponent"),
        }

    def losses(
        self, nets: Mapping[str, nn.Module], batch: Any, targets: Any, pool: Any, info: Any, comm: Any
    ) -> Losses:
        clean = to_unit_range(batch["image"], batch["window"])
        restored = nets["student"](clean + 0.1 * clean.roll(1, dims=-1).sin())
        terms = {
            "rec": (restored - clean).square().mean(),
            "judge": hinge_generator_loss(nets["judge"](restored)),
        }
        return Losses(
            terms,
            {"rec": 1.0, "judge": self.config.weight},
            {"guard": self.guard.multiplier},
            {"real": clean, "fake": restored},
        )

    def opponent_losses(
        self, name: str, nets: Mapping[str, nn.Module], outputs: Mapping[str, Tensor], info: StepInfo
    ) -> Losses | None:
        if info.step < self.config.rests_before:
            return None
        assert not any(value.requires_grad for value in outputs.values())
        real = outputs["real"].clone().requires_grad_()
        # two calls, one of them differentiated inside
        on_real, on_fake = nets[name](real), nets[name](outputs["fake"])
        accuracy = real_fake_accuracy(on_real, on_fake)
        self.guard.observe(accuracy, torch.cat([on_real, on_fake]))
        return Losses(
            {"hinge": hinge_discriminator_loss(on_real, on_fake), "r1": r1_penalty(on_real, real)},
            {"hinge": 1.0, "r1": self.config.r1},
            {"judge/accuracy": accuracy},
        )

    def after_step(self, info: StepInfo, comm: Any) -> None:
        self.guard.update(comm.mean)

    def state_dict(self) -> dict[str, Tensor]:
        return self.guard.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.guard.load_state_dict(state)
