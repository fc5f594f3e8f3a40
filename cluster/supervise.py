"""Look after a run on this node: start the ranks, watch them, start them again, tell why.

The launcher starts the ranks; this listens to their heartbeats (RUN/heartbeats), keeps what each prints
(RUN/logs), and starts all of them again when one is gone or hangs. SIGTERM and SIGUSR1 are passed on to the
ranks, which stop after a step with a checkpoint; the exit code is then 75. On several nodes each has a
supervisor of its own: ranks that lose a peer end, so all of them start again and meet.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from cluster.launch import Launch, free_shared_memory, launch_command, rank_environment, with_port
from cluster.nodes import Nodes
from cluster.supervisor_metrics import Exports, SupervisorMetrics, serve_supervisor
from cluster.verdict import LASTING_CODES, Budget, Fault, Patience
from cluster.watch import ASKING, Ending, Requests, Watch
from frepa_dist.heartbeats import blank, heartbeat_path
from frepa_dist.journal import append_event, read_outcome, write_outcome
from frepa_dist.runs import CONFIG, HEARTBEATS, LOGS, OUTCOME, list_checkpoints
from shards.stores.atomic import writing_to
from shards.stores.store import lock_folder
from shards.support.errors import REQUEUE_CODE, EnvironmentFault, FrepaError
from shards.support.signals import hearing
from shards.support.telemetry import MetricsConfig

Command = Callable[[Sequence[str], Nodes, str], list[str]]


def supervise(
    arguments: Sequence[str],
    run_dir: Path,
    nodes: Nodes,
    patience: Patience | None = None,
    command: Command = launch_command,
    exports: Exports | None = None,
) -> int:
    """Train on this node, through restarts; return 0 when done, 75 when stopped as asked, or an error's code.

    Must be called by the main thread: it takes SIGTERM, SIGUSR1 and SIGINT. A second SIGINT ends all at once.

    Args:
        arguments: of `frepa_dist.train`, for the first start; later ones resume.
        run_dir: the run folder, shared by all nodes.
        nodes: where the ranks are.
        patience: when to restart, and when to give up.
        command: makes the launcher's command line.
        exports: live metrics that are served meanwhile; None: none.

    Raises:
        EnvironmentFault: the run has a supervisor on this node already, or a port is taken.
    """
    with (
        lock_folder(run_dir, name=f".supervisor-{nodes.node_rank}.lock"),
        serve_supervisor(exports or Exports(MetricsConfig()), run_dir, nodes) as metrics,
    ):
        return _Supervisor(arguments, run_dir, nodes, patience or Patience(), command, metrics).run()


class _Supervisor:
    """See `supervise`."""

    def __init__(
        self,
        arguments: Sequence[str],
        run_dir: Path,
        nodes: Nodes,
        patience: Patience,
        command: Command,
        metrics: SupervisorMetrics,
    ) -> None:
        self._arguments, self._run_dir, self._nodes = list(arguments), run_dir, nodes
        self._metrics = metrics
        self._patience, self._command = patience, command
        self._requests = Requests()
        self._starts = 0
        self._known_step = -1
        self._first_outcome = self._outcome_stamp()

    def run(self) -> int:
        """Start, watch and restart to the end."""
        budget = Budget(self._patience, self._checkpoint_step())
        if self._nodes.is_main and len(self._nodes.slots) > 1:
            (self._run_dir / OUTCOME).unlink(missing_ok=True)  # it would tell the others of an earlier job
        with hearing(ASKING, self._hear):
            while True:
                found = self._try_start()
                if found == "done":
                    return 0
                if found == "requeue":
                    if self._requests.at_once:
                        self._end("requeue", self._checkpoint_step(), REQUEUE_CODE)
                    self._say_stopped()
                    return REQUEUE_CODE
                code = self._answer(found, budget)
                if code is not None:
                    return code

    def _try_start(self) -> Ending | Fault:
        """One start; what the machine refuses is an error of the first, and a fault of later ones."""
        try:
            return self._start()
        except (EnvironmentFault, OSError) as error:  # storage may be what failed before, and come back
            if self._starts <= 1:
                raise
            return Fault(str(error))

    def _start(self) -> Ending | Fault:
        """One start, from the launcher to the end of the last rank."""
        nodes, run_dir = with_port(self._nodes), self._run_dir.resolve()
        arguments = self._arguments
        if self._starts and "--config" in arguments and (run_dir / CONFIG).is_file():
            arguments = ["--resume", str(run_dir), "--or-begin"]
        self._starts += 1
        environment, devices = rank_environment()
        with writing_to(run_dir):
            (run_dir / LOGS).mkdir(exist_ok=True)
            for rank in nodes.local_ranks:
                blank(heartbeat_path(run_dir / HEARTBEATS, rank))
            command = self._command([*arguments, "--supervised", str(run_dir)], nodes, devices)
            log = run_dir / LOGS / f"launcher-{nodes.node_rank}.log"
            log.touch()
            place, before = log.stat().st_size, self._outcome_stamp()
            launch = Launch(command, environment, log)
        try:
            watch = Watch(launch, run_dir, nodes, self._patience, self._requests, log, place)
            with self._metrics.watching(watch):
                found = watch.to_the_end()
        finally:
            ended = launch.end()
            self._metrics.forget_ranks()
            free_shared_memory(nodes)
        if not ended:
            self._say("some processes of the last start do not end; they may hold memory and devices")
        if isinstance(found, Fault) and len(nodes.slots) > 1:
            return self._end_elsewhere(found, before) or found
        return found

    def _end_elsewhere(self, found: Fault, before: tuple[int, int] | None) -> Ending | Fault | None:
        """How the run ended on other nodes, where the shared run folder tells."""
        said, stamp = read_outcome(self._run_dir), self._outcome_stamp()
        if said is None or stamp == self._first_outcome:  # that of an earlier job
            return None
        if said["outcome"] != "failed":  # all ranks had agreed before one of this node went
            ending: Ending = said["outcome"]
            return ending
        cause, code = str(said.get("error")), int(said.get("code", 1))
        if said.get("given_up") and not self._nodes.is_main:
            return Fault(f"node 0 has given up: {cause}", code, lasting=True)
        return Fault(cause, code) if found.lost_peer and stamp != before and code in LASTING_CODES else None

    def _answer(self, fault: Fault, budget: Budget) -> int | None:
        """After a fault: wait for the next start, or return the exit code to end with."""
        step = self._checkpoint_step()
        self._note("fault", cause=fault.cause, code=fault.code, checkpoint=step)
        self._metrics.note_fault(fault.code)
        wait = budget.wait_seconds(fault, step)
        if wait is None:
            after = f" (given up after {budget.used} restarts without progress)" if budget.used else ""
            print(f"frepa: error: {fault.cause}{after}", file=sys.stderr, flush=True)
            return self._end("failed", step, fault.code, code=fault.code, error=fault.cause)
        if not self._requests.stop:
            number = f"restart {budget.used} of {self._patience.max_restarts}"
            self._say(f"{fault.cause}; {number} in {wait:.0f} s {self._from_where()}")
            self._note("restart", number=budget.used, wait_seconds=wait, checkpoint=step)
            self._metrics.note_restart()
            if len(self._nodes.slots) == 1:  # what a rank wrote was not the end; other nodes would read it
                with contextlib.suppress(OSError):
                    (self._run_dir / OUTCOME).unlink(missing_ok=True)
            deadline = time.monotonic() + wait
            while time.monotonic() < deadline and not self._requests.stop:
                time.sleep(min(self._patience.poll_seconds, wait))
        if self._requests.stop:
            self._say(fault.cause)
            self._say_stopped()
            return self._end("requeue", step, REQUEUE_CODE)
        return None

    def _end(self, outcome: Literal["requeue", "failed"], step: int, exit_code: int, **details: Any) -> int:
        if self._nodes.is_main:
            if outcome == "failed" and len(self._nodes.slots) > 1:
                details["given_up"] = True  # for the other nodes
            with contextlib.suppress(FrepaError):  # the disk may be what failed
                write_outcome(self._run_dir, outcome, step, **details)
        return exit_code

    def _checkpoint_step(self) -> int:
        """Step of the newest checkpoint, -1 where there is none; as last known where the disk fails."""
        with contextlib.suppress(OSError):
            found = list_checkpoints(self._run_dir)
            self._known_step = int(found[-1].name.removeprefix("step-")) if found else -1
        return self._known_step

    def _from_where(self) -> str:
        step = self._checkpoint_step()
        return f"from step {step}" if step >= 0 else "from the beginning"

    def _outcome_stamp(self) -> tuple[int, int] | None:
        """What changes when the outcome is written anew."""
        try:
            stat = (self._run_dir / OUTCOME).stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def _note(self, event: str, **details: Any) -> None:
        """Write to the run's event log, where the disk lets it."""
        with contextlib.suppress(OSError):
            append_event(self._run_dir, event, node=self._nodes.node_rank, **details)

    def _say(self, text: str) -> None:
        print(f"frepa: {text}", file=sys.stderr, flush=True)

    def _say_stopped(self) -> None:
        command = f"frepa resume {self._run_dir}"
        if not (self._run_dir / CONFIG).is_file():  # it had not begun
            command = "frepa pretrain --or-resume ..."
        self._say(f"stopped as asked; `{command}` goes on {self._from_where()}")

    def _hear(self, number: int) -> None:
        """Take a request to stop."""
        self._requests.at_once |= number == signal.SIGINT and self._requests.stop
        self._requests.stop = True
