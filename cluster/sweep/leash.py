"""A `frepa` command that lives no longer than whoever started it.

python -m cluster.sweep.leash pretrain --or-resume --config FILE ...

The starter holds the other end of stdin. When that closes, because it was killed or its machine is gone, the
command is asked to stop: ranks save after their step and end, as for any batch system that takes a job away.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path


class Leashed:
    """A command on a leash, seen from its starter.

    Args:
        arguments: of `frepa`.
        log: file to which it prints.
        environment: further variables.
    """

    def __init__(self, arguments: Sequence[str], log: Path, **environment: str) -> None:
        command = [sys.executable, "-m", "cluster.sweep.leash", *arguments]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C is for the driver
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._process.poll()

    def end(self, patience_seconds: float = 60.0) -> None:
        """End it and all its ranks at once: what they have not saved is not wanted any more."""
        deadline = time.monotonic() + patience_seconds
        number = signal.SIGTERM
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            number = signal.SIGINT  # a supervisor that was asked already then waits for no checkpoint
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.5)
        if self._process.poll() is None:
            self._process.kill()  # its ranks notice, as they would on any death of their supervisor
            self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()


def watch(descriptor: int) -> None:
    """Ask this process to stop when the other end of a pipe closes."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(descriptor, 1024):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="leash", daemon=True).start()


def main() -> None:
    """Run the command that is named by the arguments."""
    watch(0)  # before what takes seconds to import
    from cluster.cli import main as frepa

    frepa()


if __name__ == "__main__":
    main()
