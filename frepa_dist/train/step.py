"""One optimizer step over this rank's part of a global batch: the student, then its opponents.

It knows submodules and named losses, and no method by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from frepa_dist.methods.base import Losses, Method, StepInfo
from frepa_dist.train.engines import World
from frepa_dist.train.guards import Reading, StepGuard
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
        averages: collects the losses and metrics of steps that were applied.
        skip_spikes: whether a step whose loss is above the limit changes nothing.
    """

    def __init__(
        self,
        method: Method,
        submodules: Submodules,
        world: World,
        timer: PhaseTimer,
        averages: Averages,
        skip_spikes: bool = False,
    ) -> None:
        self.method, self.submodules, self.world = method, submodules, world
        self.timer, self.averages = timer, averages
        self._guard = StepGuard(submodules, world, skip_spikes)
        self._seen: list[Mapping[str, Tensor]] = []

    def run(self, micro_batches: Sequence[Batch], info: StepInfo, spike_limit: float = math.inf) -> Reading:
        """One optimizer step over this rank's micro-batches of a global batch.

        Args:
            micro_batches: in slot order.
            info: where training stands.
            spike_limit: a mean loss of the student above it is a spike.

        Returns:
            What was found; where it says so the step changed nothing, on any rank.
        """
        self.submodules.begin_step(info)
        state = {name: value.clone() for name, value in self.method.state_dict().items()}
        with self.timer.phase("targets"):
            targets = [self.method.targets(self.submodules.nets, batch, info) for batch in micro_batches]
            pool = self._pool(targets)
            self.submodules.end_targets()
        losses: dict[str, list[Tensor]] = {}
        for number, (batch, own) in enumerate(zip(micro_batches, targets, strict=True), start=1):
            outputs, losses_of_batch = self._train_student(batch, own, pool, info)
            with self.timer.phase("opponents"):
                losses_of_batch |= self._train_opponents(outputs, info)
            for name, total in losses_of_batch.items():
                losses.setdefault(name, []).append(total)
            if number < len(micro_batches):
                self._end_micro_batch(losses)
        for name, totals in losses.items():
            assert len(totals) == len(micro_batches), f"{name} rested in a part of step {info.step}"
        with self.timer.phase("step"):
            verdict = self._guard.judge(losses, spike_limit)
            self._end_micro_batch(losses)
            reading = verdict.read()
            self._finish(info, reading, state)
        return reading

    def _end_micro_batch(self, trained: Mapping[str, Any]) -> None:
        """Tell the engines; at the last micro-batch they step. Ranks do so in the same order."""
        self.submodules.student.step()
        for name, opponent in self.submodules.opponents.items():
            if name in trained:
                opponent.step()

    def _finish(self, info: StepInfo, reading: Reading, state: Mapping[str, Tensor]) -> None:
        """Let everything outside the engines follow an applied step, or stay as it was before."""
        if reading.was_skipped:
            for plain in self.submodules.plain.values():
                plain.optimizer.zero_grad(set_to_none=True)
        else:
            self.submodules.after_step(info)
            for values in self._seen:
                self.averages.add(values)
        self._seen.clear()
        self.method.after_step(info, self.world)  # it forgets what it observed
        if reading.was_skipped:
            self.method.load_state_dict(state)

    def _train_student(
        self, batch: Batch, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], info: StepInfo
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Learn from one micro-batch; return what opponents need of it, without gradient, and the loss."""
        with self.timer.phase("forward"):
            losses = self.method.losses(self.submodules.nets, batch, own, pool, info, self.world)
            total = losses.total
        with self.timer.phase("backward"):
            self.submodules.student.backward(total)
        self._note({"loss": total, **{f"loss/{name}": value for name, value in losses.terms.items()}})
        self._note(losses.metrics)
        return {name: value.detach() for name, value in losses.outputs.items()}, {"student": total.detach()}

    def _train_opponents(self, outputs: Mapping[str, Tensor], info: StepInfo) -> dict[str, Tensor]:
        """Let opponents learn from what the student left of a micro-batch; give the losses of those."""
        totals: dict[str, Tensor] = {}
        for name, opponent in self.submodules.opponents.items():

            def compute(name: str = name) -> Losses | None:
                return self.method.opponent_losses(name, self.submodules.nets, outputs, info)

            losses = opponent.train(compute)
            if losses is None:
                continue
            totals[name] = losses.total.detach()
            self._note({f"{name}/loss": totals[name]})
            self._note({f"{name}/{term}": value for term, value in losses.terms.items()})
            self._note(losses.metrics)
        return totals

    def _note(self, values: Mapping[str, Tensor]) -> None:
        """Keep for the averages, if the step is applied."""
        self._seen.append({name: value.detach() for name, value in values.items()})

    def _pool(self, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Targets of the whole global batch in slot order, (G, D) each: a rank's slots are consecutive."""
        return {
            name: self.world.gather_rows(torch.cat([micro[name] for micro in targets])) for name in targets[0]
        }
