"""`frepa watch`: a run on the terminal as it goes."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import click

from cluster.options import FOLDER

PAPER_HEIGHT = 80  # where there is no terminal to fill


@click.command()
@click.argument("run", type=FOLDER)
@click.option(
    "--every",
    "seconds",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    help="Seconds between looks.",
)
@click.option("--once", is_flag=True, help="Print how it stands now, and end.")
def watch(run: Path, seconds: float, once: bool) -> None:
    """Show RUN as it goes: progress, losses, speed, ranks, checkpoints, events. Ends with the run, or Ctrl-C.

    It reads the run folder alone, from any machine that sees it, and may be started before the run.
    """
    from rich.console import Console
    from rich.live import Live

    from cluster.interrupts import interrupted_by
    from cluster.live import RunReader, frame

    console, reader = Console(), RunReader(run)
    shot = reader.read()
    if not once and not shot.is_over:
        with (
            interrupted_by(signal.SIGINT, signal.SIGTERM) as stopped,
            Live(console=console, screen=console.is_terminal, auto_refresh=False) as live,
        ):
            while not (shot.is_over or stopped()):
                live.update(frame(shot, console.height), refresh=True)
                time.sleep(seconds)
                shot = reader.read()
    console.print(frame(shot, console.height if console.is_terminal else PAPER_HEIGHT))
