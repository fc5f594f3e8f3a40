"""One optimizer step over this rank's part of a global batch: the student, then its opponents.

It knows submodules and named losses, and no method by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from frepa_dist.methods.base import Losses, Method, StepInfo
from frepa_dist.train.engines import World
from frepa_dist.train.records import Averages, PhaseTimer
from frepa_dist.train.submodules import Submodules

Batch = dict[str, Any]


class Stepper:
    """Takes optimizer steps; all ranks must take each.

    Args:
        method: gives targets and losses.
        submodules: the networks of the method.
        world: this rank among the others.
        timer: counts the seconds of each phase.
        averages: collects the losses and metrics.
    """

    def __init__(
        self,
        method: Method,
        submodules: Submodules,
        world: World,
        timer: PhaseTimer,
        averages: Averages,
    ) -> None:
        self.method, self.submodules, self.world = method, submodules, world
        self.timer, self.averages = timer, averages

    def run(self, micro_batches: Sequence[Batch], info: StepInfo) -> None:
        """One optimizer step over this rank's micro-batches of a global batch."""
        self.submodules.begin_step(info)
        with self.timer.phase("targets"):
            targets = [self.method.targets(self.submodules.nets, batch, info) for batch in micro_batches]
            pool = self._pool(targets)
            self.submodules.end_targets()
        rested: dict[str, int] = dict.fromkeys(self.submodules.opponents, 0)
        for batch, own in zip(micro_batches, targets, strict=True):
            outputs = self._train_student(batch, own, pool, info)
            with self.timer.phase("opponents"):
                for name in self.submodules.opponents:
                    rested[name] += not self._train_opponent(name, outputs, info)
        for name, count in rested.items():
            assert count in (0, len(micro_batches)), f"{name} rested in a part of step {info.step}"
        with self.timer.phase("step"):
            self.submodules.after_step(info)
            self.method.after_step(info, self.world)

    def _train_student(
        self, batch: Batch, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], info: StepInfo
    ) -> dict[str, Tensor]:
        """Train on one micro-batch; return what opponents need of it, without gradient."""
        student = self.submodules.student
        with self.timer.phase("forward"):
            losses = self.method.losses(self.submodules.nets, batch, own, pool, info, self.world)
            total = losses.total
        with self.timer.phase("backward"):
            student.backward(total)
        with self.timer.phase("step"):
            student.step()
        self.averages.add({"loss": total})
        self.averages.add({f"loss/{name}": value for name, value in losses.terms.items()})
        self.averages.add(losses.metrics)
        return {name: value.detach() for name, value in losses.outputs.items()}

    def _train_opponent(self, name: str, outputs: Mapping[str, Tensor], info: StepInfo) -> bool:
        """Train an opponent on what the student left of a micro-batch; whether it did not rest."""

        def compute() -> Losses | None:
            return self.method.opponent_losses(name, self.submodules.nets, outputs, info)

        losses = self.submodules.opponents[name].train(compute)
        if losses is None:
            return False
        self.averages.add({f"{name}/loss": losses.total})
        self.averages.add({f"{name}/{term}": value for term, value in losses.terms.items()})
        self.averages.add(losses.metrics)
        return True

    def _pool(self, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Targets of the whole global batch in slot order, (G, D) each: a rank's slots are consecutive."""
        return {
            name: self.world.gather_rows(torch.cat([micro[name] for micro in targets])) for name in targets[0]
        }
