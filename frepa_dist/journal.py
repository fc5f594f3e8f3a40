"""What is written down about a run by whoever looks after it: events, and how it ended. It needs no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from frepa_dist.runs import EVENTS, OUTCOME
from shards.stores.atomic import replace_text

Outcome = Literal["done", "requeue", "failed"]


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line, whole or not at all, also where several threads and processes do.

    A full disk is no reason to end a run: the line is lost, and that is said.
    """
    data = (json.dumps(record) + "\n").encode()
    with path.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":  # a line that a crash has torn
            data = b"\n" + data
        try:
            if file.write(data) == len(data):
                return
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        file.truncate(end)
    print(f"frepa: {path}: the disk is full, a line is lost", file=sys.stderr)


def append_event(run_dir: Path, event: str, **details: Any) -> None:
    """Append to the run's event log."""
    append_line(run_dir / EVENTS, {"time": round(time.time(), 3), "event": event, **details})


def write_outcome(run_dir: Path, outcome: Outcome, step: int, **details: Any) -> None:
    """Write how this start ended.

    Args:
        run_dir: the run folder.
        outcome: `done`, `requeue` (stopped as asked, with a checkpoint: to be resumed) or `failed`.
        step: steps taken; -1 where the one that says so does not know it.
        details: of a failure its `code` and its `error`.
    """
    replace_text(run_dir / OUTCOME, json.dumps({"outcome": outcome, "step": step, **details}) + "\n")


def read_outcome(run_dir: Path) -> dict[str, Any] | None:
    """How the last start ended; None while it runs, or when it was killed."""
    try:
        said: dict[str, Any] = json.loads((run_dir / OUTCOME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return said
