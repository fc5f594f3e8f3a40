"""Stopping when asked: ranks agree on the step after which all of them save and leave.

Batch systems ask by a signal, which may reach one rank only, or each at another moment. A rank that stopped
by itself would leave the others waiting, so after every step the ranks take the maximum of their flags. That
reduction runs beside the next step (gloo, CPU tensor: no device is waited for) and is read after it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from frepa_dist.heartbeats import Heartbeat
from shards.support.signals import hearing

if TYPE_CHECKING:
    from frepa_dist.train.engines import World

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Control:
    """What this rank hears from outside, and tells its supervisor.

    Args:
        heartbeat: where this rank says how far it is; None says nothing.

    Attributes:
        heartbeat: as given.
        agreed: whether all ranks stop after the step that was taken last; equal on all ranks.
    """

    def __init__(self, heartbeat: Heartbeat | None = None) -> None:
        self.heartbeat = heartbeat or Heartbeat(None)
        self.agreed = False
        self._asked = False
        self._world: World | None = None
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def ask(self) -> None:
        """Ask all ranks to stop; may be called by a signal handler or another thread."""
        self._asked = True
        self.heartbeat.stopping()

    def listening(self) -> AbstractContextManager[None]:
        """Take SIGTERM and SIGUSR1 as requests to stop; only in the main thread."""
        return hearing(STOP_SIGNALS, lambda _: self.ask())

    def join(self, world: World) -> None:
        """Make the side group in which ranks agree; all ranks must call it."""
        self._world = world
        if world.size > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)  # every rank is in it
            self._group = group

    def after_step(self, step: int) -> bool:
        """Whether all ranks stop now; all ranks must call it after every step.

        A request is followed after the step that comes next on every rank, the same on all.

        Args:
            step: steps taken.
        """
        self.heartbeat.beat(step)
        if self._world is None:
            return False
        if self._group is None:
            self.agreed = self._asked
            return self.agreed
        self.agreed = self._take()
        flag = torch.tensor([int(self._asked)])
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None  # it is for ranks outside the group only
        self._pending = flag, work
        return self.agreed

    def close(self) -> None:
        """Wait for the last reduction, which every rank has begun; all ranks must call it."""
        self._take()

    def _take(self) -> bool:
        if self._pending is None:
            return False
        flag, work = self._pending
        self._pending = None
        work.wait()
        return bool(flag.item())  # on the CPU


def stop_when_closed(descriptor: int, control: Control, patience_seconds: float) -> None:
    """Ask to stop when the other end of a pipe is gone: the supervisor holds it as long as it lives.

    Args:
        descriptor: end to read from.
        control: of this rank.
        patience_seconds: after which this process ends itself: with the supervisor gone, nobody else would
            end ranks that wait for each other in vain.
    """

    def wait() -> None:
        while os.read(descriptor, 1024):
            pass
        control.ask()
        time.sleep(patience_seconds)
        os._exit(5)

    threading.Thread(target=wait, name="supervisor-watch", daemon=True).start()
