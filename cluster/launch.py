"""Start the ranks of this node through DeepSpeed's launcher, and end them."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cluster.nodes import LOCALHOST, Nodes
from shards.support.errors import EnvironmentFault


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now.

    Below those that the system gives to connections by itself: one of these may be taken before it is used.
    """
    while True:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOCALHOST, port))
            return port


def check_port(port: int) -> None:
    """Make sure the ranks can meet on a port.

    Raises:
        EnvironmentFault: something listens there.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOCALHOST, port))
        except OSError as error:
            raise EnvironmentFault(
                f"the port is not free: {error.strerror}",
                where=f"{LOCALHOST}:{port}",
                fix="name another with --master-port, or leave the option out",
            ) from error


def default_num_ranks() -> int:
    """One rank per CUDA device, or one per two cores up to two where there is none."""
    import torch

    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


def launch_command(
    arguments: Sequence[str], nodes: Nodes, visible_devices: str = "", *, module: str = "frepa_dist.train"
) -> list[str]:
    """Command line of the launcher that starts the ranks of one node and waits for them.

    It is what the `deepspeed` command starts on every node; alone, its exit status is its own.

    Args:
        arguments: of the module.
        nodes: where the ranks are, with a port.
        visible_devices: CUDA_VISIBLE_DEVICES, empty where it is not set: the launcher sets the variable anew
            from the devices it is told.
        module: what every rank runs.
    """
    assert nodes.master_port is not None
    devices: list[list[int]] = [list(range(slots)) for slots in nodes.slots]
    own = visible_devices.split(",")[: nodes.slots[nodes.node_rank]]
    if visible_devices and all(device.isdigit() for device in own):
        devices[nodes.node_rank] = [int(device) for device in own]
    world = {f"node-{number}": named for number, named in enumerate(devices)}
    return [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--quiet"),
        f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
        f"--node_rank={nodes.node_rank}",
        f"--master_addr={nodes.master_addr}",
        f"--master_port={nodes.master_port}",
        *("--module", module, *arguments),
    ]


class Launch:
    """The launcher and the ranks of one start on this node: one process group.

    Args:
        command: the launcher's command line.
        environment: its variables.
        log: file to which the launcher prints, and ranks until they have files of their own.

    Attributes:
        pid: the launcher's process, and the process group.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        with log.open("ab") as output:
            # ranks hold the read end of stdin: when it closes, they know that this process is gone
            self._process = subprocess.Popen(
                command,
                env=environment,
                start_new_session=True,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.pid = self._process.pid

    def exit_status(self) -> int | None:
        """How the launcher ended, as `subprocess` says it (-9: by SIGKILL); None while it runs."""
        return self._process.poll()

    def signal_launcher(self, number: int) -> None:
        """Send a signal to the launcher alone."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def end(self, patience_seconds: float = 30.0) -> bool:
        """Kill what is left of the group, and wait until it is gone; whether it is."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + patience_seconds
        while self._process.poll() is None or group_members(self.pid):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        return True


def process_stat(pid: int) -> tuple[str, int] | None:
    """State (`R`, `S`, `T` stopped, `Z` ended, ...) and process group of a process; None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return fields[0], int(fields[2])


def is_alive(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    stat = process_stat(pid)
    return stat is not None and stat[0] not in "ZX"


def is_stopped(pid: int) -> bool:
    """Whether a process stands still by a signal or a debugger."""
    stat = process_stat(pid)
    return stat is not None and stat[0] in "Tt"


def group_members(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    members = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            stat = process_stat(int(path.name))
            if stat is not None and stat[1] == group and stat[0] not in "ZX":
                members.append(int(path.name))
    return members


def free_shared_memory(nodes: Nodes) -> None:
    """Remove what DeepSpeed's ranks on CPU leave in shared memory, some 60 MB each, however they end."""
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{nodes.master_addr}_{nodes.master_port}_*"
    for path in Path("/dev/shm").glob(name):  # noqa: S108
        path.unlink(missing_ok=True)


def rank_environment() -> tuple[dict[str, str], str]:
    """Variables for the launcher, and the CUDA devices that the user allows."""
    import torch  # here, not at the top, so that `frepa --help` need not import it

    environment = dict(os.environ)
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        visible = ""
    return environment, visible


def with_port(nodes: Nodes) -> Nodes:
    """The same nodes with a port to meet on.

    Raises:
        EnvironmentFault: the port that was named is not free.
    """
    if nodes.master_port is None:
        return replace(nodes, master_port=free_port())
    if nodes.is_main and len(nodes.slots) == 1:
        check_port(nodes.master_port)
    return nodes
