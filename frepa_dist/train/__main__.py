"""What the launcher starts on every rank.

deepspeed --module frepa_dist.train --config FILE [--set dotted.key=value ...]
deepspeed --module frepa_dist.train --resume RUN

On SIGTERM or SIGUSR1 to any rank, all ranks stop after the same step with a checkpoint and exit with code 75.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import sys
import traceback
from pathlib import Path

# before torch is imported: nothing here reads a pickle, and DeepSpeed (weights_only=False) is not to either
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

import torch.distributed as dist

from frepa_dist.config import RunConfig
from frepa_dist.heartbeats import Heartbeat, heartbeat_path
from frepa_dist.journal import Outcome, append_event, write_outcome
from frepa_dist.runs import (
    CONFIG,
    ENVIRONMENT,
    HEARTBEATS,
    LOCK,
    LOGS,
    OUTCOME,
    check_unused,
    load_run_config,
)
from frepa_dist.train.checkpoint.copies import check_place_is_free, find_newest
from frepa_dist.train.engines import World, process_group
from frepa_dist.train.failures import translate
from frepa_dist.train.loop import Trainer
from frepa_dist.train.records import describe_environment
from frepa_dist.train.stop import Control, stop_when_closed
from shards.dataset import load_snapshot
from shards.stores.atomic import replace_text
from shards.stores.store import is_remote, lock_folder
from shards.support.errors import REQUEUE_CODE, ConfigError, DataError, FrepaError
from shards.support.settings import dump_yaml, load_settings
from shards.support.targets import unique_label
from shards.support.telemetry import Telemetry

# with the supervisor gone, this long for the checkpoint before a rank ends itself
ORPHAN_SECONDS = 600


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; the launcher adds --local_rank."""
    parser = argparse.ArgumentParser(prog="frepa_dist.train", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="run config: a file, or the name of a shipped one")
    source.add_argument("--resume", type=Path, help="run folder to go on with")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument(
        "--or-begin", action="store_true", help="with --resume: begin where there is no checkpoint yet"
    )
    parser.add_argument(
        "--supervised", type=Path, metavar="RUN", help="run folder whose supervisor holds this stdin open"
    )
    parser.add_argument("--local_rank", type=int, default=0)
    return parser.parse_args(arguments)


def prepare_run(config: RunConfig, world: World) -> RunConfig:
    """Pin the snapshot and store the resolved config in the run folder; all ranks must call it."""
    data = config.data
    pinned = world.from_main(load_snapshot(data.root, data.snapshot).hash)
    root = data.root if is_remote(data.root) else str(Path(data.root).resolve())
    cache_dir = data.cache_dir and data.cache_dir.resolve()
    data = data.model_copy(update={"snapshot": pinned, "root": root, "cache_dir": cache_dir})
    copy = config.train.checkpoint_copy
    if copy is not None and not is_remote(copy):
        copy = str(Path(copy).resolve())
    metrics = config.train.metrics
    metrics = metrics.model_copy(update={"targets": metrics.targets and metrics.targets.resolve()})
    train = config.train.model_copy(update={"checkpoint_copy": copy, "metrics": metrics})
    config = config.model_copy(update={"data": data, "train": train, "output": config.output.resolve()})
    if world.is_main:
        replace_text(config.output / CONFIG, dump_yaml(config.model_dump(mode="json")))
    return config


def serve_metrics(config: RunConfig, world: World) -> contextlib.AbstractContextManager[Telemetry]:
    """Serve the live metrics of this rank, where the run's settings ask for it."""
    # the launcher tells a rank its node so; alone, there is one
    node = os.environ.get("CROSS_RANK", "0")
    labels = {"run": unique_label(config.output), "rank": str(world.rank), "node": node}
    return Telemetry.serve(config.train.metrics, "train", labels, offset=world.rank, key="train.metrics")


class Start:
    """One start of a run on this rank.

    Attributes:
        run_dir: the run folder once this start owns it, None before.
    """

    def __init__(self, arguments: argparse.Namespace, control: Control) -> None:
        self._arguments, self._control = arguments, control
        self.run_dir: Path | None = None

    def run(self, world: World) -> Outcome:
        """Train, or go on training, to the end, or until asked to stop; all ranks return the same."""
        with contextlib.ExitStack() as stack:
            config, checkpoint = self._open(world, stack)
            telemetry = stack.enter_context(serve_metrics(config, world))
            run_dir = config.output
            trainer = Trainer(config, run_dir, world, telemetry, self._control)
            if checkpoint is not None:
                trainer.resume(checkpoint)
            elif self._arguments.or_begin:
                trainer.begin_again()
            self._control.join(world)
            self._control.heartbeat.beat(trainer.step, "starting")
            if world.is_main:
                append_event(run_dir, "start", step=trainer.step, total_steps=trainer.total_steps)
                replace_text(run_dir / ENVIRONMENT, json.dumps(describe_environment(world), indent=1))
            trainer.run()
            self._control.close()
            outcome: Outcome = "requeue" if trainer.step < trainer.total_steps else "done"
            if world.is_main:
                append_event(run_dir, outcome, step=trainer.step)
                write_outcome(run_dir, outcome, trainer.step)
            dist.barrier()  # nobody leaves, and has the others ended, before it is written
        return outcome

    def _open(self, world: World, stack: contextlib.ExitStack) -> tuple[RunConfig, Path | None]:
        """Take the run folder for this start; rank 0 chooses the checkpoint for all."""
        resumed: Path | None = self._arguments.resume
        if resumed is None:
            config = load_settings(RunConfig, self._arguments.config, self._arguments.overrides)
            check_unused(config.output)
            if world.is_main and config.train.checkpoint_copy is not None:
                check_place_is_free(config.train.checkpoint_copy)
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
        place = config.train.checkpoint_copy
        found = world.wait_for_main(
            lambda: find_newest(config.output, place),
            lambda: self._control.heartbeat.beat(-1, "starting"),
        )
        if found is None and not self._arguments.or_begin:
            raise DataError(
                "no complete checkpoint to resume from",
                where=resumed,
                fix="start a new run in another folder",
            )
        return config, found


def keep_log(run_dir: Path, rank: str) -> None:
    """Write what this rank prints to a file of its own, behind what earlier starts printed."""
    path = run_dir / LOGS / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


def create_control(run_dir: Path | None, rank: str) -> Control:
    """Make what connects this rank with its supervisor, where it has one."""
    if run_dir is None:
        return Control()
    keep_log(run_dir, rank)
    control = Control(Heartbeat(heartbeat_path(run_dir / HEARTBEATS, int(rank))))
    stop_when_closed(0, control, ORPHAN_SECONDS)
    return control


def main(arguments: list[str] | None = None) -> int:
    """Train on this rank.

    Returns:
        0 when all is done, 75 when all ranks stopped as asked. After an error the process is ended at once
        with the error's code: the others may wait for this rank, and the launcher ends them when it is gone.
    """
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    rank = os.environ.get("RANK", "0")
    control = create_control(parsed.supervised, rank)
    # a supervisor asks ranks that hang where they are
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    start = Start(parsed, control)
    try:
        with control.listening():
            with process_group() as world:
                outcome = start.run(world)
            control.heartbeat.end(outcome)
    except Exception as error:
        shown, lost_peer = translate(error)
        code, message = 1, f"{type(error).__name__}: {error}"
        if shown is not None:
            code, message = shown.exit_code, str(shown)
        else:
            traceback.print_exc()
        print(f"frepa: error: rank {rank}: {message}", file=sys.stderr)
        if start.run_dir is not None and not (start.run_dir / OUTCOME).exists():
            # the disk may be what failed
            with contextlib.suppress(FrepaError):
                write_outcome(start.run_dir, "failed", -1, code=code, error=message)
        control.heartbeat.end("failed", code=code, error=message, lost_peer=lost_peer)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)
    return REQUEUE_CODE if outcome == "requeue" else 0


if __name__ == "__main__":
    sys.exit(main())
