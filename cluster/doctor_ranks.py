"""What the doctor starts on every rank: do they meet, and how fast is an all-reduce?

The figure is the bus bandwidth, 2 (n - 1) / n bytes per byte reduced and second, which does not depend on the
number of ranks n where each link is as fast (as NCCL's tests define it).
"""

from __future__ import annotations

import json
import statistics
import time

import torch
import torch.distributed as dist

from frepa_dist.train.engines import World, process_group

REDUCED_BYTES, ROUNDS = 32 << 20, 5


def measure(world: World) -> dict[str, object]:
    """Time all-reduces of float32; all ranks must call it."""
    values = torch.ones(REDUCED_BYTES // 4, device=world.device)
    seconds = []
    for _ in range(ROUNDS + 1):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(values)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        values.fill_(1)
    each = statistics.median(seconds[1:])  # the first one opens the connections
    return {
        "all_reduce_bytes": REDUCED_BYTES,
        "bus_bytes_per_second": 2 * (world.size - 1) / world.size * REDUCED_BYTES / each,
        "backend": dist.get_backend(),
    }


def main() -> None:
    """Print the result as one line of JSON on rank 0."""
    with process_group() as world:
        found = measure(world)
        if world.is_main:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
