"""What `tools/bench_train.py --json FILE` measured, as a plan takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.planning.assumptions import Measured
from cluster.planning.gpus import CUSTOM
from frepa_dist.config import RunConfig
from shards.support.errors import ConfigError, DataError

MFU = "mfu"


def read_calibration(path: Path, config: RunConfig, gpu: str, peak_flops: float) -> Measured:
    """MFU as measured for a run's method: its value and its basis.

    On the kind of GPU that is planned for, counted operations per second are held against the data sheet's
    peak. Measured on another device, it is the share of that device's own matrix peak: said in the basis.

    Args:
        path: the file.
        config: of the run.
        gpu: short name of the GPU that is planned for.
        peak_flops: its peak by the data sheet.

    Raises:
        DataError: not such a file.
        ConfigError: the run's method was not measured, or in another precision.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        device, precision = str(data["device"]), str(data["precision"])
        ways: dict[str, dict[str, Any]] = data["ways"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"no measurements of training: {error!r}",
            where=path,
            fix="python tools/bench_train.py --json FILE",
        ) from error
    name = config.method.name
    if name not in ways or "flops_per_second" not in ways[name]:
        raise ConfigError(
            f"it does not measure the method {name}",
            where=path,
            allowed=", ".join(way for way, found in ways.items() if "flops_per_second" in found),
            fix=f"python tools/bench_train.py --methods {name} --json {path}",
        )
    if precision != config.train.precision:
        raise ConfigError(
            f"it measures {precision}, the run trains in {config.train.precision}",
            where=path,
            fix=f"python tools/bench_train.py --precision {config.train.precision} --json {path}",
        )
    found = ways[name]
    shape = f"ViT-{data.get('size')}, {data.get('image_size')} pixels, batch {data.get('batch')}"
    what = f"{path.name}, {name}, {shape}"
    if gpu != CUSTOM and gpu.partition("-")[0].lower() in device.lower():
        return {MFU: (found["flops_per_second"] / peak_flops, f"measured: {what}, on {device}")}
    return {
        MFU: (
            found["flops_per_second"] / data["peak_flops"],
            f"measured on another device ({device}, as a share of its matrix peak): {what}",
        )
    }
