"""What libraries raise where the machine failed, in words for people."""

from __future__ import annotations

import torch
import torch.distributed as dist

from shards.support.errors import EnvironmentFault, FrepaError

# of torch's allocator on the CPU, and of C++ libraries
_NO_MEMORY = ("can't allocate memory", "bad_alloc", "Cannot allocate memory")


def translate(error: Exception) -> tuple[FrepaError | None, bool]:
    """The error to show to people, None for a bug; and whether another rank's end is behind it."""
    text = " ".join(str(error).split())
    if isinstance(error, FrepaError):
        return error, False
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in text for word in _NO_MEMORY):
        fault = EnvironmentFault(
            f"out of memory ({text[:300] or type(error).__name__})",
            fix="take a smaller train.micro_batch_size (accumulation makes up for it), then resume",
        )
        return fault, False
    # of torch's DataLoader; where it comes from a signal handler, any line may raise it
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        fault = EnvironmentFault(
            f"a loader process died ({text[:300]})",
            fix="see that memory and /dev/shm are large enough, or take fewer data.num_workers, then resume",
        )
        return fault, False
    # gloo raises a RuntimeError that names its source file
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text):
        fault = EnvironmentFault(
            f"the connection to another rank is lost ({text[:300]})",
            fix="see the logs of the other ranks; `frepa resume` goes on from the last checkpoint",
        )
        return fault, True
    return None, False
