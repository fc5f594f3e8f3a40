"""The plan of a run: everything that `frepa plan` says, as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.planning.assumptions import Assumption, Assumptions
from cluster.planning.checkpoints import young_interval
from cluster.planning.estimate import Estimate
from cluster.planning.layouts import best_by_size, best_of, cheapest, fitting_layouts
from cluster.planning.memory import STAGES, micro_batches, shown_sizes, with_layout
from cluster.planning.prices import Prices
from cluster.planning.reads import EpochReads, count_reads, touch_epoch
from cluster.planning.run_facts import RunFacts, gather_facts
from frepa_dist.config import RunConfig
from frepa_dist.models.cost import count_cost
from shards.read.order import plan_epoch

NOTES = (
    "Operations are those of matrix products, convolutions and attention, of the last step of a run, when "
    "every term is on (`frepa cost`); MFU is of these.",
    "MFU is the same at every micro-batch and on every number of GPUs: at one or two images a GPU it will be "
    "lower.",
    "Memory is weights, gradients, optimizer and buckets by DeepSpeed's formulas, and the most bytes of "
    "tensors alive; workspaces, fragmentation and the CUDA context are left to the share that is not used.",
    "Loading runs beside computing, and the slower of the two decides; communication comes on top.",
    "Failures are independent, exponential, and end the whole job, which goes on from its last checkpoint.",
)
FOLDER_NOTE = (
    "data.root is not in S3: each sample is taken to be read over the storage's network each time, without "
    "requests."
)
CACHE_NOTE = (
    "Each node fetches a shard whole, once an epoch, whichever of its ranks need it; nodes that share a "
    "stream of the order fetch the same shards."
)
RANGE_NOTE = (
    "Each sample is a request of its own, its bytes the mean of a shard's bytes: tar headers and excluded "
    "samples are counted, so it is a little too much."
)
EPOCH_NOTE = "The first epoch stands for all."
WEIGHTS_NOTE = "data.modality_weights are left out: the modalities of the assumed dataset are not known."


@dataclass(frozen=True)
class MemoryRow:
    """Memory of a GPU with a ZeRO stage and a micro-batch."""

    stage: int
    micro_batch_size: int
    parts: dict[str, int]
    fits: bool

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        config_name: of the run's config.
        facts: what does not depend on the machines.
        assumptions: what was taken for granted; `listed` the same with their basis.
        memory: on the GPUs asked for, by stage and micro-batch.
        largest: micro-batch that fits, by stage; None: none does.
        stages: estimates on the GPUs asked for, by stage.
        chosen: the best of them; its memory is counted at its own micro-batch.
        reads: of its first epoch, followed through the order of samples; None of a folder.
        by_size: the best estimate on each number of GPUs up to those asked for.
        deadline_hours: that was given.
        cheapest: layout in time; None where none is, or no deadline was given.
        young_seconds: Young's interval, beside Daly's in `chosen.checkpoints`.
        notes: how it was computed.
    """

    config_name: str
    facts: RunFacts
    assumptions: Assumptions
    listed: list[Assumption]
    memory: list[MemoryRow]
    largest: dict[int, int | None]
    stages: list[Estimate]
    chosen: Estimate
    reads: EpochReads | None
    by_size: list[Estimate]
    deadline_hours: float | None
    cheapest: Estimate | None
    young_seconds: float
    notes: list[str]


def make_plan(
    config_name: str,
    config: RunConfig,
    nodes: int,
    gpus_per_node: int,
    assumptions: Assumptions,
    listed: Sequence[Assumption],
    prices: Prices,
    deadline_hours: float | None = None,
    *,
    look: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Plan a run; some ten seconds.

    Args:
        config_name: what it is called.
        config: of the run.
        nodes: machines; with a deadline, those there are at most.
        gpus_per_node: GPUs of each.
        assumptions: what is taken for granted.
        listed: the same, to be shown.
        prices: of what is to be paid.
        deadline_hours: in which the run must end, failures included.
        look: whether to look for the dataset.
        progress: is told each thing that was done.

    Raises:
        ConfigError: the GPUs do not divide the global batch, nothing fits into memory, or the GPU lacks the
            run's precision.
        DataError: the dataset lacks what the config asks for.
    """
    ranks = nodes * gpus_per_node
    sizes = micro_batches(config.train.global_batch_size, ranks)
    assumptions.gpu.peak_flops(config.train.precision)
    facts = gather_facts(config, assumptions, look=look)
    progress("networks and data")
    limit = assumptions.gpu.memory_bytes * assumptions.usable_memory
    own_stage = config.train.zero_stage
    first = best_of(fitting_layouts(facts, nodes, gpus_per_node, assumptions, prices), own_stage)
    reads = count_epoch(facts, first)
    progress("order of samples")
    stages = fitting_layouts(facts, nodes, gpus_per_node, assumptions, prices, reads)
    chosen = best_of(stages, own_stage)
    chosen = replace(chosen, memory_bytes=count_memory(config, chosen))
    progress("memory")
    by_size = list(best_by_size(facts, nodes, gpus_per_node, assumptions, prices))
    progress("layouts")
    rows = [
        MemoryRow(stage, size, parts, sum(parts.values()) <= limit)
        for stage in STAGES
        for size in shown_sizes(sizes)
        for parts in [facts.memory.parts(stage, size, ranks)]
    ]
    checkpoints = chosen.checkpoints
    return Plan(
        config_name=config_name,
        facts=facts,
        assumptions=assumptions,
        listed=list(listed),
        memory=rows,
        largest={stage: facts.memory.largest(stage, ranks, limit) for stage in STAGES},
        stages=stages,
        chosen=chosen,
        reads=reads,
        by_size=by_size,
        deadline_hours=deadline_hours,
        cheapest=cheapest(by_size, deadline_hours) if deadline_hours is not None else None,
        young_seconds=young_interval(checkpoints.stall_seconds, checkpoints.mtbf_seconds),
        notes=_notes(facts),
    )


def count_epoch(facts: RunFacts, chosen: Estimate) -> EpochReads | None:
    """Follow the order of samples through the first epoch; None where nothing is requested."""
    if facts.access == "folder":
        return None
    dataset, layout = facts.dataset, chosen.layout
    plan = plan_epoch(
        dataset.counts, dataset.exclusions, facts.order, 0, modalities=dataset.modalities or None
    )
    workers = facts.config.data.num_workers
    touched = touch_epoch(plan, len(dataset.counts), layout.ranks, layout.micro_batch_size, workers)
    return count_reads(dataset, touched, layout.gpus_per_node, by_range=facts.access == "range")


def count_memory(config: RunConfig, chosen: Estimate) -> int:
    """Bytes of a GPU, counted at the layout itself and not on the line through two sizes."""
    layout = chosen.layout
    own = with_layout(config, stage=layout.stage, micro_batch_size=layout.micro_batch_size)
    return count_cost(own, layout.ranks).total_memory


def _notes(facts: RunFacts) -> list[str]:
    notes = [*NOTES]
    notes.append({"folder": FOLDER_NOTE, "cache": CACHE_NOTE, "range": RANGE_NOTE}[facts.access])
    if facts.access != "folder":
        notes.append(EPOCH_NOTE)
    if facts.config.data.modality_weights and not facts.dataset.is_known:
        notes.append(WEIGHTS_NOTE)
    return notes


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data; what is infinite is null."""
    facts, cost = plan.facts, plan.facts.memory.cost
    data: dict[str, Any] = {
        "config": plan.config_name,
        "parameters": cost.parameters,
        "encoder_parameters": cost.encoder_parameters,
        "flops_per_image": cost.total_flops,
        "steps": facts.steps,
        "images": facts.images,
        "epochs": facts.epochs,
        "dataset": {
            "source": facts.dataset.source,
            "is_known": facts.dataset.is_known,
            "access": facts.access,
            "images": facts.dataset.num_images,
            "bytes": facts.dataset.num_bytes,
            "shards": len(facts.dataset.counts),
            "bytes_per_image": facts.dataset.bytes_per_image,
        },
        "memory": [{**asdict(row), "total": row.total} for row in plan.memory],
        "largest_micro_batch": plan.largest,
        "stages": [estimate_as_json(found) for found in plan.stages],
        "chosen": estimate_as_json(plan.chosen),
        "reads": asdict(plan.reads) if plan.reads else None,
        "by_size": [estimate_as_json(found) for found in plan.by_size],
        "deadline_hours": plan.deadline_hours,
        "cheapest": estimate_as_json(plan.cheapest) if plan.cheapest else None,
        "young_interval_seconds": plan.young_seconds,
        "assumptions": [item._asdict() for item in plan.listed],
        "notes": plan.notes,
    }
    finite: dict[str, Any] = _finite(data)
    return finite


def estimate_as_json(found: Estimate) -> dict[str, Any]:
    """An estimate as plain data, with what follows from it."""
    return {
        **asdict(found),
        "ranks": found.layout.ranks,
        "step_seconds": found.step.total,
        "limit": found.step.limit,
        "goodput": found.goodput,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
