"""What the launcher starts on every rank.

deepspeed --module frepa_dist.train --config FILE [--set dotted.key=value ...]
deepspeed --module frepa_dist.train --resume RUN
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from pathlib import Path

# before torch is imported: DeepSpeed reads checkpoints with weights_only=False unless this is set
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

import torch.distributed as dist

from frepa_dist.config import RunConfig
from frepa_dist.runs import CONFIG, ENVIRONMENT, OUTCOME, check_unused, load_run_config
from frepa_dist.train.checkpoint import allow_checkpoint_classes, newest_intact
from frepa_dist.train.engines import World, process_group
from frepa_dist.train.loop import Trainer
from frepa_dist.train.records import append_event, describe_environment, write_outcome
from shards.atomic import replace_text, writing_to
from shards.schema import load_snapshot
from shards.support.errors import ConfigError, FrepaError
from shards.support.settings import dump_yaml, load_settings
from shards.support.telemetry import Telemetry


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; the launcher adds --local_rank."""
    parser = argparse.ArgumentParser(prog="frepa_dist.train", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="run config: a file, or the name of a shipped one")
    source.add_argument("--resume", type=Path, help="run folder to go on with")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--local_rank", type=int, default=0)
    return parser.parse_args(arguments)


def prepare_run(config: RunConfig, world: World) -> RunConfig:
    """Pin the snapshot, make the run folder, and store the resolved config.

    Raises:
        ConfigError: the folder holds a run already.
        EnvironmentFault: the folder cannot be written.
    """
    run_dir = config.output
    pinned = load_snapshot(config.data.root, config.data.snapshot).hash
    data = config.data.model_copy(update={"snapshot": pinned, "root": config.data.root.resolve()})
    config = config.model_copy(update={"data": data, "output": run_dir.resolve()})
    check_unused(run_dir)
    dist.barrier()  # everyone has looked before rank 0 writes
    if world.is_main:
        with writing_to(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        replace_text(run_dir / CONFIG, dump_yaml(config.model_dump(mode="json")))
    dist.barrier()
    return config


def train(arguments: argparse.Namespace, world: World) -> Path:
    """Run or resume on this rank; returns the run folder."""
    if arguments.resume is not None:
        if arguments.overrides:
            raise ConfigError("--set has no meaning with --resume: a run goes on as it was", where="--set")
        run_dir: Path = arguments.resume
        config = load_run_config(run_dir)
        checkpoint = newest_intact(run_dir)
    else:
        config = load_settings(RunConfig, arguments.config, arguments.overrides)
        run_dir, checkpoint = config.output, None
        config = prepare_run(config, world)
    (run_dir / OUTCOME).unlink(missing_ok=True)
    port = config.train.metrics_port
    with Telemetry.serve(port + world.rank if port is not None else None) as telemetry:
        trainer = Trainer(config, run_dir, world, telemetry)
        if checkpoint is not None:
            trainer.resume(checkpoint)
        if world.is_main:
            append_event(run_dir, "start", step=trainer.step, total_steps=trainer.total_steps)
            replace_text(run_dir / ENVIRONMENT, json.dumps(describe_environment(world), indent=1))
        trainer.run()
        if world.is_main:
            write_outcome(run_dir, "done", trainer.step)
            append_event(run_dir, "done", step=trainer.step)
    return run_dir


def main(arguments: list[str] | None = None) -> int:
    """Train on this rank; the exit code is that of the error, 0 when all went well."""
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    allow_checkpoint_classes()
    try:
        with process_group() as world:
            train(parsed, world)
    except FrepaError as error:
        return report_failure(parsed, error.exit_code, str(error))
    except Exception as error:
        traceback.print_exc()
        return report_failure(parsed, 1, f"{type(error).__name__}: {error}")
    return 0


def report_failure(arguments: argparse.Namespace, code: int, message: str) -> int:
    """Say what went wrong, once per rank, and leave it for the one who started us."""
    print(f"frepa: error: rank {os.environ.get('RANK', '0')}: {message}", file=sys.stderr, flush=True)
    run_dir = arguments.resume or run_folder_of(arguments)
    if run_dir is not None and (run_dir / CONFIG).is_file() and not (run_dir / OUTCOME).exists():
        write_outcome(run_dir, "failed", -1, code=code, error=message)
    return code


def run_folder_of(arguments: argparse.Namespace) -> Path | None:
    """The run folder a config names; None where the config itself is wrong."""
    try:
        return load_settings(RunConfig, arguments.config, arguments.overrides).output
    except FrepaError:
        return None


if __name__ == "__main__":
    sys.exit(main())
