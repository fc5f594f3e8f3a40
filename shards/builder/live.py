"""What a builder exports, under the names of `shards.support.metrics`.

Counted in the builder's own process from the results of its tasks, wherever these run: what this build
writes, not what an earlier one has committed. Duplicates are those of bytes, which the plan finds; those of
pixels are found when all is written, and stay counted as samples here.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager

from shards.builder.config import BuildConfig
from shards.builder.plan import Plan
from shards.builder.writer import ShardResult
from shards.stores.store import Store
from shards.support.targets import unique_label
from shards.support.telemetry import Telemetry

OUTCOMES = ("sample", "duplicate", "excluded", "quarantined")


def serve_builder(config: BuildConfig, store: Store) -> AbstractContextManager[Telemetry]:
    """Serve the metrics of a build for the length of a block.

    Raises:
        EnvironmentFault: the port is in use, or the folder of targets cannot be written to.
    """
    labels = {"run": unique_label(store.uri), "source": f"{config.modality}-{config.source}"}
    return Telemetry.serve(config.metrics, "build", labels)


class BuildMetrics:
    """Says to a builder's telemetry what it does."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry, self._planned = telemetry, 0
        self._count(dict.fromkeys(OUTCOMES, 0))

    def begin_part(self, part: Plan) -> None:
        """Count what a part of the plan leaves out: headers and checksums tell so much."""
        excluded, quarantined = (part.reasons(status).total() for status in ("excluded", "quarantined"))
        duplicates = part.count_units("duplicate")
        self._count({"excluded": excluded, "quarantined": quarantined, "duplicate": duplicates})

    def begin_shards(self, number: int) -> None:
        """Add to what has to be written."""
        self._planned += number
        self._telemetry.set("frepa_build_planned_shards", self._planned)

    def end_shard(self, result: ShardResult) -> None:
        """Count a shard that was written."""
        self._telemetry.add("frepa_build_shards_total")
        self._count(Counter(bad.status for bad in result.bad))
        if result.info is not None:
            self._telemetry.add("frepa_build_bytes_written_total", result.info.num_bytes)
            self._count({"sample": result.info.num_samples})

    def _count(self, units: dict[str, int]) -> None:
        for outcome, number in units.items():
            self._telemetry.add("frepa_build_units_total", number, outcome=outcome)
