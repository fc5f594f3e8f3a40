"""Live metrics in Prometheus' text format, served on 127.0.0.1. The one user of prometheus_client."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from shards.support.errors import EnvironmentFault


class Telemetry:
    """Gauges of one process, under the prefix `frepa_`; shows nothing when it is not served."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}

    @classmethod
    @contextmanager
    def serve(cls, port: int | None, address: str = "127.0.0.1") -> Iterator[Telemetry]:
        """Serve metrics on a port for the length of the block; None serves none.

        Raises:
            EnvironmentFault: the port is in use.
        """
        telemetry = cls()
        if port is None:
            yield telemetry
            return
        try:
            server, thread = start_http_server(port, addr=address, registry=telemetry._registry)
        except OSError as error:
            raise EnvironmentFault(
                f"metrics cannot be served: {error.strerror}",
                where=f"{address}:{port}",
                fix="set train.metrics_port to a free port (rank r takes the port + r), or to null",
            ) from error
        try:
            yield telemetry
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def set_step(self, record: Mapping[str, float]) -> None:
        """Show the numbers of a logged step: `loss/rec` becomes the gauge `frepa_loss_rec`.

        Seconds are named so: `time/forward` becomes `frepa_time_forward_seconds`.
        """
        for name, value in record.items():
            metric = "frepa_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
            if name.startswith("time/"):
                metric += "_seconds"
            if metric not in self._gauges:
                text = f"{name} at the last logged step"
                self._gauges[metric] = Gauge(metric, text, registry=self._registry)
            self._gauges[metric].set(value)
