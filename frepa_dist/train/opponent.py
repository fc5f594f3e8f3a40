"""Discriminators: how each is trained beside the student, and who may change its weights when."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from frepa_dist.config import TrainConfig
from frepa_dist.methods.base import Losses
from frepa_dist.train.engines import Autocast, EngineSubmodule, World, opponent_settings


class OpponentSubmodule:
    """A discriminator: fp32, computing under the student's autocast, trained by an engine of its own.

    The student's loss goes through the bare module while its weights take no gradient. It must not go through
    the engine: gradients of a loss that is not the engine's would then enter its reduction, which under ZeRO
    1 trains on wrong gradients in silence and under ZeRO 2 fails.

    In its own turn the engine's forward pass is the whole computation of the loss. The engine hooks what its
    forward returns, so a method may call the network as often as it likes and differentiate inside (R1).

    Attributes:
        module: the network.
        own: its engine.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, accumulation: int, world: World) -> None:
        self.module = module.to(world.device, torch.float32)
        self._weights = [p for p in module.parameters() if p.requires_grad]
        settings = opponent_settings(config)
        self.own = EngineSubmodule(_Computation(module), settings, config.micro_batch_size, accumulation)
        self._call = Autocast(module, world.device.type) if config.precision == "bf16" else module
        self._set_trainable(False)

    def _set_trainable(self, trainable: bool) -> None:
        for weight in self._weights:
            weight.requires_grad_(trainable)

    @property
    def call(self) -> nn.Module:
        """The bare module under the student's autocast; its weights take gradients inside `learning` only."""
        return self._call

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Let gradients into the weights; nothing else touches `requires_grad` of an opponent."""
        self._set_trainable(True)
        try:
            yield
        finally:
            self._set_trainable(False)

    def train(self, compute: Callable[[], Losses | None]) -> Losses | None:
        """Learn from one micro-batch, without a step; after it comes `step`, unless it rests.

        Args:
            compute: calls the network and gives its losses; None: it rests.
        """
        with self.learning():
            losses: Losses | None
            total, losses = self.own.call(compute)
            if losses is not None:
                self.own.backward(total)
        return losses

    def step(self) -> None:
        """End a micro-batch; at the last of a global batch the engine applies the step."""
        with self.learning():
            self.own.step()

    def after_step(self) -> None:
        """Let the network follow its new weights, where it has something that does."""
        follow = getattr(self.module, "after_step", None)
        if follow is not None:
            follow()


class _Computation(nn.Module):
    """What an opponent's engine runs: any function of the network, whose first result is a loss."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.net = module

    def forward(self, compute: Callable[[], Losses | None]) -> tuple[Tensor | None, Losses | None]:
        losses = compute()
        return (None, None) if losses is None else (losses.total, losses)
