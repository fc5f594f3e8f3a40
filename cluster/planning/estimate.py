"""What a run takes on given machines: seconds, bytes, requests, money."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cluster.planning.assumptions import Assumptions
from cluster.planning.checkpoints import (
    asynchronous_seconds,
    best_interval,
    job_mtbf_seconds,
    restart_seconds,
)
from cluster.planning.memory import micro_batches
from cluster.planning.prices import HOUR, MONTH_HOURS, Prices, count_money
from cluster.planning.reads import EpochReads, fetches_of_run, streams_by_node
from cluster.planning.run_facts import RunFacts
from cluster.planning.timing import Layout, StepTime, step_time
from shards.stores.parts import PART_BYTES


@dataclass(frozen=True)
class Traffic:
    """What a run fetches.

    Attributes:
        bytes_by_node: of the busiest node in its first epoch.
        epoch_bytes: of all nodes in the first epoch.
        epoch_requests: GETs of all nodes in the first epoch; 0 of a folder.
        fetches: how often that comes over the whole run, after what caches hold.
    """

    bytes_by_node: float
    epoch_bytes: float
    epoch_requests: float
    fetches: float

    @property
    def run_bytes(self) -> float:
        """Of all nodes over the run."""
        return self.epoch_bytes * self.fetches

    @property
    def run_requests(self) -> float:
        """GETs of all nodes over the run."""
        return self.epoch_requests * self.fetches


@dataclass(frozen=True)
class CheckpointPlan:
    """How often a checkpoint is to be taken.

    Attributes:
        num_bytes: of one.
        write_seconds: until it is there.
        stall_seconds: of them training waits.
        mtbf_seconds: between failures of the job; infinite: none.
        interval_seconds: recommended; infinite without failures.
        interval_steps: the same in steps, for `train.checkpoint_every`; None without failures.
    """

    num_bytes: int
    write_seconds: float
    stall_seconds: float
    mtbf_seconds: float
    interval_seconds: float
    interval_steps: int | None


@dataclass(frozen=True)
class Estimate:
    """A run on some machines.

    Attributes:
        layout: how ranks share the work.
        memory_bytes: of each GPU.
        step: seconds of a step.
        traffic: what is fetched.
        checkpoints: how often one is taken.
        seconds: of the run without failures and checkpoints.
        expected_seconds: with both.
        gpu_hours: with both.
        money: by what it is for, of the prices that are given.
    """

    layout: Layout
    memory_bytes: int
    step: StepTime
    traffic: Traffic
    checkpoints: CheckpointPlan
    seconds: float
    expected_seconds: float
    gpu_hours: float
    money: dict[str, float]

    @property
    def goodput(self) -> float:
        """Share of the time that trains."""
        return self.seconds / self.expected_seconds


def estimate_traffic(facts: RunFacts, layout: Layout, reads: EpochReads | None = None) -> Traffic:
    """What a layout fetches: from reads that were counted, else from the streams that its nodes share."""
    dataset, data = facts.dataset, facts.config.data
    epoch_images = facts.epoch_steps * facts.global_batch_size
    if facts.access == "folder":
        num_bytes = epoch_images * dataset.bytes_per_image
        return Traffic(num_bytes / layout.nodes, num_bytes, 0, facts.epochs)
    by_range = facts.access == "range"
    streams = streams_by_node(facts.global_batch_size, facts.num_streams, layout.nodes)
    share = max(streams) / facts.num_streams
    # weights repeat shards and leave others out; a node that fetches a shard has it for its repeats
    fetches = fetches_of_run(share, facts.epochs, dataset.num_bytes, data.cache_bytes, by_range=by_range)
    if reads is not None:
        return Traffic(max(reads.bytes_by_node), reads.num_bytes, reads.requests, fetches)
    rank_streams = streams_by_node(facts.global_batch_size, facts.num_streams, layout.ranks)
    shards = len(dataset.counts)
    indices = sum(rank_streams) / facts.num_streams * shards * max(1, data.num_workers)
    if by_range:
        num_bytes = epoch_images * dataset.bytes_per_image
        return Traffic(num_bytes / layout.nodes, num_bytes, epoch_images + indices, fetches)
    parts = float(np.ceil(np.asarray(dataset.shard_bytes) / PART_BYTES).sum())
    copies = sum(streams) / facts.num_streams
    return Traffic(share * dataset.num_bytes, copies * dataset.num_bytes, copies * parts + indices, fetches)


def plan_checkpoints(
    facts: RunFacts, layout: Layout, step_seconds: float, assumptions: Assumptions
) -> CheckpointPlan:
    """How often to take a checkpoint."""
    write = facts.checkpoint_bytes / assumptions.checkpoint_bytes_per_second
    stall = write * assumptions.checkpoint_stall
    mtbf = job_mtbf_seconds(assumptions.gpu_mtbf_hours, layout.ranks)
    interval = best_interval(stall, write, mtbf)
    steps = None if math.isinf(interval) else max(1, round(interval / step_seconds))
    return CheckpointPlan(facts.checkpoint_bytes, write, stall, mtbf, interval, steps)


def mean_restart_seconds(assumptions: Assumptions) -> float:
    """Mean seconds from a failure until training goes on."""
    return restart_seconds(
        assumptions.detect_seconds,
        assumptions.hang_share,
        assumptions.hang_seconds,
        assumptions.restart_seconds,
    )


def estimate(
    facts: RunFacts,
    layout: Layout,
    assumptions: Assumptions,
    prices: Prices,
    reads: EpochReads | None = None,
) -> Estimate:
    """What a run takes with a layout.

    Raises:
        ConfigError: the GPU has no such precision, or no network between nodes that is known.
    """
    traffic = estimate_traffic(facts, layout, reads)
    step = step_time(
        facts.networks(layout.stage),
        facts.flops_per_image,
        facts.config.train.precision,
        layout,
        facts.config.data.num_workers,
        traffic.bytes_by_node / facts.epoch_steps,
        traffic.epoch_requests / facts.epoch_steps / facts.dataset.num_prefixes,
        assumptions,
    )
    seconds = facts.steps * step.total
    checkpoints = plan_checkpoints(facts, layout, step.total, assumptions)
    expected = seconds
    if checkpoints.interval_steps is not None:
        expected = asynchronous_seconds(
            seconds,
            checkpoints.interval_steps * step.total,
            checkpoints.stall_seconds,
            checkpoints.write_seconds,
            mean_restart_seconds(assumptions),
            checkpoints.mtbf_seconds,
        )
    gpu_hours = expected / HOUR * layout.ranks
    money = count_money(
        prices,
        gpu_hours=gpu_hours,
        stored_bytes=facts.dataset.num_bytes,
        months=expected / HOUR / MONTH_HOURS,
        requests=traffic.run_requests,
        fetched_bytes=traffic.run_bytes if facts.access != "folder" else 0.0,
    )
    memory = facts.memory.total(layout.stage, layout.micro_batch_size, layout.ranks)
    return Estimate(layout, memory, step, traffic, checkpoints, seconds, expected, gpu_hours, money)


def make_layout(facts: RunFacts, nodes: int, gpus_per_node: int, stage: int, micro_batch_size: int) -> Layout:
    """A layout that keeps the global batch.

    Raises:
        ConfigError: the ranks or the micro-batch do not divide it.
    """
    ranks = nodes * gpus_per_node
    assert micro_batch_size in micro_batches(facts.global_batch_size, ranks)
    return Layout(
        nodes, gpus_per_node, stage, micro_batch_size, facts.global_batch_size // ranks // micro_batch_size
    )
