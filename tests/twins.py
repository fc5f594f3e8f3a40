"""A config's twin: the same run, with everything as it says, but of a size that a CPU trains in a moment.

What is replaced is the network's size and the image's, the batch, the length, and where data come from and
go; nothing that decides what is learned from what.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frepa_dist.config import RunConfig
from frepa_dist.models.catalog import BACKBONES
from shards.support.settings import merge, read_config, validate

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = sorted(
    str(p.relative_to(CONFIGS))
    for p in CONFIGS.rglob("*.yaml")
    if p.parent.name not in ("shards", "sweep", "evaluate")
)
IMAGE_SIZE = 64
SMALLEST = {
    "vit": "vit_pico",
    "swin": "swin_pico",
    "swinv2": "swinv2_pico",
    "convnext": "convnext_twin",
    "convnextv2": "convnextv2_twin",
    "resnet": "resnet10",
}
AUXILIARY = "test_vit"  # of timm, as small as its name says
TRAIN = {
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "epochs": None,
    "steps": 100,
    "base_learning_rate": 1.0,  # times batch / 256; in bf16 a weight of 1 does not show smaller steps
    "log_every": 1,
    "metrics": {"port": None},
}


def smaller_method(method: Mapping[str, Any], auxiliary_weights: Path) -> dict[str, Any]:
    """Say what is laid over the method of a config."""
    model = method.get("model", {})
    small: dict[str, Any] = {"image_size": IMAGE_SIZE}
    if model.get("backbone"):
        small["backbone"] = SMALLEST[BACKBONES[model["backbone"]].family]
    elif "size" in model or method["name"] in ("mae", "retmae"):
        small["size"] = "tiny"
    over: dict[str, Any] = {"model": small}
    if method.get("aux"):
        over["aux"] = {"model": AUXILIARY, "weights": str(auxiliary_weights)}
    if method.get("adversarial_image"):
        over["adversarial_image"] = {"width": 8}
    return over


def twin(name: str | Path, root: Path, output: Path, auxiliary_weights: Path) -> RunConfig:
    """Make the twin of a config that the package ships, to be trained on the dataset at `root`.

    Raises:
        ConfigError: the config itself is wrong.
    """
    full = validate(RunConfig, read_config(name), where=name).model_dump(mode="json")
    over = {
        "output": str(output),
        "method": smaller_method(full["method"], auxiliary_weights),
        "data": {"root": str(root), "num_workers": 0},
        "train": TRAIN,
    }
    data = merge(full, over)
    if "patch_size" in data["method"]["model"] and data["method"]["model"].get("backbone"):
        del data["method"]["model"]["patch_size"]  # follows from the backbone
    return validate(RunConfig, data, where=f"twin of {name}")
