"""The tasks of a build on Ray: one machine, or a cluster; the same function, so the same bytes.

The destination and the sources must be places that every node sees: S3, or a shared file system. Every node
needs this package in the version of the driver, and finds S3 credentials by boto3's own chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import cv2
import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from shards.support.errors import EnvironmentFault, FrepaError
from shards.workers.ray_session import ray_session

T = TypeVar("T")
R = TypeVar("R")

MAX_RETRIES = 3
"""Of a task whose worker or node died; a task that raised is not repeated."""

TASK_BYTES = 2 << 30
"""Memory set aside for a task: Ray starts no more of them on a node than fit."""


def run_tasks_on_ray(
    function: Callable[[T], R], tasks: Iterable[T], jobs: int, *, address: str | None = None
) -> Iterator[R]:
    """Yield `function(task)` of each task as it is done, in any order.

    At most twice as many tasks are submitted as run at once, so that millions of them need not exist.

    Args:
        function: of the top level of a module.
        tasks: made as they are needed.
        jobs: tasks that run at once on this machine; on a cluster its cores decide.
        address: of a running cluster ("auto" finds the one of this machine), None to start Ray here.

    Raises:
        EnvironmentFault: Ray cannot be reached, or a task's worker died again and again.
        FrepaError: whatever `function` raised.
    """
    fix = ", or build with --executor local"
    with ray_session(address, num_cpus=jobs, fix=fix):
        yield from _submit_bounded(function, iter(tasks))


def _submit_bounded(function: Callable[[T], R], tasks: Iterator[T]) -> Iterator[R]:
    remote = ray.remote(num_cpus=1, memory=_task_bytes(), max_retries=MAX_RETRIES)(_run)
    pending: set[Any] = set()
    for task in tasks:
        pending.add(remote.remote(function, task))
        # looked up each time, since a cluster may grow
        while len(pending) >= 2 * max(1, int(ray.cluster_resources().get("CPU", 1))):
            yield _next(pending)
    while pending:
        yield _next(pending)


def _task_bytes() -> int:
    """Memory of a task; less where no node has as much, since Ray would then wait for ever."""
    largest = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    return int(min(TASK_BYTES, largest))


def _run(function: Callable[[T], R], task: T) -> R:
    cv2.setNumThreads(1)  # tasks are the parallelism
    return function(task)


def _next(pending: set[Any]) -> Any:
    """Wait for a task and take its result out of `pending`."""
    done, _ = ray.wait(list(pending), num_returns=1)
    pending.discard(done[0])
    try:
        return ray.get(done[0])
    except RayTaskError as error:
        if isinstance(error.cause, FrepaError):
            raise error.cause from None
        raise
    except OutOfMemoryError as error:
        raise EnvironmentFault(
            "a node ran out of memory, again and again",
            fix="give the nodes more memory or fewer cores, then run the same command again",
        ) from error
    except RayError as error:
        raise EnvironmentFault(
            f"a Ray worker died, again and again ({type(error).__name__})",
            fix="look at the nodes' Ray logs, then run the same command again",
        ) from error
