"""How many threads a process computes with on the CPU, beside others on the same machine."""

from __future__ import annotations

import os

import torch


def share_cores(num_processes: int) -> None:
    """Give torch this process's part of the cores that it may use, unless `OMP_NUM_THREADS` says how many.

    More threads than cores spin while they wait for each other: two jobs of two threads each on two cores
    took 15 times as long as with one thread each (BENCHMARKS).

    Args:
        num_processes: that share the cores.
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_processes))
