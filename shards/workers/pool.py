"""A pool of worker processes that never outlives, hides or blocks anything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import TypeVar

import cv2

from shards.support.errors import EnvironmentFault

T = TypeVar("T")
R = TypeVar("R")


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def run_tasks(function: Callable[[T], R], tasks: Iterable[T], jobs: int) -> Iterator[R]:
    """Yield `function(task)` of each task as it is done, in any order; with one job, in this process.

    Workers are spawned: a fork would copy locks that threads of OpenCV, Arrow or torch hold here. Their start
    costs an import each, once. The first exception ends all workers at once and is raised here.

    Raises:
        EnvironmentFault: a worker process was killed.
    """
    if jobs == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    # closed by the end of the loop, or by the kernel when this process is killed: then the workers end
    lifeline, held = context.Pipe(duplex=False)
    with ProcessPoolExecutor(jobs, context, _start_worker, (lifeline,)) as pool:
        try:
            yield from _submit_bounded(pool, function, iter(tasks), 2 * jobs)
        except BrokenProcessPool as error:
            raise EnvironmentFault(
                "a worker process was killed, most likely for want of memory",
                fix="use fewer jobs, then run the same command again",
            ) from error
        except BaseException:
            held.close()
            pool.shutdown(cancel_futures=True)
            raise
    held.close()
    lifeline.close()


def _submit_bounded(
    pool: ProcessPoolExecutor, function: Callable[[T], R], tasks: Iterator[T], bound: int
) -> Iterator[R]:
    """Keep at most `bound` tasks submitted: millions of them need not exist at once."""
    pending: set[Future[R]] = set()
    for task in tasks:
        pending.add(pool.submit(function, task))
        if len(pending) >= bound:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def _start_worker(lifeline: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends the workers
    cv2.setNumThreads(1)  # the pool is the parallelism
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Connection) -> None:
    lifeline.poll(None)
    os._exit(1)
