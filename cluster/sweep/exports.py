"""What the driver of a sweep exports, under the names of `shards.support.metrics`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from cluster.sweep.config import SweepConfig
from shards.support.targets import unique_label
from shards.support.telemetry import Telemetry

Publish = Callable[[dict[str, int], float | None, int], None]
"""Is told how many trials are in each state, the best value so far, and how many reports there are."""


@contextlib.contextmanager
def serve_sweep(sweep: SweepConfig) -> Iterator[Publish]:
    """Serve the metrics of a sweep for the length of the block.

    Yields:
        What to tell the news to.

    Raises:
        EnvironmentFault: the port is in use, or the folder of targets cannot be written to.
    """
    labels = {"run": unique_label(sweep.output.resolve())}
    with Telemetry.serve(sweep.metrics, "sweep", labels) as telemetry:
        telemetry.set("frepa_sweep_planned_trials", sweep.num_planned)
        told = 0

        def publish(states: dict[str, int], best: float | None, reports: int) -> None:
            nonlocal told
            for state, number in states.items():
                telemetry.set("frepa_sweep_trials", number, state=state)
            if best is not None:
                telemetry.set("frepa_sweep_best_metric", best)
            # going on, the reports of earlier drivers are not this process's
            telemetry.add("frepa_sweep_reports_total", max(0, reports - told))
            told = reports

        yield publish
