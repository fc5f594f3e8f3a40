"""Two hosts on one machine: network namespaces with a link between them that can be cut."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest


class Host(NamedTuple):
    """One of the two.

    Attributes:
        name: of its namespace.
        address: on the link.
        device: the network device there.
    """

    name: str
    address: str
    device: str

    def start(self, command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command there, in a process group of its own; what it says goes to a file."""
        inside = ["ip", "netns", "exec", self.name, *command]
        # ranks find each other by the device, since the name of this machine is no address there
        known = {"GLOO_SOCKET_IFNAME": self.device, "NCCL_SOCKET_IFNAME": self.device}
        with log.open("wb") as out:
            return subprocess.Popen(
                inside,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **known, **environment},
                start_new_session=True,
            )


def run_ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make the namespaces and the link; skip the test where that is not allowed."""
    unique = f"{os.getpid() % 65536:x}"
    subnet = f"10.{77 + os.getpid() // 254 % 100}.{os.getpid() % 254}"
    hosts = tuple(Host(f"frepa-{unique}-{i}", f"{subnet}.{i + 1}", f"fr{unique}{i}") for i in range(2))
    with contextlib.ExitStack() as stack:
        try:
            for host in hosts:
                run_ip("netns", "add", host.name)
                stack.callback(run_ip, "netns", "del", host.name)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        run_ip("link", "add", hosts[0].device, "type", "veth", "peer", "name", hosts[1].device)
        for host in hosts:
            run_ip("link", "set", host.device, "netns", host.name)
            run_ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.device)
            run_ip("-n", host.name, "link", "set", host.device, "up")
            run_ip("-n", host.name, "link", "set", "lo", "up")
        yield hosts  # type: ignore[misc]


def cut(host: Host) -> None:
    """Take the link down at one end: packets vanish, and nobody is told."""
    run_ip("-n", host.name, "link", "set", host.device, "down")


def mend(host: Host) -> None:
    """Put the link up again."""
    run_ip("-n", host.name, "link", "set", host.device, "up")
