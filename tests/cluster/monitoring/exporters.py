"""Everything that exports, as real exporters of made-up numbers: what a healthy run shows, and its faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import get_args

from shards.support.metrics import METRICS, Exporter
from shards.support.telemetry import MetricsConfig, Telemetry

RUN = "made-up"
TICK_SECONDS = 0.05
# own labels of metrics, a value or more of each
VALUES = {
    "phase": ("data", "forward"),
    "term": ("total", "rec"),
    "network": ("student",),
    "name": ("grain",),
    "result": ("written", "failed", "hit", "miss"),
    "code": ("5",),
    "state": ("training",),
    "place": ("run", "cache"),
    "outcome": ("sample", "quarantined"),
}
KINDS = {"frepa_train_guarded_steps_total": ("skipped", "returns", "passed_over"), "": ("allocated", "peak")}
GAUGES = {
    "frepa_train_planned_steps": 1e6,
    "frepa_train_samples_per_second": 100.0,
    "frepa_train_discriminator_accuracy": 0.7,
    "frepa_supervisor_heartbeat_age_seconds": 0.1,
    "frepa_disk_free_bytes": 6e11,
    "frepa_disk_size_bytes": 1e12,
}
# counters that stand still while all is well
FAULTS = {"skipped", "returns", "failed", "quarantined", "5"}
STILL = {"frepa_data_samples_skipped_total", "frepa_supervisor_restarts_total"}


class Exporters:
    """One process of each kind, whose numbers go on with time.

    Attributes:
        exporters: their telemetry by kind.
        gauges: values of gauges; may be changed.
        is_stepping: whether steps are taken.
    """

    def __init__(self, exporters: Mapping[Exporter, Telemetry]) -> None:
        self.exporters, self.gauges, self.is_stepping = exporters, dict(GAUGES), True
        self._steps = 0

    def tick(self) -> None:
        """Let `TICK_SECONDS` pass in all of them."""
        self._steps += self.is_stepping
        now = time.time()
        moving = {
            "frepa_train_step": self._steps,
            "frepa_train_last_step_timestamp_seconds": now,
            "frepa_train_checkpoint_timestamp_seconds": now // 2 * 2,
        }
        for metric in METRICS:
            if metric.exporter == "train" and not self.is_stepping:
                continue
            telemetry = self.exporters[metric.exporter]
            for labels in label_sets(metric.name, metric.labels):
                if metric.kind == "gauge":
                    value = moving.get(metric.name, self.gauges.get(metric.name, 1.0))
                    telemetry.set(metric.name, value, **labels)
                elif metric.kind == "histogram":
                    telemetry.observe(metric.name, TICK_SECONDS)
                else:
                    still = metric.name in STILL or FAULTS & set(labels.values())
                    share = 0.1 if "data" in labels.values() else 0.9
                    telemetry.add(metric.name, 0 if still else share * TICK_SECONDS, **labels)


def label_sets(name: str, labels: tuple[str, ...]) -> list[dict[str, str]]:
    """The series of a metric by its own labels, of which there is one at most."""
    if not labels:
        return [{}]
    (label,) = labels
    values = KINDS.get(name, KINDS[""]) if label == "kind" else VALUES[label]
    return [{label: value} for value in values]


@contextmanager
def exporting(targets: Path) -> Iterator[Exporters]:
    """Serve all of them for the length of the block, with their files of targets."""
    settings = MetricsConfig(port=0, targets=targets)
    with ExitStack() as stack:
        served: dict[Exporter, Telemetry] = {}
        for kind in get_args(Exporter):
            labels = {"run": RUN, **({"rank": "0"} if kind == "train" else {}), "node": "0"}
            served[kind] = stack.enter_context(Telemetry.serve(settings, kind, labels))
        exporters, ended = Exporters(served), threading.Event()

        def go_on() -> None:
            while not ended.wait(TICK_SECONDS):
                exporters.tick()

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            yield exporters
        finally:
            ended.set()
            thread.join()
