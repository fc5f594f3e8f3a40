"""How often to take a checkpoint: sizes, and the formulas of Young and Daly. Pure functions of numbers.

J. W. Young, A first order approximation to the optimum checkpoint interval, Comm. ACM 17 (1974) 530-531.
J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation
Computer Systems 22 (2006) 303-312.

delta: seconds that training stands still for a checkpoint. M: mean seconds between failures of the whole
job. tau: seconds of training between two checkpoints, delta not included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

FP32, MOMENTS = 4, 8  # bytes of a parameter


def checkpoint_bytes(
    kinds: Mapping[str, str], parameters: Mapping[str, int], trained: Mapping[str, int]
) -> int:
    """Bytes of a checkpoint, as `frepa_dist.train.checkpoint` writes it.

    Master weights and Adam's moments of what is trained, the rest of those networks and EMA teachers in fp32,
    and the student's weights once more, whole. Frozen networks are not in it.

    Args:
        kinds: of each network: engine, opponent, plain, ema or frozen.
        parameters: of each network.
        trained: those of them that an optimizer steps.
    """
    total = 0
    for name, kind in kinds.items():
        if kind in ("engine", "opponent", "plain"):
            total += FP32 * parameters[name] + MOMENTS * trained[name]
        elif kind == "ema":
            total += FP32 * parameters[name]
        if kind == "engine":
            total += FP32 * parameters[name]
    return total


def young_interval(delta: float, mtbf: float) -> float:
    """Seconds between checkpoints by Young's first-order formula."""
    return math.sqrt(2 * delta * mtbf)


def daly_interval(delta: float, mtbf: float) -> float:
    """Seconds between checkpoints by Daly's higher-order formula."""
    if delta >= 2 * mtbf:
        return mtbf
    share = delta / (2 * mtbf)
    return math.sqrt(2 * delta * mtbf) * (1 + math.sqrt(share) / 3 + share / 9) - delta


def daly_seconds(work: float, interval: float, delta: float, restart: float, mtbf: float) -> float:
    """Expected seconds of a run by Daly's complete model; failures strike restarts too.

    Args:
        work: seconds of training.
        interval: of them between two checkpoints.
        delta: seconds of a checkpoint, lost with its interval where a failure strikes it.
        restart: seconds from a failure until training goes on.
        mtbf: mean seconds between failures, exponential; infinite: none.
    """
    if math.isinf(mtbf):
        return work * (1 + delta / interval)
    return mtbf * math.exp(restart / mtbf) * math.expm1((interval + delta) / mtbf) * work / interval


def asynchronous_seconds(
    work: float, interval: float, stall: float, write: float, restart: float, mtbf: float
) -> float:
    """Expected seconds where a checkpoint is written beside training, to first order in 1 / mtbf.

    A failure costs the restart, half an interval, and the write that was not yet done. The next checkpoint
    waits for the write before it.

    Args:
        work: seconds of training.
        interval: of them between two checkpoints.
        stall: seconds that training stands still for a checkpoint.
        write: seconds from then until it can be gone back to.
        restart: seconds from a failure until training goes on.
        mtbf: mean seconds between failures.
    """
    wait = max(0.0, write - interval)
    cycle = interval + stall + wait
    lost = (restart + cycle / 2 + write) / mtbf
    return work * cycle / interval / (1 - lost) if lost < 1 else math.inf


def best_interval(stall: float, write: float, mtbf: float) -> float:
    """Seconds between checkpoints to recommend.

    Daly's, for what training stands still; no shorter than a write takes, for the next one would wait.
    Infinite where there are no failures.
    """
    if math.isinf(mtbf):
        return math.inf
    return max(daly_interval(stall, mtbf), write)


def job_mtbf_seconds(gpu_mtbf_hours: float | None, num_gpus: int) -> float:
    """Mean seconds between failures of a job: the rates of its GPUs add up."""
    return math.inf if gpu_mtbf_hours is None else gpu_mtbf_hours * 3600 / num_gpus


def restart_seconds(detect: float, hang_share: float, hang: float, restart: float) -> float:
    """Mean seconds from a failure until training goes on."""
    return (1 - hang_share) * detect + hang_share * hang + restart
