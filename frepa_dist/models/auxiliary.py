"""A frozen encoder of somebody else's, a second source of what an embedding should know (RetMAE)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from frepa_dist.models.init import load_strictly, read_weights
from shards.support.errors import ConfigError, EnvironmentFault


class AuxiliaryEncoder(nn.Module):
    """Resizes and normalizes images as a timm model wants them, and gives its pooled features.

    Args:
        model: a timm model without a classifier; its pretrained configuration says size, mean and std.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module) -> None:
        from timm.data import resolve_model_data_config

        super().__init__()
        self.model = model.eval().requires_grad_(False)
        wanted = resolve_model_data_config(model)
        self.input_size: tuple[int, int] = wanted["input_size"][-2:]
        self.register_buffer("mean", torch.tensor(wanted["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(wanted["std"]).view(3, 1, 1))

    def train(self, mode: bool = True) -> AuxiliaryEncoder:
        """Stay in evaluation mode: a frozen encoder has no dropout and keeps its statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, S, S) with values in [0, 1] -> (B, D)."""
        x = images
        if x.shape[-2:] != self.input_size:
            x = functional.interpolate(x, self.input_size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.model((x - self.mean) / self.std)  # type: ignore[no-any-return]


def create_auxiliary_encoder(name: str, weights: Path | None = None) -> AuxiliaryEncoder:
    """Create a frozen encoder.

    Args:
        name: a timm model, `hf-hub:OWNER/NAME` or `local-dir:FOLDER`.
        weights: safetensors or PyTorch file of exactly the model's names, a classifier beside them is left
            out; None takes timm's pretrained weights. Never random ones.

    Raises:
        ConfigError: timm has no such model, or it has no pretrained weights.
        DataError: the file does not fit the model.
        EnvironmentFault: the pretrained weights cannot be fetched.
    """
    if weights is None:
        return AuxiliaryEncoder(_create(name, pretrained=True))
    model = _create(name)
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    loaded = read_weights(weights)
    load_strictly(model, {k: v for k, v in loaded.items() if k.rpartition(".")[0] not in heads}, weights)
    return AuxiliaryEncoder(model)


def outline_auxiliary_encoder(name: str) -> AuxiliaryEncoder:
    """Create an encoder of the same shapes without its weights, to count what it costs.

    Raises:
        ConfigError: timm has no such model.
    """
    return AuxiliaryEncoder(_create(name))


def auxiliary_width(name: str) -> int:
    """Return the width of a timm model's pooled features, without its weights.

    Raises:
        ConfigError: timm has no such model.
    """
    with torch.device("meta"):
        return int(_create(name).num_features)


def _create(name: str, *, pretrained: bool = False) -> Any:
    """A timm model without its classifier; `Any`, for timm has no type for what its models have in common."""
    import timm

    try:
        # with its own classes, which then go: with others timm would not load strictly
        model = timm.create_model(name, pretrained=pretrained)
    except OSError as error:
        raise EnvironmentFault(
            f"the pretrained weights cannot be fetched: {error}",
            where=name,
            fix="fetch them elsewhere, and name the safetensors file in `aux.weights`",
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"timm cannot create it: {error}",
            where=name,
            allowed="a name of timm.list_models(), hf-hub:OWNER/NAME or local-dir:FOLDER",
            fix="correct `aux.model`, or name a weights file in `aux.weights`",
        ) from error
    model.reset_classifier(0)
    return model
