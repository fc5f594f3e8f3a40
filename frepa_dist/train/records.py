"""What a run writes down: metrics and events as JSON lines, the outcome, the environment it ran in."""

from __future__ import annotations

import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frepa_dist.runs import METRICS, read_metrics
from frepa_dist.train.engines import World
from shards.stores.atomic import replace_text


class PhaseTimer:
    """Seconds spent in each phase since the last `take`; no device synchronization.

    On an accelerator a phase counts the time the host needs to submit it; the waiting shows in the phase
    that first needs a result.

    Args:
        heard: is told of each block: its phase and its seconds.
    """

    def __init__(self, heard: Callable[[str, float], None] | None = None) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._heard = heard

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as part of `name`."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._seconds[name] += seconds
        if self._heard is not None:
            self._heard(name, seconds)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


class Averages:
    """Running means of 0-dim tensors, and maxima of those whose name ends in `_max`; kept on the device."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one observation of each value."""
        for name, value in values.items():
            value = value.detach().to(torch.float32)
            if name in self._values:
                old = self._values[name]
                value = torch.maximum(old, value) if name.endswith("_max") else old + value
            self._values[name] = value
            self._counts[name] += 1

    def take(self, world: World) -> dict[str, float]:
        """Means (maxima) over observations and ranks since the last call; all ranks must call it."""
        maxima = sorted(name for name in self._values if name.endswith("_max"))
        means = sorted(set(self._values) - set(maxima))
        result: dict[str, float] = {}
        if means:
            stacked = torch.stack([self._values[name] / self._counts[name] for name in means])
            result.update(zip(means, world.mean(stacked).tolist(), strict=True))
        if maxima:
            stacked = torch.stack([self._values[name] for name in maxima])
            result.update(zip(maxima, world.max(stacked).tolist(), strict=True))
        self._values, self._counts = {}, defaultdict(int)
        return result


def truncate_metrics(run_dir: Path, step: int) -> None:
    """Drop the lines after `step`: the steps that a crash undid are computed, and written, again."""
    kept = [record for record in read_metrics(run_dir) if record["step"] <= step]
    replace_text(run_dir / METRICS, "".join(json.dumps(record) + "\n" for record in kept))


def describe_environment(world: World) -> dict[str, Any]:
    """Versions and devices; no host name, no path, no user."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: version(name) for name in ("frepa", "torch", "deepspeed", "timm", "numpy")},
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "world_size": world.size,
    }
