"""Ranks of a script: processes of their own, forked from one that has imported what takes seconds."""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch

from cluster.launch import free_port
from tests.commands import ON_CPU

RANKS = 2
SECONDS = 240  # alone on two cores it takes 30
PRELOADED = ["frepa_dist.train.__main__", "timm", "torch._dynamo"]
ENVIRONMENT = {
    **ON_CPU,
    # ninja lies beside the interpreter
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    "OMP_NUM_THREADS": "1",
}


def run_on_ranks(script: str, *arguments: Path | str, ranks: int = RANKS) -> None:
    """Run a script of this folder on every rank; a rank that hangs or fails ends all of them.

    The last argument is a folder for what the ranks say.
    """
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "WORLD_SIZE": f"{ranks}"}
    common |= {**ENVIRONMENT, "LOCAL_SIZE": f"{ranks}"}
    command = [str(Path(__file__).with_name(script)), *map(str, arguments)]
    logs = [Path(arguments[-1]) / f"log-{rank}" for rank in range(ranks)]
    processes = [
        context.Process(
            target=_be_rank, args=(command, log, {**common, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"})
        )
        for rank, log in enumerate(logs)
    ]
    try:
        with mock.patch.object(forkserver, "connect_to_new_process", _server().connect_to_new_process):
            for process in processes:
                process.start()
        deadline = time.monotonic() + SECONDS
        while any(process.exitcode is None for process in processes):
            if any(process.exitcode for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
        for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):  # noqa: S108
            path.unlink(missing_ok=True)
    assert codes == [0] * ranks, "\n".join(log.read_text()[-4000:] for log in logs)


@functools.cache
def _server() -> forkserver.ForkServer:
    """Not the one that loaders of this process share: these workers have another environment."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        server.ensure_running()
    return server


def _be_rank(command: list[str], log: Path, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(1)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
