"""Which layouts fit into memory, and which of them is best."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.planning.assumptions import Assumptions
from cluster.planning.estimate import Estimate, estimate, make_layout
from cluster.planning.memory import STAGES
from cluster.planning.prices import HOUR, Prices
from cluster.planning.reads import EpochReads
from cluster.planning.run_facts import RunFacts
from shards.support.errors import ConfigError


def machine_sizes(max_nodes: int, gpus_per_node: int, global_batch_size: int) -> list[tuple[int, int]]:
    """Nodes and GPUs of each that divide the global batch: parts of one node, then whole nodes."""
    sizes = [(1, gpus) for gpus in range(1, gpus_per_node)] + [
        (n, gpus_per_node) for n in range(1, max_nodes + 1)
    ]
    return [(nodes, gpus) for nodes, gpus in sizes if global_batch_size % (nodes * gpus) == 0]


def fitting_layouts(
    facts: RunFacts,
    nodes: int,
    gpus_per_node: int,
    assumptions: Assumptions,
    prices: Prices,
    reads: EpochReads | None = None,
) -> list[Estimate]:
    """The largest micro-batch that fits, for each ZeRO stage in which one does.

    Raises:
        ConfigError: the ranks do not divide the global batch.
    """
    ranks = nodes * gpus_per_node
    limit = assumptions.gpu.memory_bytes * assumptions.usable_memory
    found = []
    for stage in STAGES:
        size = facts.memory.largest(stage, ranks, limit)
        if size is not None and not (stage == 3 and facts.config.train.compile):
            layout = make_layout(facts, nodes, gpus_per_node, stage, size)
            found.append(estimate(facts, layout, assumptions, prices, reads))
    return found


def best_of(estimates: list[Estimate], own_stage: int) -> Estimate:
    """The fastest; among equals the config's own ZeRO stage, then the lowest.

    Raises:
        ConfigError: there is none.
    """
    if not estimates:
        raise ConfigError(
            "not even one image a GPU fits into its memory, in no ZeRO stage",
            fix="take a larger GPU, --set method.model.activation_checkpointing=true, or "
            "train.offload_optimizer with ZeRO",
        )
    # times that differ by a thousandth are equal to a model of this kind
    fastest = min(found.expected_seconds for found in estimates)
    equal = [found for found in estimates if found.expected_seconds <= 1.001 * fastest]
    return min(equal, key=lambda found: (found.layout.stage != own_stage, found.layout.stage))


def best_by_size(
    facts: RunFacts, max_nodes: int, gpus_per_node: int, assumptions: Assumptions, prices: Prices
) -> Iterator[Estimate]:
    """The best layout on each number of GPUs up to all, where one fits."""
    for nodes, gpus in machine_sizes(max_nodes, gpus_per_node, facts.global_batch_size):
        found = fitting_layouts(facts, nodes, gpus, assumptions, prices)
        if found:
            yield best_of(found, facts.config.train.zero_stage)


def cheapest(estimates: list[Estimate], deadline_hours: float) -> Estimate | None:
    """The cheapest one in time, by money where a GPU's price is given, else by GPU-hours; None: none is."""
    in_time = [found for found in estimates if found.expected_seconds <= deadline_hours * HOUR]
    return min(in_time, key=lambda found: (_price(found), found.layout.ranks), default=None)


def _price(found: Estimate) -> float:
    return sum(found.money.values()) if "GPUs" in found.money else found.gpu_hours
