"""`frepa pretrain`, `frepa resume` and `frepa status`. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.options import FOLDER, F, set_option
from shards.support.errors import ConfigError

if TYPE_CHECKING:
    from cluster.nodes import Nodes
    from cluster.verdict import Patience
    from frepa_dist.config import RunConfig

NODE_KEYS = ("num_ranks", "num_nodes", "node_rank", "master_addr", "master_port", "hostfile")


def nodes_options(function: F) -> F:
    """Add the options of commands that start training."""
    for option in reversed(
        (
            click.option(
                "--num-ranks",
                type=click.IntRange(min=1),
                help="Processes on this node; default: one per GPU, else two.",
            ),
            click.option(
                "--num-nodes", type=click.IntRange(min=1), help="Nodes; default: as srun says, or 1."
            ),
            click.option("--node-rank", type=click.IntRange(min=0), help="Which of them this is."),
            click.option("--master-addr", help="Address of node 0."),
            click.option(
                "--master-port",
                type=click.IntRange(1, 65535),
                help="Port where ranks meet; default: a free one, on several nodes 29500.",
            ),
            click.option("--hostfile", type=FOLDER, help="Nodes as lines NAME slots=N, as for deepspeed."),
            click.option(
                "--max-restarts",
                type=click.IntRange(min=0),
                default=5,
                show_default=True,
                help="Restarts in a row without a new checkpoint between them.",
            ),
            click.option(
                "--hang-seconds",
                type=click.FloatRange(min=1),
                default=600,
                show_default=True,
                help="A rank that shows no progress for so long counts as dead.",
            ),
            click.option(
                "--stop-seconds",
                type=click.FloatRange(min=1),
                default=240,
                show_default=True,
                help="How long ranks may take to stop when asked, with a checkpoint.",
            ),
        )
    ):
        function = option(function)
    return function


def read_nodes(options: dict[str, Any], default_ranks: int | None = None) -> Nodes:
    """Find out from the options and the environment where the ranks are."""
    from cluster.launch import default_num_ranks
    from cluster.nodes import NodeOptions, find_nodes

    named = NodeOptions(**{key: options[key] for key in NODE_KEYS})
    default = default_ranks or options["num_ranks"] or default_num_ranks()
    return find_nodes(named, os.environ, default)


def read_patience(options: dict[str, Any]) -> Patience:
    """When to restart, as the options say."""
    from cluster.verdict import Patience

    return Patience(**{key: options[key] for key in ("max_restarts", "hang_seconds", "stop_seconds")})


@click.command()
@click.option("--config", required=True, help="Run config: a file, or the name of a shipped one.")
@set_option
@click.option(
    "--or-resume", is_flag=True, help="Go on where `output` holds this run already (requeued jobs)."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Build everything, take two steps, keep nothing, and say how long it takes.",
)
@nodes_options
def pretrain(config: str, overrides: tuple[str, ...], or_resume: bool, dry_run: bool, **options: Any) -> None:
    """Pretrain, and start again after faults, from the last checkpoint.

    SIGTERM, SIGUSR1 and Ctrl-C stop it with a checkpoint and exit code 75. On several nodes, start the same
    command once on each:

    \b
    srun --ntasks-per-node=1 frepa pretrain --or-resume --config FILE ...
    frepa pretrain --num-nodes 4 --node-rank R --master-addr HOST0 ...
    frepa pretrain --hostfile HOSTS --node-rank R ...

    `deepspeed --hostfile HOSTS --module frepa_dist.train --config FILE` trains too, without supervision.
    """
    from cluster.supervise import supervise
    from cluster.supervisor_metrics import Exports
    from frepa_dist.config import RunConfig
    from frepa_dist.runs import CONFIG, check_unused, load_run_config
    from frepa_dist.train.checkpoint.copies import check_place_is_free
    from shards.read.order import check_batch_sizes
    from shards.read.views import open_snapshot
    from shards.support.settings import load_settings

    # what can be found wrong in a second is said before the ranks start
    run = load_settings(RunConfig, config, overrides)
    nodes = read_nodes(options)
    check_batch_sizes(run.train.global_batch_size, nodes.world_size, run.train.micro_batch_size)
    if dry_run:
        from cluster.rehearsal import rehearse

        sys.exit(rehearse(config, overrides, run, nodes))
    arguments = ["--config", config, *(part for item in overrides for part in ("--set", item))]
    place = run.train.checkpoint_copy
    if or_resume and place is not None and not (run.output / CONFIG).is_file():
        restore_config(run, place)
    if or_resume and (run.output / CONFIG).is_file():
        check_same_run(run, load_run_config(run.output))
        arguments = ["--resume", str(run.output), "--or-begin"]
    elif nodes.is_main:  # node 0 may have begun to write before another one looks
        check_unused(run.output)
        if place is not None:
            check_place_is_free(place)
    open_snapshot(run.stream_config())
    sys.exit(supervise(arguments, run.output, nodes, read_patience(options), exports=Exports.of(run)))


def restore_config(given: RunConfig, place: str) -> None:
    """Begin to bring a run folder back from the copies of its checkpoints, where there are some."""
    from frepa_dist.runs import CONFIG, load_run_config
    from frepa_dist.train.checkpoint.copies import fetch_config
    from shards.stores.atomic import replace_text, writing_to

    content = fetch_config(place)
    if content is None:
        return
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / CONFIG).write_bytes(content)
        check_same_run(given, load_run_config(Path(name)), place)
    with writing_to(given.output):  # every node may write it: the same bytes, at once
        given.output.mkdir(parents=True, exist_ok=True)
    replace_text(given.output / CONFIG, content.decode())


def check_same_run(given: RunConfig, stored: RunConfig, where: Path | str | None = None) -> None:
    """Make sure that a run is the one that a config describes.

    Args:
        given: of the command line.
        stored: the run's own.
        where: where that lies, for the error; None: in `output`.

    Raises:
        ConfigError: it differs in something else than what a run resolves for itself.
    """
    from shards.stores.store import is_remote

    data = given.data
    resolved = {
        "root": data.root if is_remote(data.root) else str(Path(data.root).resolve()),
        "cache_dir": data.cache_dir and data.cache_dir.resolve(),
        "snapshot": data.snapshot or stored.data.snapshot,
    }
    data = data.model_copy(update=resolved)
    wanted = given.model_copy(update={"data": data, "output": stored.output})
    ours, theirs = wanted.model_dump(mode="json"), stored.model_dump(mode="json")
    copy = given.train.checkpoint_copy
    if copy is not None and not is_remote(copy):
        ours["train"]["checkpoint_copy"] = str(Path(copy).resolve())
    differing = _differing(ours, theirs)
    if differing:
        raise ConfigError(
            f"this place holds another run: {', '.join(differing)} differ",
            where=where or given.output,
            fix=f"`frepa resume {given.output}` to go on as it was, or another place",
        )


def _differing(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    found = []
    for key in sorted({*one, *other}):
        ours, theirs = one.get(key), other.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            found += _differing(ours, theirs, f"{prefix}{key}.")
        elif ours != theirs:
            found.append(prefix + key)
    return found


@click.command()
@click.argument("run", type=FOLDER)
@nodes_options
def resume(run: Path, **options: Any) -> None:
    """Go on with the run at RUN from its newest whole checkpoint, or from the beginning before the first.

    It goes on as RUN/config.yaml says: what decides no number may be changed there, such as
    `train.micro_batch_size`. Takes as many ranks as the run had, unless told otherwise or there are fewer
    GPUs: the global batch and the order of samples stay. See `frepa pretrain` for stopping, restarts and
    several nodes.
    """
    import torch

    from cluster.supervise import supervise
    from cluster.supervisor_metrics import Exports
    from frepa_dist.runs import ENVIRONMENT, load_run_config

    exports = Exports.of(load_run_config(run))
    had = None
    if options["num_ranks"] is None and (run / ENVIRONMENT).is_file():
        had = json.loads((run / ENVIRONMENT).read_text(encoding="utf-8"))["world_size"]
        had = min(had, torch.cuda.device_count() or had)
    nodes = read_nodes(options, had)
    if had is not None and len(nodes.slots) > 1 and nodes.world_size != had:
        nodes = read_nodes(options)  # it had `had` ranks over all nodes
    arguments = ["--resume", str(run), "--or-begin"]
    sys.exit(supervise(arguments, run, nodes, read_patience(options), exports=exports))


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(run: Path, as_json: bool) -> None:
    """Say how far RUN is, whether it runs, and what went wrong."""
    from frepa_dist.status import describe_run

    found = describe_run(run)
    click.echo(json.dumps(asdict(found)) if as_json else found.describe())


TRAIN_COMMANDS = (pretrain, resume, status)
