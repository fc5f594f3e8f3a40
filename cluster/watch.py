"""One start of the ranks of a node, watched to its end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.launch import Launch, is_alive, is_stopped
from cluster.nodes import Nodes
from cluster.verdict import Fault, Patience, Silence, describe_hang, find_fault
from frepa_dist.heartbeats import Pulse, heartbeat_path, read_pulse
from frepa_dist.runs import HEARTBEATS, LOGS

Ending = Literal["done", "requeue"]
# what a batch system or a person sends to whatever process it finds first
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass
class Requests:
    """What the supervisor was asked for by signals.

    Attributes:
        stop: to stop with a checkpoint.
        at_once: to stop without one.
    """

    stop: bool = False
    at_once: bool = False


class Tail:
    """Shows on stderr what is written to a log from now on; not the errors: they are told at the end."""

    def __init__(self, path: Path) -> None:
        self._path, self._rest = path, b""
        self._place = path.stat().st_size if path.is_file() else 0

    def show(self) -> None:
        """Show the lines that were written since the last call."""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            file.seek(self._place)
            new = file.read()
            self._place += len(new)
            *lines, self._rest = (self._rest + new).split(b"\n")
            for line in lines:
                if not line.startswith(b"frepa: error: "):
                    sys.stderr.write(line.decode(errors="replace") + "\n")
            sys.stderr.flush()


class Watch:
    """Listens to the ranks of one start until it has ended, or has to be ended.

    Args:
        launch: the launcher and its ranks.
        run_dir: the run folder.
        nodes: where the ranks are.
        patience: how long to wait for what.
        requests: what the supervisor is asked for meanwhile.
        log: what the launcher prints.
        log_place: where in it this start's part begins.
    """

    def __init__(
        self,
        launch: Launch,
        run_dir: Path,
        nodes: Nodes,
        patience: Patience,
        requests: Requests,
        log: Path,
        log_place: int,
    ) -> None:
        self._launch, self._nodes, self._patience, self._requests = launch, nodes, patience, requests
        self._ranks = list(nodes.local_ranks)
        self._folder, self._log = run_dir / HEARTBEATS, log
        self._log_place = log_place
        self._tail = Tail(run_dir / LOGS / f"rank-{self._ranks[0]}.log")
        self._pulses: dict[int, Pulse] = {}
        self._silence = Silence(self._ranks, 20 * patience.poll_seconds)
        self._told: set[int] = set()
        self._orphans_fault: Fault | None = None
        self._launcher_spared = True

    def to_the_end(self) -> Ending | Fault:
        """Wait until the ranks have ended, and say how; what is left of them is for the caller to end."""
        trouble_since: float | None = None
        asked_since: float | None = None
        while True:
            time.sleep(self._patience.poll_seconds)
            gone, status = self._look()
            if self._requests.stop and asked_since is None:
                asked_since = time.monotonic()
            if self._requests.at_once or self._need_not_wait(asked_since):
                self._requests.at_once = True  # no rank says how it ended
                return "requeue"
            over = [rank for rank, pulse in self._pulses.items() if pulse.is_over]
            states = {self._pulses[rank].state for rank in over}
            if "done" in states:  # said after a barrier behind the last write, so one rank speaks for all
                return self._left("done")
            if "requeue" in states:
                left = self._left("requeue")
                return self._orphans_fault or left
            rank, seconds = self._silence.longest(over)
            if seconds > self._limit_seconds():
                return self._hang(rank, seconds)
            if not gone and "failed" not in states:
                self._handle_stop(status, is_asked=asked_since is not None)
            if gone or "failed" in states or (status is not None and self._launcher_spared):
                now = time.monotonic()
                trouble_since = now if trouble_since is None else trouble_since
                all_ended = len(gone) + len(over) == len(self._ranks)
                waited = now - trouble_since
                if (all_ended and status is not None) or waited > self._patience.grace_seconds:
                    return self._fault(gone, status)

    def describe(self) -> tuple[Counter[str], float]:
        """Ranks by what they last said, and how long the most silent one has said nothing; for any thread."""
        pulses = dict(self._pulses)
        states: Counter[str] = Counter()
        states.update(pulses[rank].state if rank in pulses else "starting" for rank in self._ranks)
        return states, self._silence.longest(rank for rank in pulses if pulses[rank].is_over)[1]

    def _need_not_wait(self, asked_since: float | None) -> bool:
        """Whether ranks that are asked to stop have nothing to save, or have had their time to."""
        if asked_since is None:
            return False
        # ranks that meet, or fetch and compile, may hear nothing for minutes
        none_trains = all(pulse.state == "starting" for pulse in self._pulses.values())
        return none_trains or time.monotonic() - asked_since > self._patience.stop_seconds

    def _limit_seconds(self) -> float:
        """How long a rank may be silent now."""
        steps = [rank in self._pulses and self._pulses[rank].state != "starting" for rank in self._ranks]
        hang = self._patience.hang_seconds
        return hang if all(steps) else max(hang, self._patience.start_seconds)

    def _look(self) -> tuple[list[int], int | None]:
        """Read what is new; the ranks that are gone without a last word, and the launcher's status."""
        self._tail.show()
        status = self._launch.exit_status()
        alive = {rank: is_alive(pulse.pid) for rank, pulse in self._pulses.items()}
        for rank in self._ranks:  # after the look at processes: a last word is never missed
            pulse = read_pulse(heartbeat_path(self._folder, rank))
            if pulse is not None:
                self._pulses[rank] = pulse
        self._silence.hear(self._pulses, time.monotonic())
        gone = [rank for rank, lives in alive.items() if not lives and not self._pulses[rank].is_over]
        return gone, status

    def _handle_stop(self, status: int | None, *, is_asked: bool) -> None:
        """Pass on a request to stop; ranks that stop go on without their launcher to a checkpoint.

        Only one that `_need_not_wait` has seen: ranks that are told no longer say that they start.
        """
        alive = [rank for rank, pulse in self._pulses.items() if not pulse.is_over and is_alive(pulse.pid)]
        all_alive = len(alive) == len(self._ranks)
        if self._launcher_spared and all_alive and any(self._pulses[r].state == "stopping" for r in alive):
            # asked to stop, it kills a rank that has not ended after 30 s; a checkpoint may take longer
            self._launch.signal_launcher(signal.SIGKILL)
            self._launcher_spared = False
        elif self._launcher_spared and all_alive and status is not None and status < 0:
            # it died alone: the ranks can save what they have. On several nodes the others would take it for
            # a request to stop for good
            if -status in ASKING:
                self._requests.stop = True
            elif len(self._nodes.slots) > 1:
                return
            else:
                self._orphans_fault = find_fault({}, [], [], status, "")
            self._launcher_spared = False
        if is_asked or self._orphans_fault is not None:
            for rank in alive:
                if rank not in self._told:
                    self._told.add(rank)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self._pulses[rank].pid, signal.SIGTERM)

    def _left(self, ending: Ending) -> Ending:
        """Give the processes time to leave in order."""
        deadline = time.monotonic() + 10 * self._patience.grace_seconds
        while any(is_alive(pulse.pid) for pulse in self._pulses.values()) and time.monotonic() < deadline:
            time.sleep(self._patience.poll_seconds / 5)
        return ending

    def _hang(self, rank: int, seconds: float) -> Fault:
        """Have the ranks write where they are to their logs, and say which of them hangs."""
        alive = [number for number, pulse in self._pulses.items() if is_alive(pulse.pid)]
        stopped = [number for number in alive if is_stopped(self._pulses[number].pid)]
        for number in set(alive) - set(stopped):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pulses[number].pid, signal.SIGUSR2)
        time.sleep(min(1.0, self._patience.grace_seconds))
        missing = set(self._ranks) - set(self._pulses)
        if missing:
            rank = min(missing)
            return Fault(f"rank {rank} did not start within {seconds:.0f} s: {self._last_line()}")
        return describe_hang(rank, seconds, self._pulses, stopped, len(self._nodes.slots))

    def _fault(self, gone: list[int], status: int | None) -> Fault:
        missing = set(self._ranks) - set(self._pulses)
        return find_fault(self._pulses, gone, missing, status, self._last_line())

    def _last_line(self) -> str:
        """What the launcher, or a rank before it had a log of its own, printed last in this start."""
        with contextlib.suppress(OSError), self._log.open("rb") as file:
            file.seek(self._log_place)
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
            return lines[-1][:500] if lines else ""
        return ""
