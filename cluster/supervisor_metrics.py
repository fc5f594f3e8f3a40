"""What the supervisor of a node exports, under the names of `shards.support.metrics`.

It also looks after the targets of its ranks: one that was killed has left its own behind.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from cluster.nodes import Nodes
from cluster.verdict import BUG_CODE, LASTING_CODES
from frepa_dist.heartbeats import State
from shards.support.errors import EnvironmentFault
from shards.support.targets import remove_targets, unique_label
from shards.support.telemetry import MetricsConfig, Telemetry

if TYPE_CHECKING:
    from cluster.watch import Watch
    from frepa_dist.config import RunConfig

FAULT_CODES = sorted({BUG_CODE, EnvironmentFault.exit_code, *LASTING_CODES})


@dataclass(frozen=True)
class Exports:
    """What a supervisor serves, and where.

    Attributes:
        settings: of the run; node n takes the port - 1 - n.
        cache_dir: the local cache of shards, None where there is none.
    """

    settings: MetricsConfig
    cache_dir: Path | None = None

    @classmethod
    def of(cls, config: RunConfig) -> Exports:
        """What the settings of a run ask for."""
        from shards.read.access import default_cache_dir
        from shards.stores.store import is_remote

        has_cache = is_remote(config.data.root) and config.data.remote == "cache"
        cache_dir = config.data.cache_dir or default_cache_dir()
        return cls(config.train.metrics, cache_dir if has_cache else None)


class SupervisorMetrics:
    """Says to the telemetry of a supervisor what it does; see `serve_supervisor`."""

    def __init__(self, telemetry: Telemetry, targets: Path | None, own: Mapping[str, str]) -> None:
        self._telemetry, self._targets, self._own = telemetry, targets, own
        self._watch: Watch | None = None
        for state in get_args(State):
            telemetry.follow("frepa_supervisor_ranks", partial(self._num_ranks, state), state=state)
        telemetry.follow("frepa_supervisor_heartbeat_age_seconds", self._silent_seconds)
        for code in FAULT_CODES:
            telemetry.add("frepa_supervisor_faults_total", 0, code=str(code))

    @contextlib.contextmanager
    def watching(self, watch: Watch) -> Iterator[None]:
        """Show what the watch over a start sees, as long as the block runs."""
        self._watch = watch
        try:
            yield
        finally:
            self._watch = None

    def forget_ranks(self) -> None:
        """Remove the targets of this node's ranks, none of which is left."""
        if self._targets is not None:
            remove_targets(self._targets, {"job": "frepa_train", **self._own})

    def note_fault(self, code: int) -> None:
        """Count a start that ended in a fault."""
        self._telemetry.add("frepa_supervisor_faults_total", code=str(code))

    def note_restart(self) -> None:
        """Count a restart."""
        self._telemetry.add("frepa_supervisor_restarts_total")

    def _num_ranks(self, state: str) -> float:
        watch = self._watch
        return watch.describe()[0][state] if watch is not None else 0

    def _silent_seconds(self) -> float:
        """Between two starts nobody can speak."""
        watch = self._watch
        return watch.describe()[1] if watch is not None else math.nan


def _disk(folder: Path, part: str) -> float:
    try:
        return float(getattr(shutil.disk_usage(folder), part))
    except OSError:  # it is not there yet, or the disk is gone
        return math.nan


@contextlib.contextmanager
def serve_supervisor(exports: Exports, run_dir: Path, nodes: Nodes) -> Iterator[SupervisorMetrics]:
    """Serve the metrics of a node's supervisor for the length of the block.

    Raises:
        EnvironmentFault: the port is in use, or the folder of targets cannot be written to.
    """
    own = {"run": unique_label(run_dir.resolve()), "node": str(nodes.node_rank)}
    settings, offset = exports.settings, -1 - nodes.node_rank
    serving = Telemetry.serve(settings, "supervisor", own, offset=offset, key="train.metrics")
    with serving as telemetry:
        disks = {"run": run_dir, "cache": exports.cache_dir}
        for place, folder in disks.items():
            if folder is None:
                continue
            telemetry.follow("frepa_disk_free_bytes", partial(_disk, folder, "free"), place=place)
            telemetry.follow("frepa_disk_size_bytes", partial(_disk, folder, "total"), place=place)
        targets = settings.targets if settings.port is not None else None
        metrics = SupervisorMetrics(telemetry, targets, own)
        metrics.forget_ranks()  # of a supervisor that was killed with all its ranks
        yield metrics
