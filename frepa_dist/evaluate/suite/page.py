"""The page of a suite: encoders side by side, what is sure of their differences, how it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from statistics import fmean

from frepa_dist.evaluate.plots import forest_figure, share_figure
from frepa_dist.evaluate.suite.config import SuiteConfig
from frepa_dist.evaluate.suite.contrasts import LEVEL, Contrast
from frepa_dist.evaluate.suite.published import CAUTION
from frepa_dist.evaluate.suite.run import Place, Results
from frepa_dist.evaluate.suite.sections import add_task, with_spread
from frepa_dist.evaluate.suite.summary import Row, Summary, TaskSummary
from shards.support.page import Page
from shards.support.settings import dump_yaml

REPORT = "report.html"
BEST, BEST_OF_ONE = "\N{BLACK STAR}", "\N{WHITE STAR}"
ABOUT_INTERVALS = (
    "Intervals and p values are about other test images of the same kind, with exactly these trained "
    "weights: patients, or images where patients are not known, are drawn anew or swapped between two "
    "encoders. They say nothing of what another training with another seed would give. That is what the "
    "standard deviation over seeds tells (\N{PLUS-MINUS SIGN}), each seed a pretraining of its own, and the "
    "interval over seeds, which is wide for few of them. Nor do they tell anything of "
    "other hospitals, cameras or tasks."
)


def write_report(config: SuiteConfig, results: Results, summary: Summary) -> None:
    """Write the page into the output folder.

    Raises:
        EnvironmentFault: it cannot be written.
    """
    num_sources = sum(len(entry.sources) for entry in config.encoders)
    page = Page(
        config.title,
        f"{len(config.encoders)} encoders, {num_sources} trainings, {len(config.tasks)} tasks; differences "
        f"are to {summary.baseline}",
    )
    add_notes(page, config, results)
    add_summary(page, config, results, summary)
    add_differences(page, summary)
    add_unseen(page, summary)
    add_scaling(page, summary)
    for task, entry in zip(summary.tasks, config.tasks, strict=True):
        add_task(page, config, results, task, entry)
    add_method(page, config, results)
    page.write(config.output / REPORT)


def add_notes(page: Page, config: SuiteConfig, results: Results) -> None:
    """What must not be overlooked."""
    if results.failures:
        page.note(f"{len(results.failures)} results could not be had; they are listed with their reasons.")
    found = {place.encoder for place in results.readings}
    single = [e.name for e in config.encoders if len(e.sources) == 1 and e.name in found]
    if single:
        page.note(
            f"One seed of {', '.join(single)}: nothing is known of the spread of its training. A difference "
            "may be that of two seeds."
        )
    for first, second in dict.fromkeys(results.alike):
        page.note(f"A source of {second} has the weights of one of {first}: they are the same encoder.")
    if any(getattr(task, "smoke_test", False) for task in config.tasks):
        page.note(
            "Some labels are not medical: those tasks show that everything runs, and compare no methods."
        )
    if config.allow_leakage:
        page.note(
            "Test images of the pretraining data were allowed (allow_leakage); each task says what was found."
        )


def add_summary(page: Page, config: SuiteConfig, results: Results, summary: Summary) -> None:
    """The main measure of every encoder on every task."""
    page.heading("Summary")
    encoders = [(entry.name, len(entry.sources)) for entry in config.encoders]
    headers = [f"{name}, {num} seed{'s' * (num > 1)}" for name, num in encoders]
    rows = [
        [task.name, task.measure, *(_summary_cell(name, task, results, num) for name, num in encoders)]
        for task in summary.tasks
    ]
    if len(rows) < len(headers):  # as long as it has to be, rather than wide
        titles = [f"{task.name}, {task.measure}" for task in summary.tasks]
        columns = [row[2:] for row in rows]
        page.table(["encoder", *titles], list(zip(headers, *columns, strict=True)))
    else:
        page.table(["task", "measure", *headers], rows)
    page.text(
        f"Mean \N{PLUS-MINUS SIGN} standard deviation over seeds of pretraining. {BEST}: better than every "
        f"other encoder with a result in the task, over test images (p < {LEVEL:g} after correction for all "
        f"pairs of encoders, not for the number of tasks) and over seeds. {BEST_OF_ONE}: the same, but over "
        "test images alone: of these weights, and not of another seed. Without either, no encoder is the "
        "best for sure. (unseen): the encoder was pretrained on no image of the task's modality."
    )
    if results.failures:
        page.table(["could not be had", "why"], failure_rows(results))


def failure_rows(results: Results) -> list[tuple[str, str]]:
    """What failed, put together where the reason is the same."""
    rows = []
    for words in dict.fromkeys(failure.words for failure in results.failures.values()):
        seeds: dict[tuple[str, str], list[str]] = {}
        for place, failure in results.failures.items():
            if failure.words == words:
                seeds.setdefault((place.task, place.encoder), []).append(str(place.seed))
        named = [f"{task}: {name} (seed {', '.join(numbers)})" for (task, name), numbers in seeds.items()]
        rows.append(("; ".join(named), words))
    return rows


def _summary_cell(encoder: str, task: TaskSummary, results: Results, num_sources: int) -> str:
    failed = sum(Place(task.name, encoder, seed) in results.failures for seed in range(num_sources))
    row = task.main_row(encoder)
    words = [] if row is None else [with_spread(row.mean, row.deviation)]
    if row is not None and task.best == encoder:
        words.insert(0, BEST if task.is_best_over_seeds else BEST_OF_ONE)
    if row is not None and row.is_unseen:
        words.append("(unseen)")
    if failed:
        words.append("failed" if failed == num_sources else f"({failed} of {num_sources} failed)")
    return " ".join(words) or "not run"


def add_differences(page: Page, summary: Summary) -> None:
    """A forest plot for each measure, over all its tasks."""
    contrasts = [(task, found) for task in summary.tasks for found in task.contrasts if _is_judged(task)]
    if not contrasts:
        return
    page.heading(f"Differences to {summary.baseline}")
    page.text(ABOUT_INTERVALS)
    for measure in dict.fromkeys(found.measure for _, found in contrasts):
        some = [(task, found) for task, found in contrasts if found.measure == measure]
        rows = {row.is_up for task, _ in some for row in task.rows if row.is_main}
        better = "right: better" if rows == {True} else "left: better"
        figure = forest_figure(
            [f"{task.name}: {found.encoder}" for task, found in some],
            [found.value for _, found in some],
            [interval(found) for _, found in some],
            [found.by_seed for _, found in some],
            xlabel=f"difference in {measure} ({better})",
            reference=0.0,
        )
        page.figure(
            figure,
            f"{measure}, minus that of {summary.baseline}: mean over seeds with its 95% interval over test "
            "images; circles: seed by seed.",
        )


def _is_judged(task: TaskSummary) -> bool:
    return any(row.is_main and row.is_up is not None for row in task.rows)


def interval(found: Contrast) -> tuple[float, float] | None:
    """Over test images."""
    return None if found.low is None or found.high is None else (found.low, found.high)


def add_unseen(page: Page, summary: Summary) -> None:
    """Compare encoders that have seen a task's modality with those that have not."""
    rows: list[Sequence[object]] = []
    for task in summary.tasks:
        mains = [row for row in task.rows if row.is_main and row.is_up is not None]
        seen = [row for row in mains if row.is_unseen is False]
        unseen = [row for row in mains if row.is_unseen]
        if seen and unseen:
            gap = fmean(row.mean for row in seen) - fmean(row.mean for row in unseen)
            named = (_named(seen), _named(unseen))
            rows.append([task.name, task.modality, task.measure, *named, f"{gap:+.3f}"])
    if not rows:
        return
    page.heading("Modalities left out")
    page.text(
        "Encoders whose pretraining held the task's modality beside those whose pretraining did not, and the "
        "difference of the two means. Encoders that differ in more than the modality left out make more than "
        "that difference, and no test is made of it."
    )
    page.table(["task", "modality", "measure", "seen", "unseen", "seen - unseen"], rows)


def _named(rows: Sequence[Row]) -> str:
    return "; ".join(f"{row.encoder} {with_spread(row.mean, row.deviation)}" for row in rows)


def add_scaling(page: Page, summary: Summary) -> None:
    """Draw families over the number of images of their pretraining."""
    if not summary.scaling:
        return
    page.heading("Number of pretraining images")
    page.text("Lines reach one standard deviation over seeds up and down, where it is known.")
    figures = []
    for task in dict.fromkeys(point.task for point in summary.scaling):
        points = [point for point in summary.scaling if point.task == task]
        lines = {
            family: [(p.num_images, p.mean, p.deviation) for p in points if p.family == family]
            for family in dict.fromkeys(point.family for point in points)
        }
        figure = share_figure(lines, points[0].measure, xlabel="pretraining images", are_counts=True)
        figures.append((figure, task))
    page.gallery(figures, columns=2)


def add_method(page: Page, config: SuiteConfig, results: Results) -> None:
    """How all of it was measured."""
    page.heading("How it was measured")
    page.table(
        ["encoder", "sources", "family", "pretraining images", "modalities", "as told by"],
        [
            (
                entry.name,
                ", ".join(entry.sources),
                entry.family,
                "not known" if known.num_images is None else f"{known.num_images:,}",
                "not known" if known.modalities is None else ", ".join(known.modalities),
                known.told,
            )
            for entry in config.encoders
            for known in [results.pretraining[entry.name]]
        ],
    )
    page.text(
        "The encoder is frozen, unless a task says that it is fine-tuned; the head or decoder of a task is "
        "the same for all encoders, and what it chooses it chooses inside the training part. Intervals are "
        f"percentiles of {config.num_resamples:,} bootstrap draws of test patients (images where patients "
        "are not known) of the mean over seeds; of one seed they are those that its command gave."
    )
    page.text(
        f"Paired tests permute: in each of {config.num_permutations:,} draws, half of the test patients "
        "(images) change sides, with what all seeds of the two encoders gave for them at once; p is the "
        "share of draws whose difference is at least as large as the one seen, which counts too. Of an AUROC "
        "with unequal numbers of seeds, p is that of a normal distribution with the standard deviation of "
        "the bootstrap. p values are corrected by Holm for the encoders of a task, not for the number of "
        "tasks. Intervals over seeds are Student's t over the differences seed by seed."
    )
    page.text(CAUTION)
    seconds = sum(cell.seconds for cell in results.cells.values())
    page.text(
        f"All results took {seconds:,.0f} s of work together, those of earlier starts of the suite too. "
        f"frepa {version('frepa')}, torch {version('torch')}, timm {version('timm')}."
    )
    page.code(dump_yaml(config.model_dump(mode="json", exclude_none=True)), "The whole configuration.")
