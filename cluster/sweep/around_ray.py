"""What is put around Ray Tune: its variables, signals, and going on where Ray itself breaks."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from ray.exceptions import RayError

from shards.support.errors import EnvironmentFault

# Ray reads these; the driver's working folder, its own files and its own words are not wanted
RAY_VARIABLES = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # what is lost with a driver is found again, but takes time
    "TUNE_FORCE_TRIAL_CLEANUP_S": "90",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the table has them
    # where memory runs low it kills actors, of which these are small: what trains is none of them
    "RAY_memory_monitor_refresh_ms": "0",
}
MOST_BREAKS = 3


@contextlib.contextmanager
def ray_variables() -> Iterator[None]:
    """Set what Ray Tune reads from the environment, for the length of a block."""
    # it misses files of metrics that the journal stands for
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)
    before = {name: os.environ.get(name) for name in RAY_VARIABLES}
    os.environ.update(RAY_VARIABLES)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def hearing_sigterm() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C, which Ray Tune ends a sweep in order at."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def keep_fitting(fit: Callable[[bool], None], count_reports: Callable[[], int], resume: bool) -> None:
    """Run a tuner to its end, restoring it where Ray breaks down under it.

    Tune ends a whole sweep when a node without memory kills an actor, or when the cluster's head is gone.

    Args:
        fit: starts, or restores, a tuner in a fresh session of Ray, and runs it.
        count_reports: how many there have been.
        resume: whether the first is to be restored.

    Raises:
        EnvironmentFault: Ray broke several times in a row without a report in between.
    """
    breaks, known = 0, count_reports()
    while True:
        try:
            return fit(resume)
        except Exception as error:
            cause = find_rays_fault(error)
            if cause is None:
                raise
            reports = count_reports()
            breaks, known = (breaks + 1 if reports == known else 1), reports
            told = f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
            if breaks > MOST_BREAKS:
                raise EnvironmentFault(
                    f"Ray broke down {breaks} times without a report in between ({told})",
                    where="Ray",
                    fix="see to its memory and its nodes, then go on with `frepa sweep --resume`",
                ) from error
            print(f"frepa: Ray broke down ({told}); the sweep goes on", file=sys.stderr, flush=True)
            resume = True


def find_rays_fault(error: BaseException | None) -> BaseException | None:
    """The error of Ray's core among those that led to one; None where it has another reason."""
    while error is not None and not isinstance(error, RayError):
        error = error.__cause__ or error.__context__
    return error
