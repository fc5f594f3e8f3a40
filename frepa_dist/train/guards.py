"""Whether the numbers of a step may be applied: decided by all ranks together, before anything changes.

One network whose loss, gradient or weights are not finite on one rank spoils the step for all: each of them
learns from the others. The decision is made on the device: torch's fused AdamW reads `found_inf` and then
leaves weights, moments and its count of steps as they were, whatever the ZeRO stage, for under each of them
the optimizer that DeepSpeed calls is ours.

The host reads the decision after the engines have stepped. DeepSpeed has then waited for the gradient's norm
(`is_invalid_grad_norm`; all but ZeRO 0 in fp32, where this is the wait), which comes later on the same stream
than the decision, so that reading it costs no further wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from frepa_dist.train.engines import EngineSubmodule, World
from frepa_dist.train.submodules import Submodules


@dataclass(frozen=True)
class Reading:
    """What all ranks found in a step; equal on all of them.

    Attributes:
        bad: what was not finite, such as `student/gradient`, `teacher_critic/weights`.
        loss: mean of the student's loss over the global batch.
        is_spike: whether it lies above the limit that was given.
        was_skipped: whether the step changed nothing.
        own_loss_is_bad: whether a loss was not finite on this rank.
    """

    bad: tuple[str, ...]
    loss: float
    is_spike: bool
    was_skipped: bool
    own_loss_is_bad: bool


def inner_optimizer(engine: EngineSubmodule) -> torch.optim.Optimizer:
    """The torch optimizer that an engine steps: its own, or the one inside its ZeRO or bf16 optimizer."""
    outer = engine.engine.optimizer
    inner: torch.optim.Optimizer = outer if isinstance(outer, torch.optim.Optimizer) else outer.optimizer
    assert inner.defaults["fused"], "only fused optimizers of torch read found_inf"
    return inner


def masters(engine: EngineSubmodule) -> list[Tensor]:
    """This rank's fp32 weights, as the optimizer steps them; on the host where they are offloaded."""
    partitions = getattr(engine.engine.optimizer, "fp32_partitioned_groups_flat", None)
    if partitions is not None:  # ZeRO 3 shows them to the optimizer one by one
        return list(partitions)
    groups = inner_optimizer(engine).param_groups
    return list(chain.from_iterable(group["params"] for group in groups))


def reduced_gradients(engine: EngineSubmodule) -> list[Tensor]:
    """This rank's part of an engine's gradients, averaged over ranks, after a step's last backward pass.

    They are read where DeepSpeed 0.19 keeps them; `safe_get_full_grad` would gather them parameter by
    parameter.
    """
    outer = engine.engine.optimizer
    if hasattr(outer, "_wait_for_offload_copies"):  # to the host, which come by and by
        outer._wait_for_offload_copies()
    if hasattr(outer, "fp32_groups_gradient_flat_partition"):  # ZeRO 1 in bf16, accumulating in fp32
        return list(outer.fp32_groups_gradient_flat_partition)
    if not hasattr(outer, "averaged_gradients"):  # ZeRO 0
        return [p.grad for p in engine.module.parameters() if p.grad is not None]
    kept = list(_tensors(outer.averaged_gradients.values()))
    if kept:
        return kept
    # offloaded: copied to the masters' gradients already
    return [master.grad for master in masters(engine) if master.grad is not None]


def _tensors(groups: Any) -> Iterator[Tensor]:
    for group in groups:
        if isinstance(group, Tensor):
            yield group
        elif group is not None:
            yield from _tensors(group)


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Root of the sum of the squares of all elements, in float32; 0-dim."""
    filled = [tensor.detach() for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros((), device=device)
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(filled)])
    return norms.square().sum().sqrt().to(device)


def is_bad(norm: Tensor) -> Tensor:
    """1 where a norm is not finite, else 0; 0-dim.

    A gradient so large that its norm overflows cannot be clipped, and counts as bad too.
    """
    return (~norm.isfinite()).float()


class Verdict:
    """The decision about a step, on the device until `read`.

    Args:
        names: of what was looked at.
        own: (len(names) + 1,) of this rank: 1 where something is bad, then the student's loss.
        everyone: the mean of it over ranks.
        spike_limit: a loss above it is a spike.
        skip_spikes: whether such a step is not applied.
    """

    def __init__(
        self, names: Sequence[str], own: Tensor, everyone: Tensor, spike_limit: float, skip_spikes: bool
    ) -> None:
        self._names, self._own = names, own
        self._limit, self._skip_spikes = spike_limit, skip_spikes
        is_refused = (everyone[:-1] > 0).any()
        if skip_spikes:
            is_refused = is_refused | (everyone[-1] > spike_limit)
        self.found_inf = is_refused.float()
        self._host, self._copied = everyone, None
        if everyone.is_cuda:
            self._host = torch.empty_like(everyone, device="cpu", pin_memory=True)
            self._host.copy_(everyone, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> Reading:
        """Wait for the decision."""
        if self._copied is not None:
            self._copied.synchronize()
        *shares, loss = self._host.tolist()
        bad = tuple(name for name, share in zip(self._names, shares, strict=True) if share > 0)
        is_spike = loss > self._limit
        own = dict(zip(self._names, self._own.tolist(), strict=False)) if bad else {}
        return Reading(
            bad=bad,
            loss=loss,
            is_spike=is_spike,
            was_skipped=bool(bad) or (is_spike and self._skip_spikes),
            own_loss_is_bad=any(flag > 0 for name, flag in own.items() if name.endswith("/loss")),
        )


class StepGuard:
    """Decides about steps.

    Args:
        submodules: what trains.
        world: this rank among the others.
        skip_spikes: whether a step with too high a loss is not applied.
    """

    def __init__(self, submodules: Submodules, world: World, skip_spikes: bool = False) -> None:
        self._submodules, self._world, self._skip_spikes = submodules, world, skip_spikes

    def judge(self, losses: Mapping[str, Sequence[Tensor]], spike_limit: float) -> Verdict:
        """Decide after the last backward passes of a step, before any engine steps; all ranks must call it.

        Args:
            losses: of each engine that trained in this step, by micro-batch; the student's are among them.
            spike_limit: a mean loss of the student above it is a spike.
        """
        device = self._world.device
        found: dict[str, Tensor] = {}
        for name, values in losses.items():
            engine = self._submodules.engines[name]
            found[f"{name}/loss"] = is_bad(total_norm(values, device))
            norm = total_norm(reduced_gradients(engine), device)
            found[f"{name}/gradient"] = is_bad(norm)
            engine.whole_norm = norm if engine.engine.zero_optimization_stage() == 0 else None
        for name, plain in self._submodules.plain.items():
            weights = list(plain.module.parameters())
            gradients = [p.grad for p in weights if p.grad is not None]
            found[f"{name}/gradient"] = is_bad(total_norm(gradients, device))
            # the guard of the mutual information hides a critic that is broken
            found[f"{name}/weights"] = is_bad(total_norm(weights, device))
        mean_loss = torch.stack([value.detach().float() for value in losses["student"]]).mean()
        own = torch.stack([*found.values(), mean_loss])
        everyone = self._world.mean(own)
        verdict = Verdict(list(found), own, everyone, spike_limit, self._skip_spikes)
        for name in losses:
            engine = self._submodules.engines[name]
            found_inf = verdict.found_inf.to(masters(engine)[0].device)
            inner_optimizer(engine).found_inf = found_inf  # type: ignore[attr-defined]
        return verdict
