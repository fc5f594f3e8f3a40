"""Start training through the `deepspeed` launcher on this machine, and say how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from shards.support.errors import EnvironmentFault


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def check_port(port: int) -> None:
    """Make sure the ranks can meet on a port.

    Raises:
        EnvironmentFault: something listens there.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise EnvironmentFault(
                f"the port is not free: {error.strerror}",
                where=f"127.0.0.1:{port}",
                fix="name another with --master-port, or leave the option out",
            ) from error


def default_num_ranks() -> int:
    """One rank per CUDA device, or one per two cores up to two where there is none."""
    import torch

    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


def deepspeed_command(
    arguments: Sequence[str],
    num_ranks: int,
    master_port: int,
    visible_devices: str = "",
    *,
    module: str = "frepa_dist.train",
) -> list[str]:
    """The launcher's command line for ranks on this machine.

    Args:
        arguments: of the module.
        num_ranks: processes.
        master_port: where they meet.
        visible_devices: CUDA_VISIBLE_DEVICES, empty where it is not set. Given a number of devices, the
            launcher would drop the variable and take the first ones of the machine.
        module: what every rank runs.
    """
    launcher = Path(sys.executable).with_name("deepspeed")
    devices = visible_devices.split(",")[:num_ranks]
    if visible_devices and all(device.isdigit() for device in devices):
        place = ["--include", f"localhost:{','.join(devices)}"]
    else:
        place = ["--num_accelerators", str(num_ranks)]
    return [
        *(sys.executable, str(launcher), "--quiet", *place),
        *("--master_addr", "127.0.0.1", "--master_port", str(master_port)),
        *("--module", module, *arguments),
    ]


def launch_training(
    arguments: Sequence[str], run_dir: Path, num_ranks: int | None, master_port: int | None
) -> int:
    """Train on this machine and return an exit code: that of RUN/outcome.json, which alone is trusted.

    SIGTERM and SIGINT are handed to the launcher and the ranks.

    Args:
        arguments: of `frepa_dist.train`.
        run_dir: the run folder, where the outcome is read.
        num_ranks: processes; None takes `default_num_ranks`.
        master_port: where they meet; None takes a free one.
    """
    # here, not at the top, so that `frepa --help` need not import torch
    import torch

    from frepa_dist.runs import OUTCOME

    if master_port is not None:
        check_port(master_port)
    ranks = num_ranks or default_num_ranks()
    outcome = run_dir / OUTCOME
    before = outcome.stat().st_mtime_ns if outcome.is_file() else None
    environment = dict(os.environ)
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        visible = ""
    port = master_port or free_port()
    try:
        code = _run(deepspeed_command(arguments, ranks, port, visible), environment)
    finally:
        _free_shared_memory(port)
    if not outcome.is_file() or outcome.stat().st_mtime_ns == before:
        return code or 1  # it ended before it owned the run folder
    said = json.loads(outcome.read_text(encoding="utf-8"))
    return 0 if said["outcome"] == "done" else int(said.get("code", 1))


def _free_shared_memory(port: int) -> None:
    """Remove what DeepSpeed's ranks on CPU leave in shared memory, some 60 MB each, however they end."""
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_*"):  # noqa: S108
        path.unlink(missing_ok=True)


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end, handing on the signals that ask to stop.

    They go to the whole group: DeepSpeed's launcher has a child that starts the ranks, and ends without it.
    """
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:

        def hand_on(received: int, _: object) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, received)

        previous = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
