"""The command `frepa doctor`."""

from __future__ import annotations

import json
import sys

import click

from cluster.options import set_option
from shards.support.errors import EnvironmentFault

MARKS = {"ok": "ok", "warning": "WARNING", "bad": "BAD"}


@click.command()
@click.option("--config", help="Run config to check too: a file, or the name of a shipped one.")
@set_option
@click.option("--num-ranks", type=click.IntRange(min=1), help="Processes; default: one per GPU, else two.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(config: str | None, overrides: tuple[str, ...], num_ranks: int | None, as_json: bool) -> None:
    """Look for what would stop a run on this machine, before it is started.

    Versions, devices, shared memory, ranks that meet and how fast they add up gradients; with --config also
    batch sizes, shards and their HF tokens, ports, disk for checkpoints, and memory. Ends with code 5 where
    something would stop it.
    """
    from cluster.doctor import examine
    from cluster.launch import default_num_ranks
    from frepa_dist.config import RunConfig
    from shards.support.settings import load_settings

    run = load_settings(RunConfig, config, overrides) if config else None
    found = []
    for finding in examine(run, num_ranks or default_num_ranks()):
        found.append(finding)
        if not as_json:
            mend = f"; to mend it: {finding.fix}" if finding.fix and finding.state != "ok" else ""
            click.echo(f"{MARKS[finding.state]:<8} {finding.check:<14} {finding.says}{mend}")
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in found], indent=1))
    if any(finding.state == "bad" for finding in found):
        sys.exit(EnvironmentFault.exit_code)
