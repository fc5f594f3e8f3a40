"""Start a script of this folder on some gloo ranks, with a deadline that fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from cluster.launch import free_port

SECONDS = 240  # alone on two cores none takes 40
ROOT = Path(__file__).parents[4]


def run_on_ranks(num_ranks: int, script: str, *arguments: object, logs: Path) -> None:
    """Run FOLDER/script on every rank; a rank that hangs or fails ends all of them.

    Args:
        num_ranks: processes.
        script: name of a script in this folder.
        arguments: for it.
        logs: folder of what the ranks print.
    """
    port = free_port()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    paths = [logs / f"{script}-{num_ranks}-{rank}.log" for rank in range(num_ranks)]
    processes = []
    try:
        for rank, path in enumerate(paths):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with path.open("a") as file:
                processes.append(subprocess.Popen(command, env=own, stdout=file, stderr=file))
        deadline = time.monotonic() + SECONDS
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):  # noqa: S108
            path.unlink(missing_ok=True)
    assert codes == [0] * num_ranks, "\n".join(path.read_text()[-4000:] for path in paths)
