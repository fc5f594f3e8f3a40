"""What a suite says in the end: every encoder's measures over its seeds, and differences to the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from frepa_dist.evaluate.suite.config import EncoderEntry, Entry, SuiteConfig
from frepa_dist.evaluate.suite.contrasts import Contrast, find_best, find_contrasts, panel_of
from frepa_dist.evaluate.suite.panel import interval_over_units, spread_over_seeds
from frepa_dist.evaluate.suite.readings import Reading
from frepa_dist.evaluate.suite.run import Results
from shards.support.progress import Progress
from shards.support.settings import Settings


class Row(Settings):
    """A measure of an encoder.

    Attributes:
        task, encoder, measure: which.
        is_main: whether it is the task's main measure.
        is_up: whether more is better, None where neither is.
        by_seed: one for each source that gave a result.
        num_sources: how many there are.
        mean, deviation: over seeds; the deviation of a single one is not known.
        low, high: 95% interval of the mean over test images (patients), for these weights.
        unit: what that interval draws, and `num_units` how many there are, None where that is not known.
        is_unseen: whether the task's modality is none of the encoder's pretraining, None where that is not
            known.
    """

    task: str
    encoder: str
    measure: str
    is_main: bool
    is_up: bool | None
    by_seed: list[float]
    num_sources: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    unit: str
    num_units: int | None
    is_unseen: bool | None


class TaskSummary(Settings):
    """A task.

    Attributes:
        name, kind, modality: of it.
        measure: the main one, None where no encoder has a result.
        rows: of all encoders and measures.
        contrasts: of all encoders but the baseline.
        best: the encoder that is better than each other one, None where none is for sure;
            `is_best_over_seeds` says whether that holds for other seeds too, as far as intervals can tell.
    """

    name: str
    kind: str
    modality: str | None
    measure: str | None
    rows: list[Row]
    contrasts: list[Contrast]
    best: str | None
    is_best_over_seeds: bool

    def main_row(self, encoder: str) -> Row | None:
        """The main measure of an encoder."""
        return next((row for row in self.rows if row.is_main and row.encoder == encoder), None)


class Point(Settings):
    """An encoder on a curve over the number of its pretraining images."""

    task: str
    measure: str
    family: str
    encoder: str
    num_images: int
    mean: float
    deviation: float | None


class Summary(Settings):
    """All tasks; `scaling` holds the families that have several numbers of images."""

    baseline: str
    tasks: list[TaskSummary]
    scaling: list[Point]


def summarize(config: SuiteConfig, results: Results) -> Summary:
    """Put the results of a suite together."""
    tasks = []
    with Progress(len(config.tasks), "compare", unit="task") as progress:
        for task in config.tasks:
            tasks.append(_summarize_task(task, config, results))
            progress.update()
    scaling = [point for task in tasks for point in _scaling(task, config.encoders, results)]
    return Summary(baseline=config.baseline.name, tasks=tasks, scaling=scaling)


def _summarize_task(task: Entry, config: SuiteConfig, results: Results) -> TaskSummary:
    found = {entry.name: results.seeds(task.name, entry) for entry in config.encoders}
    found = {name: seeds for name, seeds in found.items() if seeds}
    main = next((reading.main for seeds in found.values() for reading in seeds.values()), None)
    rows = [
        row
        for entry in config.encoders
        if entry.name in found
        for row in _rows(task, entry, found[entry.name], config, results)
    ]
    contrasts: list[Contrast] = []
    best, is_best_over_seeds = None, False
    if main is not None:
        # reconstructions of different methods may have no measure in common
        alike = {
            name: seeds
            for name, seeds in found.items()
            if all(main in reading.measures for reading in seeds.values())
        }
        contrasts = find_contrasts(task, main, alike, config)
        found_best = find_best(main, alike, config)
        if found_best is not None:
            best, is_best_over_seeds = found_best
    return TaskSummary(
        name=task.name,
        kind=task.kind,
        modality=task.modality,
        measure=main,
        rows=rows,
        contrasts=contrasts,
        best=best,
        is_best_over_seeds=is_best_over_seeds,
    )


def _rows(
    task: Entry, entry: EncoderEntry, seeds: Mapping[int, Reading], config: SuiteConfig, results: Results
) -> list[Row]:
    readings = list(seeds.values())
    first = readings[0]
    rows = []
    for name, measured in first.measures.items():
        values = [reading.measures[name].value for reading in readings if name in reading.measures]
        spread = spread_over_seeds(values)
        low, high, panel = measured.low, measured.high, panel_of(readings, name)
        if len(values) > 1 or low is None:
            given = config.num_resamples, config.seed
            low, high = (None, None) if panel is None else interval_over_units(panel, *given)
        rows.append(
            Row(
                task=task.name,
                encoder=entry.name,
                measure=name,
                is_main=name == first.main,
                is_up=measured.is_up,
                by_seed=values,
                num_sources=len(entry.sources),
                mean=float(np.mean(values)),
                deviation=None if spread is None else spread.deviation,
                low=low,
                high=high,
                unit=first.unit,
                num_units=None if panel is None else len(np.unique(panel.groups)),
                is_unseen=is_unseen(task.modality, results.pretraining[entry.name].modalities),
            )
        )
    return rows


def is_unseen(modality: str | None, pretrained_on: Sequence[str] | None) -> bool | None:
    """Whether an encoder has seen no image of a modality in its pretraining, None where that is not known."""
    return None if modality is None or pretrained_on is None else modality not in pretrained_on


def _scaling(task: TaskSummary, encoders: Sequence[EncoderEntry], results: Results) -> list[Point]:
    """Points of families with two numbers of images or more, by family and number."""
    points = []
    for entry in encoders:
        row, num = task.main_row(entry.name), results.pretraining[entry.name].num_images
        if entry.family is not None and row is not None and num is not None:
            points.append(
                Point(
                    task=task.name,
                    measure=row.measure,
                    family=entry.family,
                    encoder=entry.name,
                    num_images=num,
                    mean=row.mean,
                    deviation=row.deviation,
                )
            )
    points.sort(key=lambda point: (point.family, point.num_images))
    families = [list(members) for _, members in groupby(points, key=lambda point: point.family)]
    return [
        point for members in families if len({point.num_images for point in members}) > 1 for point in members
    ]
