"""What the launcher starts on every rank.

deepspeed --module frepa_dist.train --config FILE [--set dotted.key=value ...]
deepspeed --module frepa_dist.train --resume RUN
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from pathlib import Path

# before torch is imported: nothing here reads a pickle, and DeepSpeed (weights_only=False) is not to either
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

import torch.distributed as dist

from frepa_dist.config import RunConfig
from frepa_dist.runs import CONFIG, ENVIRONMENT, LOCK, OUTCOME, check_unused, load_run_config
from frepa_dist.train.checkpoint import newest_intact
from frepa_dist.train.engines import World, process_group
from frepa_dist.train.loop import Trainer
from frepa_dist.train.records import append_event, describe_environment, write_outcome
from shards.dataset import load_snapshot
from shards.stores.atomic import replace_text
from shards.stores.store import is_remote, lock_folder
from shards.support.errors import ConfigError, DataError, FrepaError
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
    """Pin the snapshot and store the resolved config in the run folder; all ranks must call it."""
    data = config.data
    pinned = world.from_main(load_snapshot(data.root, data.snapshot).hash)
    root = data.root if is_remote(data.root) else str(Path(data.root).resolve())
    cache_dir = data.cache_dir and data.cache_dir.resolve()
    data = data.model_copy(update={"snapshot": pinned, "root": root, "cache_dir": cache_dir})
    config = config.model_copy(update={"data": data, "output": config.output.resolve()})
    if world.is_main:
        replace_text(config.output / CONFIG, dump_yaml(config.model_dump(mode="json")))
    return config


class Start:
    """One start of a run on this rank.

    Attributes:
        run_dir: the run folder once this start owns it, None before.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self.run_dir: Path | None = None

    def run(self, world: World) -> None:
        """Train, or go on training, to the end."""
        with contextlib.ExitStack() as stack:
            config, checkpoint = self._open(world, stack)
            port = config.train.metrics_port
            telemetry = stack.enter_context(Telemetry.serve(None if port is None else port + world.rank))
            run_dir = config.output
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

    def _open(self, world: World, stack: contextlib.ExitStack) -> tuple[RunConfig, Path | None]:
        """Take the run folder for this start; rank 0 chooses the checkpoint for all."""
        resumed: Path | None = self._arguments.resume
        if resumed is None:
            config = load_settings(RunConfig, self._arguments.config, self._arguments.overrides)
            check_unused(config.output)
        elif self._arguments.overrides:
            raise ConfigError("--set has no meaning with --resume: a run goes on as it was", where="--set")
        else:
            config = load_run_config(resumed)
            # the folder may have been moved since
            config = config.model_copy(update={"output": resumed.resolve()})
        dist.barrier()  # everyone has looked before rank 0 writes
        if world.is_main:
            stack.enter_context(lock_folder(config.output, name=LOCK))
            (config.output / OUTCOME).unlink(missing_ok=True)
        dist.barrier()
        self.run_dir = config.output
        if resumed is None:
            return prepare_run(config, world), None
        found = world.from_main(newest_intact(config.output) if world.is_main else None)
        if found is None:
            raise DataError(
                "no complete checkpoint to resume from",
                where=resumed,
                fix="start a new run in another folder",
            )
        return config, found


def main(arguments: list[str] | None = None) -> int:
    """Train on this rank.

    Returns:
        0 when all went well. After an error the process is ended at once with the error's code: the others
        may wait for this rank, and the launcher ends them when it is gone.
    """
    start = Start(parse_arguments(sys.argv[1:] if arguments is None else arguments))
    try:
        with process_group() as world:
            start.run(world)
    except Exception as error:
        code, message = 1, f"{type(error).__name__}: {error}"
        if isinstance(error, FrepaError):
            code, message = error.exit_code, str(error)
        else:
            traceback.print_exc()
        print(f"frepa: error: rank {os.environ.get('RANK', '0')}: {message}", file=sys.stderr)
        if start.run_dir is not None and not (start.run_dir / OUTCOME).exists():
            # the disk may be what failed
            with contextlib.suppress(FrepaError):
                write_outcome(start.run_dir, "failed", -1, code=code, error=message)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
