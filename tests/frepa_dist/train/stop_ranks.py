"""Started on each of two ranks by test_stop.py: a loop of steps, in which ranks are asked to stop.

python stop_ranks.py RANK FOLDER: writes FOLDER/RANK.json, the steps after which this rank stopped, by case.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from frepa_dist.train.stop import Control, stop_when_closed

NUM_STEPS = 40
CASES = (
    "signal to 0 before any step",
    "SIGUSR1 to 1",
    "both at other steps",
    "while it waits",
    "closed",
    "none",
)


@dataclass
class Pair:
    """As much of `World` as is needed."""

    size: int = 2


def ask_and_tell(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    path.touch()


def run_case(case: str, rank: int, folder: Path) -> int:
    control = Control()
    with control.listening():
        if case == "signal to 0 before any step" and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        control.join(Pair())
        stopped = -1
        for step in range(1, NUM_STEPS + 1):
            dist.barrier()  # as the gradients' reduction does
            if case == "SIGUSR1 to 1" and rank == 1 and step == 7:
                os.kill(os.getpid(), signal.SIGUSR1)
            if case == "both at other steps" and step == (3, 11)[rank]:
                os.kill(os.getpid(), signal.SIGTERM)
            if case == "while it waits" and step == 5:
                asked = folder / "asked"
                if rank == 1:
                    threading.Timer(0.1, ask_and_tell, (asked,)).start()
                while rank == 0 and not asked.exists():  # the other one is at the barrier meanwhile
                    time.sleep(0.01)
            if case == "closed" and rank == 1 and step == 2:
                reading, writing = os.pipe()
                stop_when_closed(reading, control, 1000)
                os.close(writing)
                while not control._asked:
                    time.sleep(0.01)
            if control.after_step(step):
                stopped = step
                break
        control.close()
        dist.barrier()
        return stopped


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    stops = {case: run_case(case, rank, folder) for case in CASES}
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(stops))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
