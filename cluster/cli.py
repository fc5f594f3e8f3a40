"""The `frepa` command. Heavy imports happen inside the commands, so that `frepa --help` is instant."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from cluster.datasets_cli import datasets_group
from cluster.doctor_cli import doctor
from cluster.evaluate_analysis_cli import ANALYSIS_COMMANDS
from cluster.evaluate_cli import evaluate_group
from cluster.evaluate_dense_cli import DENSE_COMMANDS
from cluster.evaluate_probe_cli import PROBE_COMMANDS
from cluster.launch_cli import launch_group
from cluster.leakage_cli import evaluate_leakage
from cluster.model_cli import MODEL_COMMANDS
from cluster.monitor_cli import monitor_group
from cluster.options import FOLDER
from cluster.plan_cli import PLAN_COMMANDS
from cluster.shards_cli import shards_group
from cluster.suite_cli import evaluate_suite
from cluster.sweep_cli import sweep
from cluster.train_cli import TRAIN_COMMANDS
from cluster.volume_cli import evaluate_volume
from cluster.watch_cli import watch
from shards.support.errors import ConfigError, DataError, FrepaError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("frepa"), prog_name="frepa")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Frequency-aware self-supervised pretraining of medical image encoders.

    \b
    frepa shards build IMAGES DATASET --modality fundus    images -> shards
    frepa pretrain --config retmae/vit_b --set ...         shards -> encoder
    frepa sweep sweep/lambda_hmi --set ...                 many encoders -> the best
    frepa evaluate probe RUN IMAGES                        how good it is
    frepa export RUN OUT                                   a folder that timm loads
    """


cli.add_command(shards_group)
cli.add_command(datasets_group)
for command in (*PROBE_COMMANDS, evaluate_volume, *DENSE_COMMANDS, *ANALYSIS_COMMANDS):
    evaluate_group.add_command(command)
for command in (evaluate_leakage, evaluate_suite):
    evaluate_group.add_command(command)
cli.add_command(evaluate_group)
cli.add_command(monitor_group)
for command in (*TRAIN_COMMANDS, watch, sweep, doctor, launch_group, *MODEL_COMMANDS, *PLAN_COMMANDS):
    cli.add_command(command)


@cli.command()
@click.argument("run", type=FOLDER)
@click.argument("out_dir", type=FOLDER)
@click.option("--step", type=int, help="Checkpoint to export; default: the newest.")
def export(run: Path, out_dir: Path, step: int | None) -> None:
    """Write the encoder of RUN as a folder that `timm.create_model("local-dir:OUT_DIR")` loads."""
    from frepa_dist.export import export_encoder

    export_encoder(run, out_dir, step)
    click.echo(
        f'exported to {out_dir}; load it with timm.create_model("local-dir:{out_dir}", pretrained=True)'
    )


@cli.command()
@click.argument("run", type=FOLDER)
@click.option("--out", type=FOLDER, help="Page to write; default: RUN/report.html.")
@click.option("--probe", type=FOLDER, help="JSON result of `frepa evaluate probe` to show.")
@click.option("--cka", type=FOLDER, help="JSON result of `frepa evaluate cka` to show.")
@click.option("--note", "notes", multiple=True, help="A sentence for the top of the page; may be repeated.")
@click.option(
    "--every",
    "seconds",
    type=click.FloatRange(min=1),
    help="Write it anew every so many seconds until the run ends, at the lowest priority.",
)
def report(
    run: Path,
    out: Path | None,
    probe: Path | None,
    cka: Path | None,
    notes: tuple[str, ...],
    seconds: float | None,
) -> None:
    """Write a page about RUN: curves, reconstructions with spectra, HF tokens, evaluation, config."""
    if seconds is not None:
        os.nice(19)  # whatever it costs, training comes first
    from frepa_dist.evaluate.report import build_report

    out = out or run / "report.html"
    write = partial(build_report, run, out, probe=read_result(probe), cka=read_result(cka), notes=notes)
    if seconds is None:
        write()
    else:
        keep_writing(run, write, seconds)
    click.echo(f"report  {out}")


def keep_writing(run: Path, write: Callable[..., None], seconds: float) -> None:
    """Write the report of a run that goes on, until it ends or by Ctrl-C."""
    import torch

    from cluster.interrupts import interrupted_by
    from frepa_dist.evaluate.report_live import keep_report

    torch.set_num_threads(1)
    with interrupted_by(signal.SIGINT, signal.SIGTERM) as stopped:
        keep_report(run, lambda refresh: write(refresh_seconds=refresh), seconds, stopped)


def read_result(path: Path | None) -> dict[str, Any] | None:
    """Read a JSON result, where one is named."""
    if path is None:
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"not a result of `frepa evaluate`: {error}", where=path) from error
    return result


def main() -> None:
    """Run the command line: errors are one line and an exit code, tracebacks only with --debug."""
    debug = "--debug" in sys.argv
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(ConfigError.exit_code)
    except FrepaError as error:
        if debug:
            traceback.print_exc()
        print(f"frepa: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
