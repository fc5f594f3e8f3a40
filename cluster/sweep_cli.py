"""`frepa sweep`. Heavy imports happen inside the command."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cluster.options import FOLDER, set_option
from shards.support.errors import ConfigError


@click.command()
@click.argument("config", required=False)
@set_option
@click.option("--resume", "resumed", type=FOLDER, help="Go on with the sweep in this folder.")
@click.option("--or-resume", is_flag=True, help="Go on where `output` holds this sweep already.")
@click.option(
    "--retry-failed", is_flag=True, help="When going on, try trials again that had failed for good."
)
@click.option("--address", help="Of a Ray cluster, such as auto or HOST:6379; default: Ray on this machine.")
def sweep(
    config: str | None,
    overrides: tuple[str, ...],
    resumed: Path | None,
    or_resume: bool,
    retry_failed: bool,
    address: str | None,
) -> None:
    """Train many runs that differ in some settings, and find the best by a probe or by restored detail.

    CONFIG is a sweep config: a file, or the name of a shipped one. Each trial is a supervised run like those
    of `frepa pretrain`; its folder is in OUTPUT/trials. Killed, it goes on where it was:

    \b
    frepa sweep sweep/lambda_hmi --set set.data.root=DATASET --set metric.images=IMAGES
    frepa sweep --resume OUTPUT
    """
    if (config is None) == (resumed is None):
        raise ConfigError("name a sweep config, or a folder to go on with", fix="CONFIG or --resume DIR")
    if resumed is not None and overrides:
        raise ConfigError("--set has no meaning with --resume: a sweep goes on as it was", where="--set")
    from cluster.sweep.config import read_sweep
    from cluster.sweep.driver import run_sweep, same_sweep
    from cluster.sweep.layout import load_sweep

    if resumed is not None:
        found, goes_on = load_sweep(resumed).model_copy(update={"output": resumed}), True
    else:
        assert config is not None
        found = read_sweep(config, overrides)
        goes_on = or_resume and same_sweep(found)
    sys.exit(run_sweep(found, address=address, resume=goes_on, retry_failed=retry_failed))
