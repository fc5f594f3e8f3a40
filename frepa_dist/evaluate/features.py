"""Loads frozen encoders, whatever they come from.

The feature of an image is the mean over positions (of a vision transformer: over patch tokens, the class
token left out) after the final norm: what RetMAE's loss works on and what an exported folder gives in timm.

Shapes: B batch, S image side, N patches, K patches kept, D width, h = w sides of a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from frepa_dist.evaluate.encoder import Encoder, to_map
from frepa_dist.evaluate.timm_encoders import load_folder, load_timm
from frepa_dist.methods.base import InputSettings, Student
from frepa_dist.models.autoencoder import create_autoencoder
from frepa_dist.models.backbones import BackboneSettings
from frepa_dist.models.catalog import BACKBONES
from frepa_dist.models.init import read_weights
from frepa_dist.models.initialize import TRUNK
from frepa_dist.models.mae_checkpoint import load_mae_checkpoint
from frepa_dist.models.masked_settings import ModelConfig
from frepa_dist.models.vit_mae import (
    VIT_SIZES,
    EncoderTrunk,
    create_vit_mae,
)
from frepa_dist.runs import CONFIG, load_student
from shards.support.errors import ConfigError, DataError

__all__ = ["Encoder", "load_encoder"]

SOURCES = (
    "a run folder, an exported folder, an official MAE checkpoint (.pth, .safetensors), "
    "timm:NAME, timm:NAME?pretrained, timm:NAME?weights=FILE, random:tiny|small|base|large|BACKBONE[:SEED] "
    "(`frepa backbones` lists them)"
)
RANDOM_SIZE = 224


def load_encoder(source: str | Path, device: str | torch.device | None = None) -> Encoder:
    """Load a frozen encoder.

    Args:
        source: see `SOURCES`; a run gives its newest checkpoint.
        device: where it runs; None takes a GPU if there is one.

    Raises:
        ConfigError: the source is none of these, or names a model that does not exist.
        DataError: its weights are missing, damaged or do not fit.
        EnvironmentFault: pretrained weights cannot be fetched.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    text, path = str(source), Path(source)
    kind, _, rest = text.partition(":")
    if kind == "random" and not path.exists():
        return _load_random(text, rest, where)
    if kind == "timm" and not path.exists():
        return load_timm(text, rest, where, SOURCES)
    if (path / CONFIG).is_file():
        return encoder_of_run(path, None, where)
    if (path / "config.json").is_file():
        return load_folder(text, path, where)
    if path.is_file():
        return _load_mae_file(text, path, where)
    raise ConfigError("no encoder is there", where=source, allowed=SOURCES)


def encoder_of_run(run_dir: Path, step: int | None, device: str | torch.device | None = None) -> Encoder:
    """Load the frozen encoder of a run's checkpoint, the newest for None.

    Raises:
        DataError: there is no such checkpoint, or its weights do not fit.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    student, config, step = load_student(run_dir, step)
    return _from_student(f"{run_dir}, step {step}", student, config.method.input, where)


def _from_student(name: str, student: nn.Module, settings: InputSettings, device: torch.device) -> Encoder:
    """An encoder of any method's student (`methods.base.Student`)."""
    student = student.eval().requires_grad_(False).to(device)
    known = cast("Student", student)
    return Encoder(
        name,
        known.embed,
        known.width,
        known.image_size,
        known.patch_size,
        settings.mean,
        settings.std,
        device,
        map=_map_of(student),
        module=getattr(student, "encoder", student),
        min_max=bool(getattr(settings, "min_max", False)),
    )


def _map_of(student: nn.Module) -> Callable[[Tensor], Tensor] | None:
    if isinstance(student, EncoderTrunk):
        return lambda images: to_map(student.encode(images)[:, 1:])
    own: Callable[[Tensor], Tensor] | None = getattr(student, "map", None)
    return own


def _load_random(source: str, rest: str, device: torch.device) -> Encoder:
    name, _, seed = rest.partition(":")
    if name not in (*VIT_SIZES, *BACKBONES) or not (seed or "0").isdecimal():
        raise ConfigError("no such random encoder", where=source, allowed=SOURCES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed or 0))
        if name in VIT_SIZES:
            return _from_student(source, create_vit_mae(name), ModelConfig(), device)  # type: ignore[arg-type]
        settings = BackboneSettings(backbone=name, image_size=RANDOM_SIZE, min_max=False, neck_width=None)
        return _from_student(source, create_autoencoder(settings), settings, device)


def _load_mae_file(source: str, path: Path, device: torch.device) -> Encoder:
    """Load an official MAE or RETFound checkpoint; its size follows from the shapes."""
    weights = read_weights(path)
    if any(key.startswith(TRUNK) for key in weights):
        raise DataError(
            "the weights of a run; the file alone does not say which backbone they are of",
            where=path,
            fix="name the run folder",
        )
    try:
        width, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
        side = math.isqrt(weights["pos_embed"].shape[1] - 1)
        depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
        (size,) = [name for name, known in VIT_SIZES.items() if (known.width, known.depth) == (width, depth)]
    except (KeyError, ValueError, IndexError) as error:
        sizes = ", ".join(f"{name} ({s.width} wide, {s.depth} deep)" for name, s in VIT_SIZES.items())
        raise DataError("not the weights of an MAE vision transformer", where=path, allowed=sizes) from error
    model = create_vit_mae(size, image_size=side * patch_size, patch_size=patch_size)
    load_mae_checkpoint(model, path)
    return _from_student(source, model, ModelConfig(), device)
