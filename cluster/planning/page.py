"""A plan as a page: tables, charts, and every assumption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from cluster.planning.assumptions import Assumption
from cluster.planning.charts import memory_figure, sizes_figure, step_figure
from cluster.planning.estimate import Estimate
from cluster.planning.memory import STAGES
from cluster.planning.plan import Plan
from cluster.planning.prices import HOUR
from cluster.planning.text import GIB, amount, describe_layout, describe_money, duration, plain
from shards.support.page import Page

NOT_MEASURED = (
    "Computed from the run's config and the assumptions at the end of this page. Nothing here was measured."
)
STEP_PARTS = {
    "compute": "compute",
    "communication": "communication",
    "loader": "loader",
    "storage": "network",
}


def write_plan_page(plan: Plan, path: Path) -> None:
    """Write the page.

    Raises:
        EnvironmentFault: it cannot be written.
    """
    chosen = plan.chosen
    page = Page(
        f"Plan of {plan.config_name}",
        f"{chosen.layout.ranks} x {plan.assumptions.gpu.name}, {describe_layout(chosen)}",
    )
    page.note(NOT_MEASURED)
    _add_summary(page, plan)
    _add_memory(page, plan)
    _add_time(page, plan)
    _add_data(page, plan)
    _add_checkpoints(page, plan)
    add_assumptions(page, plan.listed, plan.notes)
    page.write(path)


def _add_summary(page: Page, plan: Plan) -> None:
    facts, chosen, cost = plan.facts, plan.chosen, plan.facts.memory.cost
    page.heading("Summary")
    rows = [
        ["time, with failures and checkpoints", duration(chosen.expected_seconds)],
        ["GPU-hours", f"{chosen.gpu_hours:,.0f}"],
        ["cost at the given prices", describe_money(chosen.money) or "no price was given"],
        ["limit", chosen.step.limit],
        ["images per second", f"{facts.global_batch_size / chosen.step.total:,.0f}"],
        ["memory of each GPU", f"{chosen.memory_bytes / GIB:.1f} GiB"],
        ["run", f"{facts.steps:,} steps of {facts.global_batch_size:,} images, {facts.epochs:.3g} epochs"],
        [
            "operations",
            f"{cost.total_flops / 1e9:,.0f} GFLOP an image, {cost.total_flops * facts.images:.3g} in all",
        ],
        *([f"parameters of {name}", f"{number / 1e6:,.2f} M"] for name, number in cost.parameters.items()),
    ]
    page.table(["", ""], rows)
    if plan.deadline_hours is not None:
        found = plan.cheapest
        page.text(
            f"No layout ends within {plan.deadline_hours:g} hours."
            if found is None
            else f"Cheapest within {plan.deadline_hours:g} hours: {describe_layout(found)}; "
            f"{duration(found.expected_seconds)}, {found.gpu_hours:,.0f} GPU-hours."
        )


def _add_memory(page: Page, plan: Plan) -> None:
    page.heading("Memory")
    gpu = plan.assumptions.gpu
    limit, size = gpu.memory_bytes * plan.assumptions.usable_memory / GIB, gpu.memory_bytes / GIB
    sizes = sorted({row.micro_batch_size for row in plan.memory})
    names = list(plan.memory[0].parts)
    parts = {name: [row.parts[name] / GIB for row in plan.memory] for name in names}
    page.figure(
        memory_figure(list(map(str, sizes)), parts, [f"ZeRO {stage}" for stage in STAGES], limit, size),
        f"GiB of each of {plan.chosen.layout.ranks} GPUs by ZeRO stage and micro-batch. Solid line: what a "
        f"{gpu.name} has; dashed: what may be used of it.",
    )
    page.table(
        ["ZeRO stage", "largest micro-batch that fits"],
        [[stage, plan.largest[stage] or "none"] for stage in STAGES],
    )


def _add_time(page: Page, plan: Plan) -> None:
    page.heading("Time and cost")
    page.table(
        [
            "ZeRO",
            "micro-batch",
            "step",
            "compute",
            "communication",
            "run",
            "with failures",
            "goodput",
            "limit",
        ],
        [_time_row(found) for found in plan.stages],
    )
    if len(plan.by_size) < 2:
        return
    sizes = [found.layout.ranks for found in plan.by_size]
    hours = {
        "without failures": [found.seconds / HOUR for found in plan.by_size],
        "with failures and checkpoints": [found.expected_seconds / HOUR for found in plan.by_size],
    }
    figures = [
        (
            sizes_figure(sizes, hours, "hours", mark=plan.deadline_hours),
            "Time of the run; dashed: the deadline.",
        )
    ]
    if all(found.money for found in plan.by_size):
        money = {"": [sum(found.money.values()) for found in plan.by_size]}
        figures.append((sizes_figure(sizes, money, "cost at the given prices"), "Cost of the run."))
    else:
        spent = {"": [found.gpu_hours for found in plan.by_size]}
        figures.append((sizes_figure(sizes, spent, "GPU-hours"), "GPU-hours of the run; no price was given."))
    steps = {
        # a single GPU communicates with none: left out of a logarithmic axis
        name: [1000 * vars(found.step)[field] or math.nan for found in plan.by_size]
        for name, field in STEP_PARTS.items()
    }
    figures.append((step_figure(sizes, steps), "What could take a step's time; the highest line decides."))
    page.gallery(figures, columns=2)


def _time_row(found: Estimate) -> list[object]:
    step = found.step
    return [
        found.layout.stage,
        found.layout.micro_batch_size,
        *map(duration, (step.total, step.compute, step.communication, found.seconds, found.expected_seconds)),
        f"{found.goodput:.2%}",
        step.limit,
    ]


def _add_data(page: Page, plan: Plan) -> None:
    facts, chosen = plan.facts, plan.chosen
    dataset, traffic = facts.dataset, chosen.traffic
    per_node = traffic.bytes_by_node / facts.epoch_steps / chosen.step.total
    page.heading("Data")
    page.text(f"Dataset: {dataset.source}.")
    rows = [
        ["images", f"{dataset.num_images:,}"],
        ["shards", f"{len(dataset.counts):,}"],
        ["stored", amount(dataset.num_bytes)],
        ["a node reads", f"{amount(per_node)}/s"],
    ]
    if plan.reads is not None:
        reads = plan.reads
        rows += [
            [
                "fetched in the first epoch",
                f"{amount(reads.num_bytes)}, {reads.num_bytes / dataset.num_bytes:.3g} x",
            ],
            [
                "requests in the first epoch",
                f"{reads.requests:,}, {reads.index_requests:,} of them for indices",
            ],
            ["shards that a node touches", f"{max(reads.shards_by_node):,} at most"],
            ["shards that a rank touches", f"{reads.most_shards_of_rank:,} at most"],
            ["fetched in the run", amount(traffic.run_bytes)],
            ["requests of the run", f"{traffic.run_requests:,.0f}"],
        ]
    page.table(["", ""], rows)


def _add_checkpoints(page: Page, plan: Plan) -> None:
    found, step = plan.chosen.checkpoints, plan.chosen.step.total
    page.heading("Checkpoints")
    every = plan.facts.config.train.checkpoint_every
    rows = [
        ["size", amount(found.num_bytes)],
        ["written in", duration(found.write_seconds)],
        ["training waits", duration(found.stall_seconds)],
        ["time between failures of the job", duration(found.mtbf_seconds)],
        ["interval by Young (1974)", duration(plan.young_seconds)],
        ["recommended (Daly 2006, no shorter than a write)", duration(found.interval_seconds)],
        ["train.checkpoint_every", "any" if found.interval_steps is None else f"{found.interval_steps:,}"],
        ["the config's own", f"{every:,} steps, {duration(every * step)}"],
    ]
    page.table(["", ""], rows)


def add_assumptions(page: Page, listed: Sequence[Assumption], notes: Sequence[str]) -> None:
    """Every assumption with its basis, and how things were computed."""
    page.heading("Assumptions")
    page.table(
        ["name", "value", "what it is", "basis"],
        [[item.name, plain(item.value), item.meaning, item.basis] for item in listed],
    )
    for note in notes:
        page.text(note)
