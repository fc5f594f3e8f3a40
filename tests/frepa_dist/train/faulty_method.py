"""The method of `adversarial_method` with a teacher and a critic, and with faults on demand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from frepa_dist.methods.base import Losses, StepInfo, SubmoduleSpec
from tests.frepa_dist.train.adversarial_method import Denoiser, Pair, PairConfig

FAULTS = (
    "batch",
    "student_gradient",
    "judge_loss",
    "judge_gradient",
    "critic_gradient",
    "critic_weight",
)
FOUND = {
    "batch": {"student/loss", "student/gradient", "judge/loss", "judge/gradient", "critic/gradient"},
    "student_gradient": {"student/gradient"},
    "judge_loss": {"judge/loss", "judge/gradient"},
    "judge_gradient": {"judge/gradient"},
    "critic_gradient": {"critic/gradient"},
    "critic_weight": {"student/loss", "student/gradient", "critic/gradient", "critic/weights"},
}


class FaultyConfig(PairConfig):
    """As of its base."""

    name: Literal["faulty"] = "faulty"  # type: ignore[assignment]


class Faulty(Pair):
    """A student, its discriminator, its teacher and a critic.

    Attributes:
        faults: step -> what breaks in it, on `rank` only (weights of a critic on all ranks; `critic_late`: at
            its end, when nobody looks any more).
        rank: of this process.
        faulty_rank: where things break.
        average: a state that moves in every step.
    """

    name: ClassVar[str] = "faulty"
    config_class = FaultyConfig

    def __init__(self, config: FaultyConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, compute_dtype)
        self.faults: dict[int, str] = {}
        self.rank, self.faulty_rank = 0, 0
        self.average = torch.zeros(())
        self._seen: list[Tensor] = []

    def submodules(self) -> dict[str, SubmoduleSpec]:
        specs = super().submodules()
        specs["critic"] = SubmoduleSpec(build=lambda: nn.Linear(3, 1), kind="plain")
        specs["teacher"] = SubmoduleSpec(build=Denoiser, kind="ema", of="student", momentum=lambda info: 0.9)
        return specs

    def _breaks(self, fault: str, info: StepInfo) -> bool:
        return self.faults.get(info.step) == fault and self.rank == self.faulty_rank

    def losses(
        self, nets: Mapping[str, nn.Module], batch: Any, targets: Any, pool: Any, info: Any, comm: Any
    ) -> Losses:
        if self._breaks("batch", info):
            batch = {**batch, "window": torch.full_like(batch["window"], torch.nan)}
        self._critic = nets["critic"]
        if self.faults.get(info.step) == "critic_weight":
            with torch.no_grad():
                nets["critic"].weight[0, 0] = torch.nan
        losses = super().losses(nets, batch, targets, pool, info, comm)
        critic = nets["critic"].weight * 1  # its gradient passes here
        if self._breaks("critic_gradient", info):
            critic.register_hook(lambda gradient: gradient * torch.nan)
        if self._breaks("spike", info):
            losses.terms["rec"] = losses.terms["rec"] * 1e6
        mean = losses.outputs["fake"].float().mean(dim=(2, 3))
        losses.terms["critic"] = (mean @ critic[0] + nets["critic"].bias).square().mean()
        losses.weights["critic"] = 0.1
        if self._breaks("student_gradient", info):
            (rec := losses.terms["rec"]).register_hook(lambda gradient: gradient * torch.nan)
            losses.terms["rec"] = rec
        self._seen.append(losses.total.detach().float())
        return losses

    def opponent_losses(
        self, name: str, nets: Mapping[str, nn.Module], outputs: Mapping[str, Tensor], info: StepInfo
    ) -> Losses | None:
        losses = super().opponent_losses(name, nets, outputs, info)
        if losses is not None and self._breaks("judge_loss", info):
            losses.terms["hinge"] = losses.terms["hinge"] * torch.nan
        if losses is not None and self._breaks("judge_gradient", info):
            losses.terms["hinge"].register_hook(lambda gradient: gradient * torch.nan)
        return losses

    def after_step(self, info: StepInfo, comm: Any) -> None:
        super().after_step(info, comm)
        if self.faults.get(info.step) == "critic_late":
            with torch.no_grad():
                self._critic.weight[0, 0] = torch.nan
        self.average = 0.5 * self.average + 0.5 * comm.mean(torch.stack(self._seen).mean())
        self._seen.clear()

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), "average": self.average}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.average = state["average"].clone()
