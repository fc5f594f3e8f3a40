"""A plan as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from cluster.planning.assumptions import Assumption
from cluster.planning.estimate import Estimate
from cluster.planning.memory import STAGES
from cluster.planning.plan import Plan
from cluster.planning.prices import HOUR

GIB = 2**30


def duration(seconds: float) -> str:
    """Seconds in words that fit their size."""
    if math.isinf(seconds):
        return "never"
    for size, name in ((86400, "days"), (HOUR, "hours"), (60, "minutes"), (1, "s")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds * 1000:.3g} ms"


def amount(num_bytes: float) -> str:
    """Bytes in decimal units."""
    for size, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {name}"
    return f"{num_bytes:.0f} bytes"


def plain(value: object) -> str:
    """The value of an assumption."""
    if value is None:
        return "none"
    if isinstance(value, float | int):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
    return str(value)


def describe_layout(found: Estimate) -> str:
    """A layout in a few words."""
    layout = found.layout
    nodes = f"{layout.nodes} {'nodes' if layout.nodes > 1 else 'node'} x {layout.gpus_per_node} GPUs"
    batches = f"micro-batch {layout.micro_batch_size}, accumulation {layout.accumulation}"
    return f"{nodes}, ZeRO {layout.stage}, {batches}"


def describe_money(money: dict[str, float]) -> str:
    """Money by what it is for; empty without prices."""
    if not money:
        return ""
    parts = ", ".join(f"{name} {value:,.0f}" for name, value in money.items())
    return f"{sum(money.values()):,.0f} ({parts})"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Align columns: the first to the left, others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        yield "  " + "  ".join(cells).rstrip()


def plan_text(plan: Plan) -> str:
    """All that a plan says."""
    return "\n".join(
        [
            *_run_lines(plan),
            *_memory_lines(plan),
            *_time_lines(plan),
            *_data_lines(plan),
            *_checkpoint_lines(plan),
            *_deadline_lines(plan),
            "",
            *assumption_lines(plan.listed, plan.notes),
        ]
    )


def _run_lines(plan: Plan) -> Iterator[str]:
    facts, cost = plan.facts, plan.facts.memory.cost
    yield f"{plan.config_name} on {plan.chosen.layout.ranks} x {plan.assumptions.gpu.name}"
    yield "Computed from the config and the assumptions below, not measured."
    yield ""
    yield "Run"
    for name, number in cost.parameters.items():
        inside = f", {cost.encoder_parameters / 1e6:.1f} M of them the encoder" if name == "student" else ""
        yield f"  {name}: {number / 1e6:.2f} M parameters{inside}"
    yield (
        f"  {facts.steps:,} steps of {facts.global_batch_size:,} images, {facts.epochs:.3g} epochs; "
        f"{cost.total_flops / 1e9:,.0f} GFLOP an image, {cost.total_flops * facts.images:.3g} FLOP in all"
    )


def _memory_lines(plan: Plan) -> Iterator[str]:
    gpu, usable = plan.assumptions.gpu, plan.assumptions.usable_memory
    limit = gpu.memory_bytes * usable
    yield ""
    yield (
        f"Memory of each GPU in GiB, by ZeRO stage and micro-batch; {limit / GIB:.1f} may be used "
        f"({usable:.0%} of {gpu.memory_gb:g} GB); * does not fit"
    )
    sizes = sorted({row.micro_batch_size for row in plan.memory})
    rows = [["", *map(str, sizes), "largest that fits"]]
    for stage in STAGES:
        own = {row.micro_batch_size: row for row in plan.memory if row.stage == stage}
        cells = [f"{own[size].total / GIB:.1f}{'' if own[size].fits else '*'}" for size in sizes]
        rows.append([f"ZeRO {stage}", *cells, str(plan.largest[stage] or "none")])
    yield from table(rows)


def _time_lines(plan: Plan) -> Iterator[str]:
    chosen = plan.chosen
    yield ""
    yield "Time, at the largest micro-batch that fits"
    rows = [["", "micro-batch", "step", "compute", "communication", "run", "with failures", "goodput"]]
    rows += [
        [
            f"ZeRO {found.layout.stage}",
            str(found.layout.micro_batch_size),
            duration(found.step.total),
            duration(found.step.compute),
            duration(found.step.communication),
            duration(found.seconds),
            duration(found.expected_seconds),
            f"{found.goodput:.1%}",
        ]
        for found in plan.stages
    ]
    yield from table(rows)
    yield f"  best: {describe_layout(chosen)}; {chosen.memory_bytes / GIB:.1f} GiB of each GPU"
    yield (
        f"  {plan.facts.global_batch_size / chosen.step.total:,.0f} images/s, {chosen.gpu_hours:,.0f} "
        f"GPU-hours; limit: {chosen.step.limit} (compute {duration(chosen.step.compute)}, communication "
        f"{duration(chosen.step.communication)}, loader {duration(chosen.step.loader)}, storage "
        f"{duration(chosen.step.network)} a step)"
    )
    money = describe_money(chosen.money)
    if money:
        yield f"  cost at the given prices: {money}"


def _data_lines(plan: Plan) -> Iterator[str]:
    facts, chosen = plan.facts, plan.chosen
    dataset, traffic = facts.dataset, chosen.traffic
    yield ""
    yield f"Data ({dataset.source})"
    yield (
        f"  {dataset.num_images:,} images, {len(dataset.counts):,} shards, {amount(dataset.num_bytes)}; "
        f"{amount(dataset.bytes_per_image)} an image"
    )
    per_node = traffic.bytes_by_node / facts.epoch_steps / chosen.step.total
    together = traffic.epoch_bytes / facts.epoch_steps / chosen.step.total
    yield f"  {amount(per_node)}/s for a node, {amount(together)}/s for all, until caches hold what is read"
    if plan.reads is not None:
        reads = plan.reads
        yield (
            f"  first epoch: {amount(reads.num_bytes)} fetched, {reads.num_bytes / dataset.num_bytes:.3g} "
            f"times the dataset; {reads.requests:,} requests, {reads.index_requests:,} of them for indices; "
            f"a node touches up to {max(reads.shards_by_node):,} shards, a rank {reads.most_shards_of_rank:,}"
        )
        yield f"  run: {amount(traffic.run_bytes)} fetched, {traffic.run_requests:,.0f} requests"


def _checkpoint_lines(plan: Plan) -> Iterator[str]:
    found = plan.chosen.checkpoints
    every = plan.facts.config.train.checkpoint_every
    yield ""
    yield "Checkpoints"
    yield (
        f"  {amount(found.num_bytes)}, written in {duration(found.write_seconds)}, for which training waits "
        f"{duration(found.stall_seconds)}; a failure of the job each {duration(found.mtbf_seconds)}"
    )
    if found.interval_steps is not None:
        yield (
            f"  recommended: each {duration(found.interval_seconds)}, "
            f"train.checkpoint_every={found.interval_steps} (Young {duration(plan.young_seconds)}; no "
            "shorter than a write)"
        )
        yield f"  the config has {every}, {duration(every * plan.chosen.step.total)}"


def _deadline_lines(plan: Plan) -> Iterator[str]:
    if plan.deadline_hours is None:
        return
    yield ""
    yield f"Cheapest layout within {plan.deadline_hours:g} hours"
    found = plan.cheapest
    if found is None:
        fastest = min(plan.by_size, key=lambda each: each.expected_seconds)
        yield f"  none; the fastest takes {duration(fastest.expected_seconds)}: {describe_layout(fastest)}"
        return
    money = describe_money(found.money)
    yield (
        f"  {describe_layout(found)}: {duration(found.expected_seconds)}, {found.gpu_hours:,.0f} GPU-hours"
        + (f", {money}" if money else "")
    )


def assumption_lines(listed: Sequence[Assumption], notes: Sequence[str]) -> Iterator[str]:
    """What was assumed, a line each."""
    yield "Assumptions (--assume KEY=VALUE changes one)"
    for item in listed:
        yield f"  {item.name} = {plain(item.value)}: {item.meaning} [{item.basis}]"
    for note in notes:
        yield f"  {note}"
