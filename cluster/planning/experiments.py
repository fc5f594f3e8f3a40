"""Simulations of a run over seeds, checkpoint intervals and numbers of GPUs, beside what formulas say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.planning.assumptions import Assumptions
from cluster.planning.caches import Storage
from cluster.planning.estimate import Estimate
from cluster.planning.reads import streams_by_node
from cluster.planning.run_facts import RunFacts
from cluster.planning.simulate import Outcome, Scenario, Spent, simulate

Floats = NDArray[np.float64]
RESAMPLINGS = 1000


class Optimum(NamedTuple):
    """A simulated optimum of the interval: seconds, and the middle 95 % of those of resampled seeds."""

    seconds: float
    low: float
    high: float


@dataclass(frozen=True)
class IntervalCurve:
    """Goodput by checkpoint interval.

    Attributes:
        intervals: (I,) seconds of training.
        goodputs: (S, I) by seed.
        optimum: where the curve is highest; None where the checkpoints are too rare to say.
    """

    intervals: Floats
    goodputs: Floats
    optimum: Optimum | None

    @property
    def means(self) -> Floats:
        """(I,)."""
        return np.asarray(self.goodputs.mean(axis=0))

    @property
    def errors(self) -> Floats:
        """(I,) standard errors of the means."""
        return np.asarray(self.goodputs.std(axis=0, ddof=1) / math.sqrt(len(self.goodputs)))


@dataclass(frozen=True)
class SizeResult:
    """A number of GPUs.

    Attributes:
        estimate: without simulation.
        outcomes: one for each seed.
        images: that each of them trained on.
    """

    estimate: Estimate
    outcomes: list[Outcome]
    images: int

    @property
    def goodputs(self) -> Floats:
        """(S,) by seed."""
        return np.array([outcome.goodput for outcome in self.outcomes])

    @property
    def rate(self) -> float:
        """Images per second, of the mean over seeds."""
        return self.images / float(np.mean([outcome.seconds for outcome in self.outcomes]))

    @property
    def shares(self) -> dict[str, float]:
        """Shares of all seeds' time by what it was spent on."""
        total = sum(outcome.seconds for outcome in self.outcomes)
        return {
            name: sum(getattr(outcome.spent, name) for outcome in self.outcomes) / total
            for name in Spent.__dataclass_fields__
        }


def create_scenario(
    facts: RunFacts, found: Estimate, assumptions: Assumptions, seconds: float, interval_steps: int
) -> Scenario:
    """A job of the steps of a run, as long as it is asked for.

    Args:
        facts: of the run.
        found: its estimate on some machines.
        assumptions: what is taken for granted.
        seconds: of training, without anything that goes wrong.
        interval_steps: between two checkpoints.
    """
    layout, checkpoints = found.layout, found.checkpoints
    step = max(found.step.device, found.step.loader)
    data, dataset, traffic = facts.config.data, facts.dataset, found.traffic
    limits = [math.inf]
    if assumptions.s3_gbit_per_second is not None:
        limits.append(assumptions.s3_gbit_per_second * 1e9 / 8)
    if assumptions.s3_requests_per_second is not None and traffic.epoch_requests:
        # each of them brings so many bytes in the mean
        requests = assumptions.s3_requests_per_second * dataset.num_prefixes
        limits.append(requests * traffic.epoch_bytes / traffic.epoch_requests)
    is_cached = facts.access == "cache"
    streams = max(streams_by_node(facts.global_batch_size, facts.num_streams, layout.nodes))
    block_bytes = streams * facts.order.block_shards * dataset.num_bytes / len(dataset.counts)
    storage = Storage(
        bytes_per_step=traffic.bytes_by_node / facts.epoch_steps,
        first_bytes=block_bytes if is_cached else 0.0,
        node_bytes_per_second=assumptions.storage_gbit_per_second * 1e9 / 8,
        all_bytes_per_second=min(limits),
        epoch_steps=facts.epoch_steps,
        seen_share=streams / facts.num_streams,
        keeps=is_cached and data.cache_bytes >= dataset.num_bytes,
        is_cached=is_cached,
    )
    return Scenario(
        steps=max(1, round(seconds / step)),
        step_seconds=step,
        checkpoint_steps=interval_steps,
        stall_seconds=checkpoints.stall_seconds,
        write_seconds=checkpoints.write_seconds,
        mtbf_seconds=checkpoints.mtbf_seconds,
        detect_seconds=assumptions.detect_seconds,
        hang_seconds=assumptions.hang_seconds,
        hang_share=assumptions.hang_share,
        restart_seconds=assumptions.restart_seconds,
        ranks=layout.ranks,
        nodes=layout.nodes,
        straggler_sigma=assumptions.straggler_sigma,
        lost_cache_share=assumptions.lost_cache_share,
        storage=storage,
    )


def run_seeds(scenario: Scenario, num_seeds: int) -> list[Outcome]:
    """Run a job with seeds from 0 on."""
    return [simulate(scenario, seed) for seed in range(num_seeds)]


def interval_steps(center_seconds: float, step_seconds: float, num: int, factor: float) -> list[int]:
    """Intervals in steps, evenly on a logarithmic scale from 1 / factor to factor times the center."""
    seconds = center_seconds * np.geomspace(1 / factor, factor, num)
    return sorted({max(1, round(each / step_seconds)) for each in seconds.tolist()})


def sweep_intervals(
    scenario: Scenario,
    steps: Sequence[int],
    num_seeds: int,
    progress: Callable[[], None] = lambda: None,
) -> IntervalCurve:
    """Simulate a job with several checkpoint intervals, every one with the same failures.

    Args:
        scenario: the job.
        steps: between checkpoints.
        num_seeds: jobs for each.
        progress: is told each interval that is done.
    """
    goodputs = []
    for every in steps:
        # whole intervals, so that the last checkpoint is no shorter than others
        total = max(1, round(scenario.steps / every)) * every
        outcomes = run_seeds(replace(scenario, checkpoint_steps=every, steps=total), num_seeds)
        goodputs.append([outcome.goodput for outcome in outcomes])
        progress()
    intervals = np.array(steps) * scenario.step_seconds
    table = np.array(goodputs).T
    return IntervalCurve(intervals, table, find_optimum(intervals, table))


def find_optimum(intervals: Floats, goodputs: Floats, seed: int = 0) -> Optimum | None:
    """Find where goodput is highest, and how far seeds leave that open.

    A / x + B x + C is fitted to what is lost, 1 / goodput, weighted toward the lowest: checkpoints cost in
    proportion to 1 / x, and failures to x. Its lowest point is at sqrt(A / B).

    Args:
        intervals: (I,) seconds.
        goodputs: (S, I) by seed.
        seed: of the resampling of seeds.

    Returns:
        None where the fit has no lowest point.
    """
    rng = np.random.default_rng(seed)
    num = len(goodputs)
    draws = rng.integers(num, size=(RESAMPLINGS, num))
    best = _lowest(intervals, (1 / goodputs).mean(axis=0))
    resampled = [_lowest(intervals, (1 / goodputs[draw]).mean(axis=0)) for draw in draws]
    if not math.isfinite(best) or not np.isfinite(resampled).all():
        return None
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Optimum(best, float(low), float(high))


def _lowest(x: Floats, y: Floats) -> float:
    near = x[np.argmin(y)]
    weight = np.exp(-(np.log(x / near) ** 2))  # of points within a factor of about 3
    terms = np.stack([1 / x, x, np.ones_like(x)], axis=1)
    a, b, _ = np.linalg.lstsq(terms * weight[:, None], y * weight, rcond=None)[0]
    return math.sqrt(a / b) if a > 0 and b > 0 else math.nan


def find_bend(results: Sequence[SizeResult], efficiency: float = 0.8) -> int | None:
    """The first number of GPUs whose images per second and GPU are below a share of the smallest's."""
    first = results[0].rate / results[0].estimate.layout.ranks
    for result in results:
        if result.rate / result.estimate.layout.ranks < efficiency * first:
            return result.estimate.layout.ranks
    return None
