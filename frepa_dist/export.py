"""The encoder of a run as a folder in timm's hub layout: config.json, model.safetensors, README.md.

`timm.create_model("local-dir:FOLDER", pretrained=True)` gives the encoder without a head; its features are
the mean over positions after the final norm. The folder names no machine, path or user.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from frepa_dist.config import RunConfig
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.timm_encoders import OWN_KEYS
from frepa_dist.export_layout import Layout, describe_layout
from frepa_dist.runs import ENVIRONMENT, load_student
from shards.dataset import load_snapshot
from shards.read.balance import drawn_modalities
from shards.read.config import AccessConfig
from shards.schema import Counts
from shards.stores.atomic import writing_to
from shards.support.errors import ConfigError, DataError
from shards.support.settings import dump_yaml

EXAMPLE = """
import timm

model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()  # else: random weights
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
features = model(transform(image).unsqueeze(0))
"""

MIN_MAX_EXAMPLE = """
import timm
import torch

model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()  # else: random weights
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
pixels = transform(image) * std + mean  # in [0, 1] again
spread = (pixels.max() - pixels.min()).clamp(min=1 / 255)  # a flat image has none
pixels = (pixels - pixels.min()) / spread
features = model(((pixels - mean) / std).unsqueeze(0))
"""

MIN_MAX_WORDS = (
    "then each image by its own smallest and largest value to [0, 1] (timm's transform does not\n"
    "do this: see above), "
)

TOLERANCE = 1e-4  # of the check, relative; kernels of other shapes round in another way


def export_encoder(run_dir: Path, out_dir: Path, step: int | None = None) -> Path:
    """Write the encoder of a checkpoint, load it again with timm, compare, and only then put it in place.

    Args:
        run_dir: the run.
        out_dir: a folder that does not exist, or is empty.
        step: of the checkpoint, None for the newest.

    Returns:
        `out_dir`.

    Raises:
        ConfigError: `out_dir` holds something, or timm cannot build such an encoder.
        DataError: there is no such checkpoint, or timm makes other features of it.
        EnvironmentFault: the folder cannot be written.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(
            "there is something already", where=out_dir, fix="name a new folder, or empty this one"
        )
    out_dir = out_dir.resolve()
    student, config, step = load_student(run_dir, step)
    layout = describe_layout(student, config)
    # beside the destination, so that the rename stays on one file system; a killed export leaves it there
    partial = out_dir.with_name(f".{out_dir.name}.partial-{os.getpid()}")
    with writing_to(out_dir):
        partial.mkdir(parents=True)
        try:
            provenance = describe_provenance(run_dir, config, step)
            data = save(layout.weights, metadata={"format": "pt", **_texts(provenance)})
            (partial / "model.safetensors").write_bytes(data)
            (partial / "config.json").write_text(json.dumps(timm_config(config, layout), indent=2) + "\n")
            (partial / "README.md").write_text(write_card(config, layout, provenance), encoding="utf-8")
            check_features(student, partial)
            partial.replace(out_dir)  # an empty folder gives way
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return out_dir


def timm_config(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """What timm reads to build the encoder and to prepare images, and what it passes over (`frepa`)."""
    model = config.method.input
    return {
        "architecture": layout.architecture,
        "num_classes": 0,
        "num_features": layout.width,
        "global_pool": "avg",
        "model_args": layout.arguments,
        OWN_KEYS: {"min_max": layout.min_max},
        "pretrained_cfg": {
            "tag": f"frepa_{config.method.name}",
            "custom_load": False,
            "input_size": [3, layout.image_size, layout.image_size],
            "fixed_input_size": "img_size" in layout.arguments,  # timm hands the size to the model then
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(model.mean),
            "std": list(model.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": layout.first_conv,
            "classifier": layout.classifier,
        },
    }


def describe_provenance(run_dir: Path, config: RunConfig, step: int) -> dict[str, Any]:
    """Where the weights come from, without any path."""
    environment: dict[str, Any] = {}
    if (run_dir / ENVIRONMENT).is_file():
        environment = json.loads((run_dir / ENVIRONMENT).read_text(encoding="utf-8"))
    return {
        "method": config.method.name,
        "step": step,
        "samples_seen": step * config.train.global_batch_size,
        "config_digest": config_digest(config),
        "snapshot": config.data.snapshot,
        "trained_with": environment.get("packages", {}),
        "exported_with": f"frepa {version('frepa')}",
    }


def config_digest(config: RunConfig) -> str:
    """16 hex digits over all settings of a run but the places of the run and of its data."""
    places = {"root", *AccessConfig.model_fields}
    plain = config.model_dump(mode="json", exclude={"output": True, "data": places})
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def check_features(student: nn.Module, folder: Path) -> None:
    """Compare what timm makes of a folder with the student, on noise.

    Raises:
        DataError: the features differ.
    """
    generator = torch.Generator().manual_seed(0)
    exported = load_encoder(folder, "cpu")
    size = exported.image_size
    images = torch.randint(0, 256, (2, 3, size, size), generator=generator, dtype=torch.uint8)
    normalized = exported.normalize(images)
    with torch.inference_mode():
        expected = student.eval().embed(normalized).float()  # type: ignore[operator]
    difference = float((exported.embed(normalized) - expected).abs().max())
    if not difference <= TOLERANCE * float(expected.abs().max()):
        raise DataError(
            f"timm makes other features of the export: they differ by {difference:.3g}", where=folder
        )


def write_card(config: RunConfig, layout: Layout, provenance: Mapping[str, Any]) -> str:
    """The model card, Markdown with the header that model hubs read."""
    model, train = config.method.input, config.train
    num_parameters = sum(value.numel() for value in layout.weights.values())
    packages = ", ".join(f"{name} {number}" for name, number in provenance["trained_with"].items())
    settings = dump_yaml({"method": _plain(config.method.model_dump()), "train": _plain(train.model_dump())})
    return f"""---
library_name: timm
tags: [image-feature-extraction, timm, medical]
---

# Encoder pretrained with {config.method.name} on medical images

```python
{(MIN_MAX_EXAMPLE if layout.min_max else EXAMPLE).strip()}  # (1, {layout.width})
```

## Architecture

{layout.network}; in timm `{layout.architecture}` without a head, width {layout.width},
{num_parameters / 1e6:.1f} million parameters. {layout.feature}

## Input

RGB images of {layout.image_size} x {layout.image_size} pixels, grey ones repeated to three channels: the
short side is brought to {layout.image_size}, the center cut out. Pixels are scaled to [0, 1],
{MIN_MAX_WORDS if layout.min_max else ""}then normalized by mean {_numbers(model.mean)} and standard deviation
{_numbers(model.std)}. Training shrank images by area averaging; timm's closest filter is bicubic.

## Data

{_describe_data(config)}

## Method and provenance

| | |
|---|---|
| method | {config.method.name} |
| steps | {provenance["step"]} of {train.global_batch_size} images: {provenance["samples_seen"]} seen |
| config digest | {provenance["config_digest"]} |
| dataset snapshot | {provenance["snapshot"]} |
| trained with | {packages or "not recorded"} |
| exported with | {provenance["exported_with"]} |

```yaml
{settings.strip()}
```

Not a medical device. What it is worth for a task must be measured on that task.
"""


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _plain(value: Any) -> Any:
    """Plain data for YAML; of a path only the name, which says what it was and not where it lay."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, PurePath) else value


def _describe_data(config: RunConfig) -> str:
    """Modalities, numbers of samples, and what the build left out."""
    try:
        snapshot = load_snapshot(config.data.root, config.data.snapshot)
    except DataError:
        return (
            f"Snapshot `{config.data.snapshot}`. The dataset was not at hand when this folder was written, "
            "so its modalities and counts are not stated."
        )
    rows = []
    drawn = drawn_modalities(config.data.modality_weights, snapshot.modalities)
    for modality in drawn:
        builds = [build for build in snapshot.builds if build.modality == modality]
        counts = sum((build.counts for build in builds), Counts())
        names = ", ".join(build.source for build in builds)
        left_out = counts.units - counts.samples
        digest = {**snapshot.hf_digests, **(config.data.hf_digests or {})}[modality]
        rows.append(f"| {modality} | {names} | {counts.samples} | {left_out} | {digest} |")
    table = "\n".join(rows)
    unseen = [name for name in snapshot.modalities if name not in drawn]
    not_drawn = f" Nothing was drawn of its {', '.join(unseen)}." if unseen else ""
    stored = f"images stored with a short side of at most {snapshot.size} pixels.{not_drawn}"
    return f"""Snapshot `{snapshot.hash}`, {stored}

| modality | sources | samples | left out (unreadable, excluded, repeated) | HF parameters |
|---|---|---:|---:|---|
{table}"""
