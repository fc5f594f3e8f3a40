"""Ray for the length of a block: started on this machine, or found where a cluster runs."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_constants
from ray.exceptions import RayError

from shards.support.errors import EnvironmentFault

# Ray takes a loopback address for a mistake and listens on all interfaces; not so where it believes that this
# machine will never be part of a cluster, as it does on macOS and Windows
CLUSTER_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextmanager
def ray_session(address: str | None, *, num_cpus: int | None = None, fix: str = "") -> Iterator[None]:
    """Connect to Ray, and leave it in the end; what was started here ends then.

    On this machine it listens on 127.0.0.1 alone, without a dashboard, and tells nobody that it is used.

    Args:
        address: of a running cluster ("auto" finds the one of this machine), None to start Ray here.
        num_cpus: CPUs that a Ray that is started here hands out.
        fix: further ways to mend it when Ray cannot be had.

    Raises:
        EnvironmentFault: Ray cannot be reached, or not be started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by processes that Ray starts
    # says at each start that a local Ray takes commands from those alone who hold its token
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    with on_loopback(address is None):
        try:
            if address is None:
                ray.init(
                    num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="warning"
                )
            else:
                check_reachable(address)
                ray.init(address=address, log_to_driver=False, logging_level="warning")
        except (OSError, RayError, RuntimeError, ValueError) as error:
            raise EnvironmentFault(
                f"Ray cannot be reached or started: {error}",
                where=address or "this machine",
                fix=f"start it (ray start --head), or correct the address{fix}",
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def on_loopback(is_local: bool) -> Iterator[None]:
    """Let a Ray that is started in the block listen on 127.0.0.1 alone, where it is a local one."""
    if not is_local:
        yield
        return
    before = os.environ.get(CLUSTER_VARIABLE), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[CLUSTER_VARIABLE] = "0"  # for the processes that it starts; this one has read it already
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        if before[0] is None:
            del os.environ[CLUSTER_VARIABLE]
        else:
            os.environ[CLUSTER_VARIABLE] = before[0]


def check_reachable(address: str) -> None:
    """Knock at HOST:PORT, since Ray itself tries for two minutes before it says that nobody is there.

    Raises:
        OSError: nobody is.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
