"""What a rank exports while it trains: facts of the loop under the names of `shards.support.metrics`.

Counters and the histogram of step times are of this rank; losses and what else is logged are means over all
ranks and steps since the log line before, the same on every rank, as in metrics.jsonl. Nothing here waits for
a device: gauges are set from numbers that a log line has read already.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from frepa_dist.runs import MANIFEST
from frepa_dist.train.ledger import COUNTED
from shards.read.access import default_cache_dir
from shards.stores.cache import cache_size
from shards.stores.store import is_remote
from shards.support.telemetry import Telemetry

if TYPE_CHECKING:
    from frepa_dist.config import DataConfig
    from frepa_dist.train.checkpoint.write import Job
    from frepa_dist.train.engines import World
    from shards.read.stream import MicroBatch

Series = tuple[str, dict[str, str]]
# logged numbers that have a gauge of their own
NAMED: dict[str, Series] = {
    "loss": ("frepa_train_loss", {"term": "total"}),
    "lr": ("frepa_train_learning_rate", {"network": "student"}),
    "lr/opponent": ("frepa_train_learning_rate", {"network": "opponent"}),
    "samples_per_second": ("frepa_train_samples_per_second", {}),
    "mi/estimate": ("frepa_train_mi_estimate", {}),
    "mi/log_partition": ("frepa_train_mi_partition", {}),
    "hf_share": ("frepa_train_hf_share", {}),
}
# of these there are counters, or gauges that are set at every step
COUNTED_OTHERWISE = ("step", "epoch", "samples", "data/skipped", "time/", "guard/")


def find_series(name: str) -> Series | None:
    """The gauge that shows a number of metrics.jsonl; None where a counter says it."""
    if name in NAMED:
        return NAMED[name]
    if any(name == other or (other.endswith("/") and name.startswith(other)) for other in COUNTED_OTHERWISE):
        return None
    before, _, after = name.rpartition("/")
    if before == "loss":
        return "frepa_train_loss", {"term": after}
    if before == "gradient_norm":
        return "frepa_train_gradient_norm", {"network": after}
    if after == "accuracy":
        return "frepa_train_discriminator_accuracy", {"network": before}
    if after == "distance":
        return "frepa_train_teacher_distance", {"network": before}
    return "frepa_train_method", {"name": name}


def device_memory(device: torch.device) -> dict[str, int]:
    """Bytes that tensors of this process take on its device, now and at most; of a CPU all of the process."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "peak": torch.cuda.max_memory_allocated(device),
        }
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "allocated": pages * resource.getpagesize(),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


class LiveMetrics:
    """Says to a rank's telemetry what its loop does; free where nothing is served.

    Args:
        telemetry: of this rank.
        world: this rank among the others.
        data: where samples come from.
    """

    def __init__(self, telemetry: Telemetry, world: World, data: DataConfig) -> None:
        self._telemetry, self._world = telemetry, world
        self._guarded: Counter[str] = Counter()
        for kind in COUNTED:
            telemetry.add("frepa_train_guarded_steps_total", 0, kind=kind)
        if world.is_main:
            for result in ("written", "failed"):
                telemetry.add("frepa_train_checkpoints_total", 0, result=result)
        if is_remote(data.root) and data.remote == "cache":
            for result in ("hit", "miss"):
                telemetry.add("frepa_data_cache_requests_total", 0, result=result)
            if not world.local_rank:  # it is the machine's
                folder = data.cache_dir or default_cache_dir()
                telemetry.follow("frepa_data_cache_bytes", partial(cache_size, folder))

    def begin(self, step: int, total_steps: int, checkpoint: Path | None = None) -> None:
        """Tell where training begins, or goes on after it went back: at a checkpoint, or at none."""
        self._telemetry.set("frepa_train_step", step)
        self._telemetry.set("frepa_train_planned_steps", total_steps)
        if checkpoint is not None and self._world.is_main:
            written = (checkpoint / MANIFEST).stat().st_mtime
            self._telemetry.set("frepa_train_checkpoint_step", step)
            self._telemetry.set("frepa_train_checkpoint_timestamp_seconds", written)

    def spend(self, phase: str, seconds: float) -> None:
        """Count the time of a phase."""
        self._telemetry.add("frepa_train_phase_seconds_total", seconds, phase=phase)

    def load(self, batch: MicroBatch) -> None:
        """Count what the loader did for a micro-batch."""
        add = self._telemetry.add
        add("frepa_data_bytes_read_total", batch["num_bytes"])
        if batch["skipped"]:
            add("frepa_data_samples_skipped_total", len(batch["skipped"]))
        if any(batch["cache_requests"]):
            for result, number in batch["cache_requests"]._asdict().items():
                add("frepa_data_cache_requests_total", number, result=result)

    def train(self, num_samples: int, guarded: Counter[str]) -> None:
        """Count the samples of a step, and what guards have done since the process began."""
        self._telemetry.add("frepa_train_samples_total", num_samples)
        if guarded != self._guarded:
            for kind in COUNTED:
                more = guarded[kind] - self._guarded[kind]
                self._telemetry.add("frepa_train_guarded_steps_total", more, kind=kind)
            self._guarded = guarded.copy()

    def end_step(self, step: int, epoch: int, seconds: float) -> None:
        """Tell that a step is over, and how long it took."""
        self._telemetry.set("frepa_train_step", step)
        self._telemetry.set("frepa_train_epoch", epoch)
        self._telemetry.set("frepa_train_last_step_timestamp_seconds", time.time())
        self._telemetry.observe("frepa_train_step_seconds", seconds)

    def log(self, record: Mapping[str, float]) -> None:
        """Show the numbers of a log line."""
        if self._telemetry.port is None:
            return
        for name, value in record.items():
            series = find_series(name)
            if series is not None:
                metric, labels = series
                self._telemetry.set(metric, value, **labels)
        for kind, num_bytes in device_memory(self._world.device).items():
            self._telemetry.set("frepa_train_device_memory_bytes", num_bytes, kind=kind)

    def end_checkpoint(self, job: Job) -> None:
        """Tell how the writing of a checkpoint ended; called by the thread that writes."""
        if not self._world.is_main:
            return
        if job.report.kind != "done":
            self._telemetry.add("frepa_train_checkpoints_total", result="failed")
            return
        self._telemetry.add("frepa_train_checkpoints_total", result="written")
        self._telemetry.set("frepa_train_checkpoint_step", job.step)
        self._telemetry.set("frepa_train_checkpoint_timestamp_seconds", time.time())
        self._telemetry.set("frepa_train_checkpoint_write_seconds", time.perf_counter() - job.started)
