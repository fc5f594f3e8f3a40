"""Live metrics of a process, served to Prometheus over HTTP. The one user of prometheus_client.

What may be exported is the table `shards.support.metrics.METRICS`, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from shards.support.errors import EnvironmentFault
from shards.support.metrics import METRICS, Exporter, Metric
from shards.support.settings import Settings
from shards.support.targets import advertised_host, write_target

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

LOWEST_PORT, HIGHEST_PORT = 1024, 65535


class MetricsConfig(Settings):
    """Whether, and where, live metrics are served.

    Attributes:
        port: None serves none; 0 takes any free port, which only `targets` tells; else a run's rank r
            (counted over all nodes) takes port + r, and the supervisor of its node n port - 1 - n; builders
            and sweeps take the port itself.
        address: to listen on. 0.0.0.0 lets other machines read the metrics: nothing asks them who they are.
        targets: folder in which each process that serves says so, for Prometheus' `file_sd_configs`.
    """

    port: int | None = Field(None, ge=0, le=HIGHEST_PORT)
    address: str = "127.0.0.1"
    targets: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.port is not None and 0 < self.port < LOWEST_PORT:
            raise ValueError(f"port {self.port}: take 0, {LOWEST_PORT} to {HIGHEST_PORT}, or null")
        return self

    def port_of(self, offset: int = 0) -> int | None:
        """The port of a process; see `port`."""
        return self.port + offset if self.port else self.port


class Telemetry:
    """Metrics of one process, by their names in the table; a name or label that is not there is a bug.

    Served or not, its functions may be called by any thread; where nothing is served they return at once.
    `Telemetry()` serves nothing.

    Attributes:
        port: where it is served, None where it is not.
    """

    def __init__(self) -> None:
        self.port: int | None = None
        self._known: dict[str, Metric] = {}
        self._registry: CollectorRegistry | None = None
        self._whole: dict[str, Any] = {}
        self._children: dict[tuple[Any, ...], Any] = {}
        self._lock = Lock()

    @classmethod
    @contextmanager
    def serve(
        cls,
        settings: MetricsConfig,
        exporter: Exporter,
        labels: Mapping[str, str],
        *,
        offset: int = 0,
        key: str = "metrics",
    ) -> Iterator[Telemetry]:
        """Serve the metrics of an exporter for the length of the block.

        Args:
            settings: where; its port None serves nothing.
            exporter: whose metrics of the table these are; the target's `job` is `frepa_EXPORTER`.
            labels: of the target (run, rank, node and the like): they tell it from all others.
            offset: added to a port that is not 0.
            key: of the settings, for errors.

        Raises:
            EnvironmentFault: the port is in use, or the folder of targets cannot be written to.
        """
        telemetry = cls()
        port = settings.port_of(offset)
        if port is None:
            yield telemetry
            return
        telemetry._create(exporter)
        with telemetry._listening(settings.address, port, key):
            path = None
            if settings.targets is not None:
                target = f"{advertised_host(settings.address)}:{telemetry.port}"
                path = write_target(settings.targets, target, {"job": f"frepa_{exporter}", **labels})
            try:
                yield telemetry
            finally:
                if path is not None:
                    with suppress(OSError):  # the disk may be why this ends
                        path.unlink(missing_ok=True)

    def set(self, metric: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        if self._registry is not None:
            self._child(metric, "gauge", labels).set(value)

    def follow(self, metric: str, value: Callable[[], float], /, **labels: str) -> None:
        """Let a gauge be what a function returns whenever it is asked for, by a thread of the server."""
        if self._registry is not None:
            self._child(metric, "gauge", labels).set_function(value)

    def add(self, metric: str, amount: float = 1, /, **labels: str) -> None:
        """Add to a counter; an amount of 0 makes it appear, so that its first increase is seen."""
        if self._registry is not None:
            self._child(metric, "counter", labels).inc(amount)

    def observe(self, metric: str, value: float, /, **labels: str) -> None:
        """Count a value in a histogram."""
        if self._registry is not None:
            self._child(metric, "histogram", labels).observe(value)

    def _create(self, exporter: Exporter) -> None:
        """Begin; counters without labels are there from the start, a gauge once it is known."""
        # imported by who serves alone
        from prometheus_client import CollectorRegistry, disable_created_metrics

        disable_created_metrics()  # type: ignore[no-untyped-call]  # they are in no table
        self._registry = CollectorRegistry()
        self._known = {metric.name: metric for metric in METRICS if metric.exporter == exporter}
        for metric in self._known.values():
            if metric.kind != "gauge" and not metric.labels:
                self._child(metric.name, metric.kind, {})

    def _child(self, name: str, kind: str, labels: dict[str, str]) -> Any:
        """What prometheus_client keeps a series in."""
        place = (name, kind, *labels.items())
        child = self._children.get(place)
        return self._create_child(place, name, kind, labels) if child is None else child

    def _create_child(self, place: tuple[Any, ...], name: str, kind: str, labels: dict[str, str]) -> Any:
        metric = self._known[name]
        assert (metric.kind, metric.labels) == (kind, tuple(labels)), f"not as in the table: {place}"
        with self._lock:
            whole = self._whole.get(name)
            if whole is None:
                whole = self._whole[name] = self._create_metric(metric)
            child = self._children[place] = whole.labels(**labels) if labels else whole
        return child

    def _create_metric(self, metric: Metric) -> Any:
        import prometheus_client as client

        given: dict[str, Any] = {"labelnames": metric.labels, "registry": self._registry}
        if metric.kind == "histogram":
            return client.Histogram(metric.name, metric.text, buckets=metric.buckets, **given)
        return {"gauge": client.Gauge, "counter": client.Counter}[metric.kind](
            metric.name, metric.text, **given
        )

    @contextmanager
    def _listening(self, address: str, port: int, key: str) -> Iterator[None]:
        from prometheus_client import start_http_server

        assert self._registry is not None
        try:
            if not (port == 0 or LOWEST_PORT <= port <= HIGHEST_PORT):
                raise OSError(0, f"there is no such port between {LOWEST_PORT} and {HIGHEST_PORT}")
            server, thread = start_http_server(port, addr=address, registry=self._registry)
        except OSError as error:
            raise EnvironmentFault(
                f"metrics cannot be served: {error.strerror}",
                where=f"{address}:{port}",
                fix=f"set {key}.port to a free one (ranks take those from it on, supervisors those before), "
                "to 0, which takes any, or to null",
            ) from error
        self.port = server.server_port
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
