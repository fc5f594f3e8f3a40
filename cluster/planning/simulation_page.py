"""A simulation as text and as a page, with every assumption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cluster.planning.charts import interval_figure, sizes_figure, spent_figure
from cluster.planning.experiments import SizeResult
from cluster.planning.page import add_assumptions
from cluster.planning.simulation import IntervalStudy, Simulation
from cluster.planning.text import assumption_lines, describe_layout, duration, table
from shards.support.page import Page

NOT_MEASURED = "Simulated from the run's config and the assumptions below, not measured."
LOSSES = ("stragglers", "data", "checkpoints", "lost", "down")
COLUMNS = ("GPUs", "images/s", "of linear", "goodput", *LOSSES, "failures")
SOURCES = (
    "Young: A first order approximation to the optimum checkpoint interval, Comm. ACM 17 (1974). Daly: A "
    "higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer "
    "Systems 22 (2006)."
)


def simulation_text(made: Simulation) -> str:
    """All that a simulation says."""
    lines = [
        f"{made.config_name} on {made.gpu_name}: jobs of {made.days:g} days of training, {made.num_seeds} "
        "seeds",
        NOT_MEASURED,
        "",
        *table([list(COLUMNS), *size_rows(made)]),
        f"  {describe_bend(made)}",
    ]
    for study in made.studies:
        lines += ["", *_study_lines(made, study)]
    return "\n".join([*lines, "", *assumption_lines(made.assumptions, made.notes)])


def size_rows(made: Simulation) -> list[list[str]]:
    """A row for each number of GPUs, as `COLUMNS`."""
    first = made.sizes[0]
    return [
        [
            str(size.estimate.layout.ranks),
            f"{size.rate:,.0f}",
            f"{_efficiency(size, first):.0%}",
            describe_goodput(size),
            *(f"{size.shares[name]:.2%}" for name in LOSSES),
            str(sum(outcome.failures for outcome in size.outcomes)),
        ]
        for size in made.sizes
    ]


def describe_goodput(size: SizeResult) -> str:
    """Mean and standard deviation over seeds."""
    spread = f" ± {size.goodputs.std(ddof=1):.2%}" if len(size.goodputs) > 1 else ""
    return f"{size.goodputs.mean():.2%}{spread}"


def describe_bend(made: Simulation) -> str:
    """Where scaling bends, and what bends it."""
    if made.bend is None:
        return "scaling does not bend: each GPU gives at least 80 % of its share on the smallest number"
    step = next(size for size in made.sizes if size.estimate.layout.ranks == made.bend).estimate.step
    return (
        f"scaling bends at {made.bend} GPUs, where each gives less than 80 % of its share on the smallest "
        f"number; a step there takes {duration(step.compute)} to compute, {duration(step.communication)} to "
        f"communicate, and {duration(step.network)} to fetch its data from the storage"
    )


def _efficiency(size: SizeResult, first: SizeResult) -> float:
    return size.rate / first.rate * first.estimate.layout.ranks / size.estimate.layout.ranks


def _study_lines(made: Simulation, study: IntervalStudy) -> Iterator[str]:
    yield (
        f"{study.title}, {made.sizes[-1].estimate.layout.ranks} GPUs: training waits "
        f"{duration(study.scenario.stall_seconds)}, a failure each {duration(study.scenario.mtbf_seconds)}; "
        "without stragglers, data at hand"
    )
    rows = [["interval", "goodput", "standard error", study.formula_name]]
    for x, mean, error, formula in zip(
        study.curve.intervals, study.curve.means, study.curve.errors, study.formula, strict=True
    ):
        rows.append([duration(float(x)), f"{mean:.3%}", f"{error:.3%}", f"{formula:.3%}"])
    yield from table(rows)
    yield f"  {describe_optimum(study)}"


def describe_optimum(study: IntervalStudy) -> str:
    """The optima by formulas and by simulation."""
    known = f"optimum by Young {duration(study.young)}, by Daly {duration(study.daly)}"
    found = study.curve.optimum
    if found is None:
        return f"{known}; too few failures to simulate it"
    return (
        f"{known}, simulated {duration(found.seconds)} (95 % of resamplings of the seeds: "
        f"{duration(found.low)} to {duration(found.high)})"
    )


def write_simulation_page(made: Simulation, path: Path) -> None:
    """Write the page.

    Raises:
        EnvironmentFault: it cannot be written.
    """
    page = Page(
        f"Simulation of {made.config_name}",
        f"{made.gpu_name}, jobs of {made.days:g} days of training, {made.num_seeds} seeds",
    )
    page.note(NOT_MEASURED)
    page.heading("Number of GPUs")
    page.table(COLUMNS, size_rows(made))
    bend = describe_bend(made)
    page.text(f"Goodput: mean and standard deviation over seeds. {bend[0].upper()}{bend[1:]}.")
    if len(made.sizes) > 1:
        _add_sizes(page, made)
    for study in made.studies:
        _add_study(page, study)
    if made.studies:
        page.text(SOURCES)
    add_assumptions(page, made.assumptions, made.notes)
    page.write(path)


def _add_sizes(page: Page, made: Simulation) -> None:
    sizes = [size.estimate.layout.ranks for size in made.sizes]
    first = made.sizes[0]
    rates = {
        "simulated": [size.rate for size in made.sizes],
        "linear": [first.rate / sizes[0] * size for size in sizes],
    }
    names = [name for name in first.shares if name != "useful"]
    shares = {name: [size.shares[name] for size in made.sizes] for name in names}
    page.gallery(
        [
            (sizes_figure(sizes, rates, "images per second"), "What is trained on in the mean of all time."),
            (spent_figure(sizes, shares), "Where the time goes that is not useful."),
        ],
        columns=2,
    )
    page.table(
        ["GPUs", "layout", "compute", "communication", "data, cold caches", "checkpoint each"],
        [
            [
                size.estimate.layout.ranks,
                describe_layout(size.estimate),
                duration(size.estimate.step.compute),
                duration(size.estimate.step.communication),
                duration(size.estimate.step.network),
                duration(size.estimate.checkpoints.interval_seconds),
            ]
            for size in made.sizes
        ],
    )


def _add_study(page: Page, study: IntervalStudy) -> None:
    scenario, curve = study.scenario, study.curve
    page.heading(study.title)
    later = f"{duration(scenario.write_seconds)} later" if scenario.write_seconds else "at once"
    page.text(
        f"{scenario.ranks} GPUs, without stragglers and with data at hand. For a checkpoint training waits "
        f"{duration(scenario.stall_seconds)}, and it can be gone back to {later}. The job fails each "
        f"{duration(scenario.mtbf_seconds)} in the mean."
    )
    text = describe_optimum(study)
    page.text(f"{text[0].upper()}{text[1:]}.")
    x = curve.intervals.tolist()
    marks = {f"Young, {duration(study.young)}": study.young, f"Daly, {duration(study.daly)}": study.daly}
    spread = (curve.optimum.low, curve.optimum.high) if curve.optimum else None
    formulas = {study.formula_name: (study.line[0].tolist(), study.line[1].tolist())}
    page.figure(
        interval_figure(x, curve.means.tolist(), curve.errors.tolist(), formulas, marks, spread),
        "Goodput by the time between checkpoints; the same failures strike at every interval.",
    )
