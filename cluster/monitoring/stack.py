"""A Prometheus, an Alertmanager and a Grafana on this machine, from start to end."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from cluster.monitoring.render import ALERTMANAGER, GRAFANA, PROMETHEUS, Places, render
from shards.stores.atomic import writing_to
from shards.support.errors import EnvironmentFault

HOST = "127.0.0.1"
# Debian calls Alertmanager otherwise than its makers do
PROGRAMS = {
    "prometheus": ("prometheus",),
    "alertmanager": ("prometheus-alertmanager", "alertmanager"),
    "grafana": ("grafana", "grafana-server"),
}
START_SECONDS, STOP_SECONDS, POLL_SECONDS = 30.0, 10.0, 0.1


@dataclass(frozen=True)
class Server:
    """A program to be started.

    Attributes:
        name: for people.
        port: where it listens on this machine.
        ready: path that answers 200 once it is ready.
        command, environment: how it is started.
    """

    name: str
    port: int
    ready: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"http://{HOST}:{self.port}"


def find_programs(which: Callable[[str], str | None] = shutil.which) -> dict[str, str]:
    """Which of the programs are installed, and where.

    Raises:
        EnvironmentFault: there is no Prometheus.
    """
    found = {
        name: path
        for name, names in PROGRAMS.items()
        if (path := next(filter(None, map(which, names)), None)) is not None
    }
    if "prometheus" not in found:
        raise EnvironmentFault(
            "no Prometheus is installed, or it is not in PATH",
            fix="`apt-get install prometheus prometheus-alertmanager`, or the releases of prometheus.io; "
            "`frepa monitor render` writes the configuration for one that runs elsewhere",
        )
    return found


def list_servers(programs: Mapping[str, str], data: Path, ports: Mapping[str, int]) -> list[Server]:
    """How each program that is installed is started; the configuration is in `data`."""
    data = data.resolve()

    def listen(name: str) -> str:
        return f"--web.listen-address={HOST}:{ports[name]}"

    servers = [
        Server(
            "prometheus",
            ports["prometheus"],
            "/-/ready",
            [
                programs["prometheus"],
                f"--config.file={data / PROMETHEUS}",
                f"--storage.tsdb.path={data / 'prometheus'}",
                listen("prometheus"),
            ],
        )
    ]
    if "alertmanager" in programs:
        command = [
            programs["alertmanager"],
            f"--config.file={data / ALERTMANAGER}",
            f"--storage.path={data / 'alertmanager'}",
            listen("alertmanager"),
            "--cluster.listen-address=",  # it stands alone
        ]
        servers.append(Server("alertmanager", ports["alertmanager"], "/-/ready", command))
    if "grafana" in programs:
        program = programs["grafana"]
        command = [program, "server"] if Path(program).name == "grafana" else [program]
        settings = {
            "GF_PATHS_DATA": str(data / GRAFANA / "data"),
            "GF_PATHS_PROVISIONING": str(data / GRAFANA / "provisioning"),
            "GF_SERVER_HTTP_ADDR": HOST,
            "GF_SERVER_HTTP_PORT": str(ports["grafana"]),
            "GF_AUTH_ANONYMOUS_ENABLED": "true",  # nobody else reaches this machine's loopback
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        }
        homes = [
            path for path in (Path("/usr/share/grafana"), Path(program).resolve().parents[1]) if path.is_dir()
        ]
        command.append(f"--homepath={homes[0]}")
        servers.append(Server("grafana", ports["grafana"], "/api/health", command, settings))
    return servers


def check_free(port: int, name: str) -> None:
    """Make sure that nobody listens on a port.

    Raises:
        EnvironmentFault: somebody does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            option = "--port" if name == "prometheus" else f"--{name}-port"
            raise EnvironmentFault(
                f"{name} cannot listen: {error.strerror}", where=f"{HOST}:{port}", fix=f"another {option}"
            ) from error


class Stack:
    """Servers that run together.

    Args:
        servers: what to start.
        logs: folder of what they print, NAME.log.
    """

    def __init__(self, servers: Sequence[Server], logs: Path) -> None:
        self.servers, self._logs = list(servers), logs
        self._processes: list[subprocess.Popen[bytes]] = []
        self._files: list[IO[bytes]] = []

    def start(self) -> None:
        """Start all of them and wait until they answer.

        Raises:
            EnvironmentFault: one ended or does not answer; its last words are in the message.
        """
        for server in self.servers:
            check_free(server.port, server.name)
        with writing_to(self._logs):
            self._logs.mkdir(parents=True, exist_ok=True)
            for server in self.servers:
                log = (self._logs / f"{server.name}.log").open("wb")
                self._files.append(log)
                # in a session of its own: Ctrl-C is for us, and we end all of them
                process = subprocess.Popen(
                    server.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **server.environment},
                    start_new_session=True,
                )
                self._processes.append(process)
        deadline = time.monotonic() + START_SECONDS
        for server in self.servers:
            while not answers(server.url + server.ready):
                self.check()
                if time.monotonic() > deadline:
                    raise self._fault(server, f"does not answer within {START_SECONDS:.0f} s")
                time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Make sure that all of them still run.

        Raises:
            EnvironmentFault: one has ended.
        """
        for server, process in zip(self.servers, self._processes, strict=True):
            if process.poll() is not None:
                raise self._fault(server, f"has ended with code {process.returncode}")

    def _fault(self, server: Server, what: str) -> EnvironmentFault:
        log = self._logs / f"{server.name}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return EnvironmentFault(f"{server.name} {what}: {lines[-1] if lines else 'no word'}", where=log)

    def stop(self) -> None:
        """End all of them, by force where they do not listen."""
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for file in self._files:
            file.close()
        self._processes, self._files = [], []


def answers(url: str) -> bool:
    """Whether a page is there."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310 (our own http address)
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError, http.client.HTTPException):
        return False


@contextlib.contextmanager
def running(data: Path, places: Places, ports: Mapping[str, int], scale: float = 1.0) -> Iterator[Stack]:
    """Write the configuration to `data`, and run what is installed for the length of the block.

    Raises:
        EnvironmentFault: there is no Prometheus, a port is taken, or a server does not start.
    """
    servers = list_servers(find_programs(), data, ports)
    names = {server.name for server in servers}
    ours = Places(
        places.targets,
        f"{HOST}:{ports['prometheus']}",
        f"{HOST}:{ports['alertmanager']}" if "alertmanager" in names else None,
        places.webhook,
    )
    with writing_to(places.targets):
        places.targets.mkdir(parents=True, exist_ok=True)
    render(data, ours, scale)
    stack = Stack(servers, data / "logs")
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()
