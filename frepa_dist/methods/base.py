"""What a method is: it maps a batch to named losses, and knows no engine, no rank and no optimizer.

The contract with the training loop, for one optimizer step over a global batch of G images in slot order,
cut into ranks and micro-batches in any way:

1. `targets` for every micro-batch of this rank, without gradient. The loop gathers them over micro-batches
   and ranks into `pool`, whose row i belongs to slot i.
2. `losses` for each micro-batch, then backward of `Losses.total` divided by the number of micro-batches.
3. `after_step`, once, on all ranks, also when the optimizer skipped the step.

Losses are means over the rows of the micro-batch of terms that see their own row and the pool only, so that
gradients do not depend on the cut.

Shapes: B micro-batch, G global batch, N patches, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class StepInfo:
    """Where training stands: `step` counts optimizer steps from 0 to `total_steps` - 1."""

    step: int
    total_steps: int
    seed: int


class Comm(Protocol):
    """Agreement between ranks; every rank must call each in the same order, none waits on the host."""

    def any(self, flag: Tensor) -> Tensor:
        """Return a 0-dim bool tensor, true where `flag` is true on any rank."""

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of `x` over the ranks, without gradient."""


@dataclass
class Losses:
    """The losses of one micro-batch.

    Attributes:
        terms: 0-dim tensors by name; a term that is switched off is not there.
        weights: the weight of each term.
        metrics: detached 0-dim tensors to log. They are means over the rows of the micro-batch, but for
            those whose name ends in `_max`.
    """

    terms: dict[str, Tensor]
    weights: dict[str, float]
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """The weighted sum; a term of weight 0 stays out of the graph."""
        weighted = [self.weights[name] * term for name, term in self.terms.items() if self.weights[name]]
        if not weighted:
            return torch.zeros_like(next(iter(self.terms.values())))
        return torch.stack(weighted).sum()


@dataclass(frozen=True)
class SubmoduleSpec:
    """A network of a method and how the loop keeps it.

    Attributes:
        build: makes the module, on the CPU, in fp32.
        kind: `engine` (a DeepSpeed engine), `ema` (fp32 average of an engine's parameters, no gradient),
            `plain` (fp32, outside every engine, own optimizer, gradients all-reduced; the gradients are None
            on all ranks in a step where it was not used) or `frozen` (not in checkpoints).
        of: for `ema`, the name of the engine. The module's parameter names are a subset of the engine's:
            the loop copies those at the start and averages them by name.
        momentum: for `ema`, the share of the old average that is kept after a step.
    """

    build: Callable[[], nn.Module]
    kind: Literal["engine", "ema", "plain", "frozen"]
    of: str | None = None
    momentum: Callable[[StepInfo], float] | None = None


class Method(ABC):
    """A pretraining method; see the module's text for when each function is called, and by whom."""

    name: ClassVar[str]

    @abstractmethod
    def submodules(self) -> dict[str, SubmoduleSpec]:
        """Name the networks. They may be called, and nothing else: an engine hides its module."""

    def targets(self, nets: Mapping[str, nn.Module], batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """Compute what the rows of other micro-batches need of this one: name -> (B, D), no gradient."""
        return {}

    @abstractmethod
    def losses(
        self,
        nets: Mapping[str, nn.Module],
        batch: Batch,
        targets: Mapping[str, Tensor],
        pool: Mapping[str, Tensor],
        info: StepInfo,
        comm: Comm,
    ) -> Losses:
        """Compute the losses of one micro-batch.

        Args:
            nets: the networks of `submodules`, by name.
            batch: a micro-batch of `shards.read.stream`, on the device.
            targets: what `targets` gave for this micro-batch, (B, D) each.
            pool: the same of the whole global batch in slot order, (G, D) each, no gradient.
            info: where training stands.
            comm: agreement between ranks.
        """

    def after_step(self, info: StepInfo, comm: Comm) -> None:  # noqa: B027 (most methods hold no state)
        """Advance moving averages; called once per global batch by all ranks."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the method's own state, for the checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: the names differ.
        """
        expected = self.state_dict().keys()
        if set(state) != set(expected):
            raise ValueError(f"the method's state holds {sorted(state)}, expected {sorted(expected)}")
