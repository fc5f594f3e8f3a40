"""For job scripts, wait for a Ray cluster: `python -m cluster.await_ray HOST:PORT --nodes N`."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable

import click

from shards.support.errors import EnvironmentFault, FrepaError


def await_nodes(
    address: str,
    num_nodes: int,
    timeout_seconds: float,
    count_nodes: Callable[[str], int],
    poll_seconds: float = 0.5,
) -> None:
    """Return when a cluster has at least as many nodes.

    Args:
        address: HOST:PORT of its head.
        num_nodes: that are waited for, the head among them.
        timeout_seconds: how long.
        count_nodes: says how many there are now.
        poll_seconds: between two looks.

    Raises:
        EnvironmentFault: the time is over.
    """
    deadline = time.monotonic() + timeout_seconds
    while (found := count_nodes(address)) < num_nodes:
        if time.monotonic() > deadline:
            raise EnvironmentFault(
                f"{found} of {num_nodes} nodes of the Ray cluster are there after {timeout_seconds:.0f} s",
                where=address,
                fix="look at what `ray start` printed above, and whether the nodes reach each other",
            )
        time.sleep(poll_seconds)


def count_ray_nodes(address: str) -> int:
    """How many nodes of the cluster at HOST:PORT are alive; 0 as long as its head does not answer."""
    import ray

    if not ray.is_initialized():
        host, _, port = address.rpartition(":")
        try:  # Ray itself would try for long
            socket.create_connection((host, int(port)), timeout=5).close()
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (OSError, RuntimeError):  # the head is starting
            return 0
    return sum(bool(node["Alive"]) for node in ray.nodes())


@click.command()
@click.argument("address")
@click.option("--nodes", type=click.IntRange(min=1), required=True, help="Nodes, the head among them.")
@click.option("--timeout", type=float, default=300.0, show_default=True, help="Seconds to wait.")
def main(address: str, nodes: int, timeout: float) -> None:
    """Wait until the Ray cluster at ADDRESS (HOST:PORT) has its nodes."""
    try:
        await_nodes(address, nodes, timeout, count_ray_nodes)
    except FrepaError as error:
        print(f"frepa: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
