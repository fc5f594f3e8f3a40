"""`frepa plan` and `frepa simulate`. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from cluster.options import FOLDER, F, set_option

if TYPE_CHECKING:
    from cluster.planning.assumptions import Assumption, Assumptions
    from frepa_dist.config import RunConfig


def machine_options(function: F) -> F:
    """Add what plan and simulation share: machines and assumptions."""
    for option in reversed(
        (
            click.option(
                "--gpu",
                default="h100",
                show_default=True,
                help="Kind of GPU (`--gpu list` shows them), or custom.",
            ),
            click.option("--gpus-per-node", type=click.IntRange(min=1), default=8, show_default=True),
            click.option(
                "--mfu", type=click.FloatRange(0, 1, min_open=True), help="The same as --assume mfu=NUMBER."
            ),
            click.option(
                "--calibration", type=FOLDER, help="JSON of tools/bench_train.py; MFU is taken from it."
            ),
            click.option(
                "--assume",
                "assumed",
                multiple=True,
                metavar="KEY=VALUE",
                help="Replace an assumption; all are listed in the output. May be repeated.",
            ),
            set_option,
            click.option("--offline", is_flag=True, help="Do not look for the dataset: assume one."),
            click.option("--json", "as_json", is_flag=True, help="Print JSON."),
            click.option("--out", type=FOLDER, help="HTML page to write."),
        )
    ):
        function = option(function)
    return function


@click.command()
@click.argument("config")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True)
@machine_options
@click.option(
    "--deadline-hours", type=click.FloatRange(0, min_open=True), help="Look for the cheapest layout in time."
)
@click.option("--price-gpu-hour", type=click.FloatRange(0), help="Of a GPU for an hour.")
@click.option("--price-gb-month", type=click.FloatRange(0), help="Of storing 10^9 bytes for a month.")
@click.option("--price-1000-gets", type=click.FloatRange(0), help="Of 1,000 GET requests.")
@click.option("--price-gb-transfer", type=click.FloatRange(0), help="Of fetching 10^9 bytes.")
def plan(config: str, nodes: int, gpus_per_node: int, deadline_hours: float | None, **options: Any) -> None:
    """Say what a run of CONFIG takes, before it is paid for.

    Memory by ZeRO stage and micro-batch, time, data, requests, checkpoints, and money at the prices given.
    Nothing is run: all of it is computed, from the config and assumptions that the output lists.

    \b
    frepa plan frepa/vit_b_17m --nodes 4 --gpu h100
    frepa plan frepa/vit_b_17m --nodes 16 --deadline-hours 12 --price-gpu-hour 2.5 --out plan.html
    frepa plan retmae/vit_b --gpu custom --assume gpu.memory_gb=96 --assume gpu.tflops.bf16=500 ...
    """
    from cluster.planning.plan import make_plan, plan_as_json
    from cluster.planning.prices import Prices
    from cluster.planning.text import plan_text
    from shards.support.progress import Progress

    prices = Prices(
        options["price_gpu_hour"],
        options["price_gb_month"],
        options["price_1000_gets"],
        options["price_gb_transfer"],
    )
    if options["gpu"] == "list":
        show_gpus()
        return
    run, assumptions, listed = read_inputs(config, options)
    with Progress(4, "plan", unit="part") as progress:
        made = make_plan(
            config,
            run,
            nodes,
            gpus_per_node,
            assumptions,
            listed,
            prices,
            deadline_hours,
            look=not options["offline"],
            progress=lambda note: progress.update(note=note),
        )
    click.echo(json.dumps(plan_as_json(made), indent=1) if options["as_json"] else plan_text(made))
    if options["out"] is not None:
        from cluster.planning.page import write_plan_page

        write_plan_page(made, options["out"])
        click.echo(f"page  {options['out']}", err=options["as_json"])


@click.command()
@click.argument("config")
@click.option(
    "--gpus", "gpu_counts", default="8,16,32,64,128,256,512,1024", show_default=True, help="How many."
)
@machine_options
@click.option(
    "--days", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True, help="Of training."
)
@click.option("--seeds", type=click.IntRange(min=2), default=20, show_default=True, help="Jobs of each kind.")
def simulate(
    config: str, gpu_counts: str, gpus_per_node: int, days: float, seeds: int, **options: Any
) -> None:
    """Simulate training CONFIG through failures, restarts, stragglers and cold caches.

    Goodput by number of GPUs and by checkpoint interval, beside the formulas of Young and Daly. All of it is
    simulated, from the config and assumptions that the output lists.

    \b
    frepa simulate frepa/vit_b_17m --gpu h100 --out simulation.html
    frepa simulate frepa/vit_b_17m --gpus 64,512 --assume gpu_mtbf_hours=10000 --assume s3_gbit_per_second=400
    """
    from cluster.planning.simulation import run_simulation, simulation_as_json
    from cluster.planning.simulation_page import simulation_text, write_simulation_page
    from shards.support.progress import Progress

    if options["gpu"] == "list":
        show_gpus()
        return
    counts = read_counts(gpu_counts)
    run, assumptions, listed = read_inputs(config, options)
    num_parts = len(counts) + (3 if assumptions.gpu_mtbf_hours is not None else 1)
    with Progress(num_parts, "simulate", unit="part") as progress:
        made = run_simulation(
            config,
            run,
            counts,
            gpus_per_node,
            assumptions,
            listed,
            days,
            seeds,
            look=not options["offline"],
            progress=lambda note: progress.update(note=note),
        )
    as_json = options["as_json"]
    click.echo(json.dumps(simulation_as_json(made), indent=1) if as_json else simulation_text(made))
    if options["out"] is not None:
        write_simulation_page(made, options["out"])
        click.echo(f"page  {options['out']}", err=as_json)


def read_counts(text: str) -> list[int]:
    """Numbers of GPUs, rising.

    Raises:
        ConfigError: that is no list of them.
    """
    from shards.support.errors import ConfigError

    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise ConfigError(f"no numbers of GPUs: {text}", where="--gpus", allowed="such as 8,64,512")
    return counts


def read_inputs(config: str, options: dict[str, Any]) -> tuple[RunConfig, Assumptions, list[Assumption]]:
    """The run's config, what is assumed, and the same as a list.

    Raises:
        ConfigError, DataError: an option or a file is wrong.
    """
    from cluster.planning.assumptions import Measured, list_assumptions, read_assumptions
    from cluster.planning.calibration import MFU, read_calibration
    from frepa_dist.config import RunConfig
    from shards.support.errors import ConfigError
    from shards.support.settings import apply_overrides, merge, read_config, validate

    places = {"output": "unused", "data": {"root": "unused"}}
    run = validate(
        RunConfig, merge(places, apply_overrides(read_config(config), options["overrides"])), where=config
    )
    given = list(options["assumed"])
    if options["mfu"] is not None:
        given.append(f"{MFU}={options['mfu']}")
    measured: Measured = {}
    if options["calibration"] is not None:
        if any(item.startswith(f"{MFU}=") for item in given):
            raise ConfigError(
                "MFU is given twice", where="--calibration", fix="leave one of --calibration and --mfu"
            )
        peak = read_assumptions(options["gpu"], given, {}).gpu.peak_flops(run.train.precision)
        measured = read_calibration(options["calibration"], run, options["gpu"], peak)
    assumptions = read_assumptions(options["gpu"], given, measured)
    return run, assumptions, list_assumptions(assumptions, given, measured)


def show_gpus() -> None:
    """Print the known kinds of GPUs with their sources."""
    from cluster.planning.gpus import Gpu, read_gpus
    from cluster.planning.text import table

    rows = [["kind", "GB", "bf16 TFLOP/s", "fp32", "GB/s in a node", "Gbit/s to others"]]
    sources = []
    for name, fields in read_gpus().items():
        gpu = Gpu.model_validate(fields)
        numbers = (gpu.memory_gb, gpu.tflops.get("bf16"), gpu.tflops.get("fp32"), gpu.link_gb_per_second)
        cells = [
            f"{number:g}" if number is not None else "-" for number in (*numbers, gpu.network_gbit_per_second)
        ]
        rows.append([name, *cells])
        sources.append(f"  {name}: {gpu.source}")
    click.echo("\n".join([*table(rows), *sources]))


PLAN_COMMANDS = (plan, simulate)
