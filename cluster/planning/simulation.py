"""What `frepa simulate` says, as data: goodput by number of GPUs and by checkpoint interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cluster.planning.assumptions import Assumption, Assumptions
from cluster.planning.checkpoints import asynchronous_seconds, daly_interval, daly_seconds, young_interval
from cluster.planning.estimate import mean_restart_seconds
from cluster.planning.experiments import (
    Floats,
    IntervalCurve,
    SizeResult,
    create_scenario,
    find_bend,
    interval_steps,
    run_seeds,
    sweep_intervals,
)
from cluster.planning.layouts import best_of, fitting_layouts
from cluster.planning.prices import Prices
from cluster.planning.run_facts import gather_facts
from cluster.planning.simulate import Scenario
from frepa_dist.config import RunConfig
from shards.support.errors import ConfigError

NUM_INTERVALS, INTERVAL_FACTOR = 11, 6.0
DAY = 86400
NOTES = (
    "The job takes the steps of the run, on and on, for as long as it is told to: the run itself may end "
    "sooner.",
    "Goodput is the share of the time in which steps are taken that are kept, each in the time of a step "
    "whose ranks all take their median time and find their data at hand.",
    "All ranks wait for the slowest in each step. Between two checkpoints at most 16 draws stand for all "
    "steps.",
    "Every node's cache is empty at the start; a failure may empty the failed node's.",
    "Failures strike while training, while checkpoints are written and while the job starts again. They are "
    "exponential over the whole job; GPUs do not wear out, and none is worse than others.",
)


@dataclass(frozen=True)
class IntervalStudy:
    """Goodput by checkpoint interval, without stragglers and with data at hand, beside formulas.

    Attributes:
        title: which way checkpoints are taken.
        scenario: the job; its interval is of no meaning.
        curve: simulated.
        formula_name: of the formula that must hold here.
        formula: (I,) its goodput at the simulated intervals.
        line: seconds and its goodput, closer together.
        young, daly: optimal seconds by Young and by Daly, of what training stands still.
    """

    title: str
    scenario: Scenario
    curve: IntervalCurve
    formula_name: str
    formula: Floats
    line: tuple[Floats, Floats]
    young: float
    daly: float


@dataclass(frozen=True)
class Simulation:
    """All of it.

    Attributes:
        config_name: of the run's config.
        assumptions: as listed.
        days: of training that each job takes.
        num_seeds: jobs of each kind.
        sizes: by number of GPUs, at the recommended interval.
        bend: first number of GPUs at less than 80 % of the smallest's images per second and GPU.
        studies: of the interval, on the largest number of GPUs; none without failures.
        notes: how it was simulated.
    """

    config_name: str
    assumptions: list[Assumption]
    gpu_name: str
    days: float
    num_seeds: int
    sizes: list[SizeResult]
    bend: int | None
    studies: list[IntervalStudy]
    notes: Sequence[str] = NOTES


def run_simulation(
    config_name: str,
    config: RunConfig,
    gpu_counts: Sequence[int],
    gpus_per_node: int,
    assumptions: Assumptions,
    listed: Sequence[Assumption],
    days: float,
    num_seeds: int,
    *,
    look: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Simulation:
    """Simulate a run on several numbers of GPUs, and with several checkpoint intervals on the largest.

    Args:
        config_name: what it is called.
        config: of the run.
        gpu_counts: numbers of GPUs, rising.
        gpus_per_node: of them in a node.
        assumptions: what is taken for granted.
        listed: the same, to be shown.
        days: of training that each job takes.
        num_seeds: jobs of each kind.
        look: whether to look for the dataset.
        progress: is told each part that is done.

    Raises:
        ConfigError: a number of GPUs is no whole number of nodes, or does not divide the global batch.
    """
    facts = gather_facts(config, assumptions, look=look)
    progress("networks and data")
    sizes = []
    for count in gpu_counts:
        nodes, per_node = split_nodes(count, gpus_per_node)
        found = best_of(
            fitting_layouts(facts, nodes, per_node, assumptions, Prices()), config.train.zero_stage
        )
        every = found.checkpoints.interval_steps or config.train.checkpoint_every
        scenario = create_scenario(facts, found, assumptions, days * DAY, every)
        outcomes = run_seeds(scenario, num_seeds)
        sizes.append(SizeResult(found, outcomes, scenario.steps * facts.global_batch_size))
        progress(f"{count} GPUs")
    studies = []
    last = sizes[-1].estimate
    if math.isfinite(last.checkpoints.mtbf_seconds):
        base = replace(
            create_scenario(facts, last, assumptions, days * DAY, 1), straggler_sigma=0.0, storage=None
        )
        restart = mean_restart_seconds(assumptions)
        for is_beside in (True, False):
            studies.append(study_intervals(base, restart, num_seeds, is_beside=is_beside))
            progress("checkpoint intervals")
    return Simulation(
        config_name,
        list(listed),
        assumptions.gpu.name,
        days,
        num_seeds,
        sizes,
        find_bend(sizes),
        studies,
    )


def split_nodes(count: int, gpus_per_node: int) -> tuple[int, int]:
    """Nodes, and GPUs of each.

    Raises:
        ConfigError: it is more than a node and no whole number of them.
    """
    if count <= gpus_per_node:
        return 1, count
    if count % gpus_per_node:
        raise ConfigError(f"{count} GPUs are no whole number of nodes with {gpus_per_node}", where="--gpus")
    return count // gpus_per_node, gpus_per_node


def study_intervals(base: Scenario, restart: float, num_seeds: int, *, is_beside: bool) -> IntervalStudy:
    """Simulate several intervals around the optimum.

    Args:
        base: the job, without stragglers and storage.
        restart: mean seconds from a failure until training goes on.
        num_seeds: jobs for each interval.
        is_beside: whether checkpoints are written beside training, as they are; else training stands still
            for the whole write, which is the case that Daly's model describes.
    """
    stall, write, mtbf = base.stall_seconds, base.write_seconds, base.mtbf_seconds
    if not is_beside:
        stall, write = stall + write, 0.0
    scenario = replace(base, stall_seconds=stall, write_seconds=write)
    center = max(daly_interval(stall, mtbf), write, base.step_seconds)
    steps = interval_steps(center, base.step_seconds, NUM_INTERVALS, INTERVAL_FACTOR)
    curve = sweep_intervals(scenario, steps, num_seeds)
    if is_beside:
        title, name = "Written beside training", "expected, to first order"

        def expected(x: float) -> float:
            return asynchronous_seconds(1.0, x, stall, write, restart, mtbf)
    else:
        title, name = "If training stood still for the write", "Daly's complete model (2006)"

        def expected(x: float) -> float:
            return daly_seconds(1.0, x, stall, restart, mtbf)

    closer = np.geomspace(curve.intervals[0], curve.intervals[-1], 200)
    goodput = np.vectorize(lambda x: 1 / expected(x))
    return IntervalStudy(
        title,
        scenario,
        curve,
        name,
        goodput(curve.intervals),
        (closer, goodput(closer)),
        young_interval(stall, mtbf),
        daly_interval(stall, mtbf),
    )


def simulation_as_json(made: Simulation) -> dict[str, Any]:
    """All of it as plain data."""
    return {
        "config": made.config_name,
        "gpu": made.gpu_name,
        "days": made.days,
        "seeds": made.num_seeds,
        "sizes": [
            {
                "gpus": size.estimate.layout.ranks,
                "layout": asdict(size.estimate.layout),
                "step_seconds": size.estimate.step.device,
                "images_per_second": size.rate,
                "goodput": float(size.goodputs.mean()),
                "goodput_by_seed": size.goodputs.tolist(),
                "shares": size.shares,
                "failures": sum(outcome.failures for outcome in size.outcomes),
                "checkpoint_interval_steps": size.estimate.checkpoints.interval_steps,
            }
            for size in made.sizes
        ],
        "bend_gpus": made.bend,
        "intervals": [
            {
                "title": study.title,
                "scenario": asdict(study.scenario),
                "seconds": study.curve.intervals.tolist(),
                "goodput": study.curve.means.tolist(),
                "standard_error": study.curve.errors.tolist(),
                "formula": study.formula_name,
                "formula_goodput": study.formula.tolist(),
                "young_seconds": study.young,
                "daly_seconds": study.daly,
                "simulated_optimum": study.curve.optimum._asdict() if study.curve.optimum else None,
            }
            for study in made.studies
        ],
        "assumptions": [item._asdict() for item in made.assumptions],
        "notes": list(made.notes),
    }
