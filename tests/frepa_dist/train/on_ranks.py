"""Ranks of a script, each a process of its own, without a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from cluster.launch import free_port

RANKS = 2
SECONDS = 240  # alone on two cores it takes 30
ROOT = Path(__file__).parents[3]


def run_on_ranks(script: str, *arguments: Path | str, ranks: int = RANKS) -> None:
    """Start a script of this folder on every rank; a rank that hangs or fails ends all of them.

    The last argument is a folder for what the ranks say.
    """
    port = free_port()
    environment = {
        **os.environ,
        # ninja lies beside the interpreter
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    logs = [Path(arguments[-1]) / f"log-{rank}" for rank in range(ranks)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, env=own, stdout=file, stderr=file))
        deadline = time.monotonic() + SECONDS
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() for process in processes)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):  # noqa: S108
            path.unlink(missing_ok=True)
    assert codes == [0] * ranks, "\n".join(log.read_text()[-4000:] for log in logs)
