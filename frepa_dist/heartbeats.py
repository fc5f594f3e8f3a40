"""What each rank says of itself while it trains, in a small file that its supervisor reads.

A rank writes over its file in place, so that it needs no room on a full disk, and no other rank. The time of
a heartbeat is not in it: who reads looks whether the content advances, by a clock of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

State = Literal["starting", "training", "stopping", "done", "requeue", "failed"]
_SIZE = 4096  # bytes of a file: a page, however little is said


@dataclass(frozen=True)
class Pulse:
    """What a rank last said.

    Attributes:
        pid: its process.
        count: how often it has said something.
        state: `training` from the first step on, `stopping` once this rank was asked to stop; the last three
            are final.
        step: steps taken, -1 before training.
        code, error: of a failure: exit code and message.
        lost_peer: whether it failed only because another rank was gone.
    """

    pid: int
    count: int = 0
    state: State = "starting"
    step: int = -1
    code: int = 0
    error: str = ""
    lost_peer: bool = False

    @property
    def is_over(self) -> bool:
        """Whether this rank has said its last word."""
        return self.state in ("done", "requeue", "failed")


def heartbeat_path(folder: Path, rank: int) -> Path:
    """File of a rank in the folder of heartbeats."""
    return folder / f"rank-{rank}.json"


class Heartbeat:
    """Says how far this rank is.

    Args:
        path: file to write; None says nothing.
        interval_seconds: least time between two writes in which nothing but the step changed.
    """

    def __init__(self, path: Path | None, interval_seconds: float = 1.0) -> None:
        self.pulse = Pulse(os.getpid())
        self._interval, self._written_at = interval_seconds, -interval_seconds
        self._descriptor: int | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            self._write()

    def beat(self, step: int, state: State = "training") -> None:
        """Say that `step` steps are taken; who was asked to stop remains so."""
        if self.pulse.state == "stopping":
            state = "stopping"
        due = time.monotonic() - self._written_at >= self._interval or state != self.pulse.state
        self.pulse = replace(self.pulse, step=step, state=state)
        if due:
            self._write()

    def stopping(self) -> None:
        """Say that this rank was asked to stop."""
        if not self.pulse.is_over:
            self.beat(self.pulse.step, "stopping")

    def end(self, state: State, *, code: int = 0, error: str = "", lost_peer: bool = False) -> None:
        """Say the last word."""
        self.pulse = replace(self.pulse, state=state, code=code, error=error[:_SIZE], lost_peer=lost_peer)
        self._write()

    def _write(self) -> None:
        self._written_at = time.monotonic()
        self.pulse = replace(self.pulse, count=self.pulse.count + 1)
        if self._descriptor is not None:
            said = asdict(self.pulse)
            while len(text := json.dumps(said, ensure_ascii=False).encode(errors="replace")) > _SIZE:
                said["error"] = said["error"][: len(said["error"]) * 3 // 4]
            # a disk that fails is for the checkpoints to tell of
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, text.ljust(_SIZE), 0)


def blank(path: Path) -> None:
    """Make a rank have said nothing, in place: a full disk may not have room for a new file."""
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        file.write(b" " * _SIZE)


def read_pulse(path: Path) -> Pulse | None:
    """What a rank last said; None when it has not yet, or is writing just now."""
    try:
        return Pulse(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
