"""`frepa monitor ...`: Prometheus, Alertmanager and Grafana for runs."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import click

from cluster.options import FOLDER

PORT = click.IntRange(1, 65535)


@click.group("monitor")
def monitor_group() -> None:
    """Watch runs with Prometheus, Alertmanager and Grafana.

    Runs serve metrics where `train.metrics` asks for it, and say where by files in a folder of targets.
    """


@monitor_group.command("up")
@click.option(
    "--targets",
    type=FOLDER,
    default=Path("runs/targets"),
    show_default=True,
    help="Folder of targets, as in `train.metrics.targets`.",
)
@click.option("--port", type=PORT, default=9090, show_default=True, help="Of Prometheus.")
@click.option("--alertmanager-port", type=PORT, default=9093, show_default=True, help="Of Alertmanager.")
@click.option("--grafana-port", type=PORT, default=3000, show_default=True, help="Of Grafana.")
@click.option(
    "--data",
    type=FOLDER,
    default=Path("runs/monitor"),
    show_default=True,
    help="Folder for configuration, measurements and logs.",
)
def up(targets: Path, port: int, alertmanager_port: int, grafana_port: int, data: Path) -> None:
    """Run Prometheus, and Alertmanager and Grafana where they are installed, until Ctrl-C.

    They listen on 127.0.0.1 alone. What was measured stays in --data, and is there again the next time.
    """
    from cluster.interrupts import interrupted_by
    from cluster.monitoring.render import GRAFANA, Places
    from cluster.monitoring.stack import running

    ports = {"prometheus": port, "alertmanager": alertmanager_port, "grafana": grafana_port}
    with (
        interrupted_by(signal.SIGINT, signal.SIGTERM) as stopped,
        running(data, Places(targets), ports) as stack,
    ):
        for server in stack.servers:
            click.echo(f"{server.name:<13}{server.url}")
        missing = sorted(set(ports) - {server.name for server in stack.servers})
        if missing:
            click.echo(f"not installed: {', '.join(missing)}")
        if "grafana" in missing:
            click.echo(f"dashboards   {data / GRAFANA / 'dashboards'}, to be imported into a Grafana")
        click.echo(f"targets      {targets}, as in `train.metrics.targets`; Ctrl-C ends all")
        while not stopped():
            time.sleep(0.2)
            stack.check()


@monitor_group.command("render")
@click.option("--out", type=FOLDER, required=True, help="Folder to write to.")
@click.option("--targets", type=FOLDER, required=True, help="Folder of targets, where Prometheus sees it.")
@click.option(
    "--prometheus", default="127.0.0.1:9090", show_default=True, help="HOST:PORT, for Grafana's datasource."
)
@click.option(
    "--alertmanager", default="127.0.0.1:9093", show_default=True, help="HOST:PORT, for Prometheus."
)
def render_files(out: Path, targets: Path, prometheus: str, alertmanager: str) -> None:
    """Write the configuration, rules and dashboards for servers that run elsewhere."""
    from cluster.monitoring.render import Places, render

    render(out, Places(targets, prometheus, alertmanager))
    click.echo(f"written to {out}: prometheus.yml, rules/, alertmanager.yml, grafana/")
