"""Start training through the `deepspeed` launcher on this machine, and say how it ended."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
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


def deepspeed_command(arguments: Sequence[str], num_ranks: int, master_port: int) -> list[str]:
    """The launcher's command line for ranks on this machine."""
    launcher = Path(sys.executable).with_name("deepspeed")
    return [
        *(sys.executable, str(launcher), "--quiet"),
        *("--num_accelerators", str(num_ranks), "--master_addr", "127.0.0.1"),
        *("--master_port", str(master_port), "--module", "frepa_dist.train", *arguments),
    ]


def launch_training(
    arguments: Sequence[str], run_dir: Path, num_ranks: int | None, master_port: int | None
) -> int:
    """Train on this machine and return an exit code: that of RUN/outcome.json, which alone is trusted.

    Args:
        arguments: of `frepa_dist.train`.
        run_dir: the run folder, where the outcome is read.
        num_ranks: processes; None takes `default_num_ranks`.
        master_port: where they meet; None takes a free one.
    """
    # here, not at the top: it says so that `frepa --help` need not import torch
    from frepa_dist.runs import OUTCOME

    if master_port is not None:
        check_port(master_port)
    ranks = num_ranks or default_num_ranks()
    outcome = run_dir / OUTCOME
    outcome.unlink(missing_ok=True)
    environment = dict(os.environ)
    # DeepSpeed's kernels for CPU ranks are compiled by ninja, which lies beside this interpreter
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    import torch

    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    command = deepspeed_command(arguments, ranks, master_port or free_port())
    code = subprocess.run(command, env=environment, check=False).returncode
    if not outcome.is_file():
        return code or 1
    said = json.loads(outcome.read_text(encoding="utf-8"))
    return 0 if said["outcome"] == "done" else int(said.get("code", 1))
