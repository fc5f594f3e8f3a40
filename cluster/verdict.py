"""What a supervisor concludes from what it sees: who is silent, what went wrong, whether to start again.

Functions of what ranks say and of a clock that is passed in; they start and end nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from frepa_dist.heartbeats import Pulse
from shards.support.errors import ConfigError, DataError, DivergedError, EnvironmentFault

# errors that come again however often the run is started
LASTING_CODES = frozenset({ConfigError.exit_code, DataError.exit_code, DivergedError.exit_code})
BUG_CODE = 1


@dataclass(frozen=True)
class Fault:
    """Why a start ended before its time.

    Attributes:
        cause: one line for people.
        code: exit code that says the kind.
        lost_peer: whether all that is known here is that ranks elsewhere are gone.
        lasting: whether there is no use in starting again, whatever the code.
    """

    cause: str
    code: int = EnvironmentFault.exit_code
    lost_peer: bool = False
    lasting: bool = False


@dataclass(frozen=True)
class Patience:
    """How much a supervisor puts up with.

    Attributes:
        max_restarts: restarts in a row without a new checkpoint between them.
        hang_seconds: a rank that says nothing new for so long counts as dead; it has to be longer than the
            longest step and a checkpoint.
        start_seconds: the same until every rank has taken a step, where that is longer: to import, to meet,
            to compile, to fetch the first samples.
        stop_seconds: how long ranks may take to stop when asked, with a checkpoint; then they are ended.
        backoff_seconds: wait before the first restart; each further one without progress doubles it.
        max_backoff_seconds: the longest wait.
        grace_seconds: when a rank is gone, how long the others may take to say what they saw.
        poll_seconds: between two looks.
    """

    max_restarts: int = 5
    hang_seconds: float = 600.0
    start_seconds: float = 900.0
    stop_seconds: float = 240.0
    backoff_seconds: float = 2.0
    max_backoff_seconds: float = 300.0
    grace_seconds: float = 3.0
    poll_seconds: float = 0.25


class Silence:
    """How long each rank has said nothing new.

    Only the time in which the listener was awake counts: where it was stopped, or the machine slept, the
    ranks may have been too. The clock of the day plays no part.

    Args:
        ranks: whom to listen to.
        max_gap_seconds: longest time between two calls that counts as being awake.
    """

    def __init__(self, ranks: Iterable[int], max_gap_seconds: float) -> None:
        self._heard: dict[int, int | None] = dict.fromkeys(ranks)
        self._seconds: dict[int, float] = dict.fromkeys(self._heard, 0.0)
        self._max_gap = max_gap_seconds
        self._now: float | None = None

    def hear(self, pulses: Mapping[int, Pulse], now: float) -> None:
        """Take note of what ranks say at a time in seconds, of a clock that never goes back."""
        passed = 0.0 if self._now is None else min(now - self._now, self._max_gap)
        self._now = now
        for rank in self._heard:
            count = pulses[rank].count if rank in pulses else None
            if count != self._heard[rank]:
                self._heard[rank], self._seconds[rank] = count, 0.0
            else:
                self._seconds[rank] += passed

    def longest(self, over: Iterable[int] = ()) -> tuple[int, float]:
        """The rank that has been silent for longest, and for how many seconds; not of those that are over."""
        waiting = {rank: seconds for rank, seconds in self._seconds.items() if rank not in set(over)}
        if not waiting:
            return -1, 0.0
        return max(waiting.items(), key=lambda item: item[1])


def find_fault(
    pulses: Mapping[int, Pulse],
    gone: Iterable[int],
    missing: Iterable[int],
    status: int | None,
    last_line: str,
) -> Fault:
    """Say what went wrong from what is left of a start.

    Args:
        pulses: what each rank last said.
        gone: ranks whose process ended without a last word.
        missing: ranks that never said anything.
        status: how the launcher ended, None where it had not.
        last_line: what the launcher, or a rank that did not start, printed last.
    """
    failed = {rank: pulse for rank, pulse in pulses.items() if pulse.state == "failed"}
    own = {rank: pulse for rank, pulse in failed.items() if not pulse.lost_peer}
    if own:
        # one that will not pass says more than what it led to elsewhere
        rank, pulse = min(own.items(), key=lambda item: (item[1].code not in LASTING_CODES, item[0]))
        return Fault(f"rank {rank}: {pulse.error}", pulse.code)
    gone, missing = sorted(gone), sorted(missing)
    if gone:
        step = max(pulses[rank].step for rank in gone)
        # heartbeats come a second apart at most, and steps may be faster
        when = f"at about step {step}" if step >= 0 else "before the first step"
        # it may be that of another rank, which the first that went took with it
        theirs = None if status in {pulse.code for pulse in failed.values()} else status
        return Fault(f"{name_ranks(gone)} {describe_end(theirs, len(gone), when)}")
    if status is not None and status < 0:
        return Fault(f"the launcher was killed by {signal_name(-status)}")
    if missing:
        return Fault(f"{name_ranks(missing)} did not start: {last_line or 'nothing was printed'}", BUG_CODE)
    if failed:
        rank, pulse = min(failed.items())
        return Fault(f"rank {rank}: {pulse.error}", pulse.code, lost_peer=True)
    return Fault(f"the launcher ended (status {status}) before the ranks")


def describe_hang(
    rank: int, seconds: float, pulses: Mapping[int, Pulse], stopped: Iterable[int], num_nodes: int = 1
) -> Fault:
    """Say which rank hangs: one that is stopped, else the one that is behind, else the one silent longest."""
    stopped = sorted(stopped)
    behind = min(pulses, key=lambda number: (pulses[number].step, number), default=rank)
    if stopped:
        who, how = name_ranks(stopped), ", stopped by a signal"
    elif pulses and pulses[behind].step < max(pulse.step for pulse in pulses.values()):
        who, how = f"rank {behind}", ", behind the others"
    else:
        who, how = f"rank {rank}", ", waiting for another node or for the network" if num_nodes > 1 else ""
    step = max((pulse.step for pulse in pulses.values()), default=-1)
    when = f"at about step {step}" if step >= 0 else "before the first step"
    return Fault(f"{who} hung {when}{how}: no heartbeat for {seconds:.0f} s")


def name_ranks(ranks: list[int]) -> str:
    """`rank 1`, or `ranks 0, 1`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def signal_name(number: int) -> str:
    """`SIGKILL` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def describe_end(status: int | None, number: int, when: str) -> str:
    """How ranks ended without a last word, from the status of a launcher, which passes on one of theirs."""
    if status is not None and 0 < status <= 192:
        return f"ended {when} with status {status}; see the last lines of the logs in RUN/logs"
    verb = "was" if number == 1 else "were"
    # it ends with minus the number of the signal, of which a status keeps 8 bits
    signaled = 256 - status if status is not None and status > 192 else signal.SIGKILL
    by_whom = ": by hand, or by the kernel for lack of memory" if signaled == signal.SIGKILL else ""
    return f"{verb} killed {when} ({signal_name(signaled)}{by_whom})"


class Budget:
    """Decides whether to start again, and when; a new checkpoint since the last time gives all back.

    Args:
        patience: how often, and how long to wait.
        checkpoint_step: step of the newest checkpoint at the beginning, -1 where there is none.

    Attributes:
        used: restarts without progress.
    """

    def __init__(self, patience: Patience, checkpoint_step: int = -1) -> None:
        self._patience, self._best = patience, checkpoint_step
        self.used = 0
        self._last: Fault | None = None

    def wait_seconds(self, fault: Fault, checkpoint_step: int) -> float | None:
        """Seconds to wait before the next start; None to give up.

        Args:
            fault: why the last start ended.
            checkpoint_step: step of the newest checkpoint now.
        """
        if checkpoint_step > self._best:
            self._best, self.used, self._last = checkpoint_step, 0, None
        # the same exception twice at the same place is a bug, and stays one
        again = fault.code == BUG_CODE and fault == self._last
        self._last = fault
        lasting = fault.lasting or fault.code in LASTING_CODES
        if lasting or again or self.used >= self._patience.max_restarts:
            return None
        self.used += 1
        wait: float = self._patience.backoff_seconds * 2.0 ** (self.used - 1)
        return min(wait, self._patience.max_backoff_seconds)
