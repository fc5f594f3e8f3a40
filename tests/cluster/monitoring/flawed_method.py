"""A masked autoencoder whose loss is no number while a file is there; found through an entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from frepa_dist.methods.base import Losses
from frepa_dist.methods.mae import Mae, MaeConfig


class FlawedConfig(MaeConfig):
    """As MAE's, and the file."""

    name: Literal["flawed"] = "flawed"  # type: ignore[assignment]
    switch: Path


class Flawed(Mae):
    """See the module."""

    name: ClassVar[str] = "flawed"
    config_class = FlawedConfig

    def losses(self, *arguments: Any) -> Losses:
        losses = super().losses(*arguments)
        if self.config.switch.exists():
            losses.terms["rec"] = losses.terms["rec"] * float("nan")
        return losses
