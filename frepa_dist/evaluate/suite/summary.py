"""What a suite says in the end: every encoder's measures over its seeds, and differences to the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from frepa_dist.evaluate.compare import Difference, holm
from frepa_dist.evaluate.suite.config import EncoderEntry, Entry, SuiteConfig
from frepa_dist.evaluate.suite.panel import (
    Panel,
    compare_panels,
    interval_over_units,
    spread_over_seeds,
    stack_panels,
)
from frepa_dist.evaluate.suite.readings import Reading
from frepa_dist.evaluate.suite.run import Results
from shards.support.progress import Progress
from shards.support.settings import Settings

LEVEL = 0.05  # of the tests that let a best encoder be marked


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


class Contrast(Settings):
    """The difference of an encoder to the baseline in a task's main measure.

    Attributes:
        task, encoder, baseline, measure: which.
        value: of the means over seeds.
        low, high: 95% interval over test images (patients), for these weights; None without image values.
        p, p_holm: of a paired test over test images; corrected for the encoders of the task.
        test: which one, or why there is none.
        by_seed: differences seed by seed, where there are as many seeds of both.
        deviation, seeds_low, seeds_high: their standard deviation, 95% interval of their mean by Student's
            t; None of less than two.
    """

    task: str
    encoder: str
    baseline: str
    measure: str
    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    test: str = "no test: the measure is not made of single images"
    by_seed: list[float]
    deviation: float | None = None
    seeds_low: float | None = None
    seeds_high: float | None = None


class TaskSummary(Settings):
    """A task.

    Attributes:
        name, kind, modality: of it.
        measure: the main one, None where no encoder has a result.
        rows: of all encoders and measures.
        contrasts: of all encoders but the baseline.
        best: the encoder that is better than each other one, None where none is for sure.
    """

    name: str
    kind: str
    modality: str | None
    measure: str | None
    rows: list[Row]
    contrasts: list[Contrast]
    best: str | None

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
    best = None
    if main is not None:
        contrasts = _contrasts(task, main, found, config)
        best = find_best(main, found, config)
    return TaskSummary(
        name=task.name,
        kind=task.kind,
        modality=task.modality,
        measure=main,
        rows=rows,
        contrasts=contrasts,
        best=best,
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
        low, high, panel = measured.low, measured.high, _panel(readings, name)
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


def _panel(readings: Sequence[Reading], measure: str) -> Panel | None:
    """All seeds on the test images, None where single images do not make the measure."""
    panels = [reading.measures[measure].panel for reading in readings if measure in reading.measures]
    known = [panel for panel in panels if panel is not None]
    return stack_panels(known) if known and len(known) == len(readings) else None


def is_unseen(modality: str | None, pretrained_on: Sequence[str] | None) -> bool | None:
    """Whether an encoder has seen no image of a modality in its pretraining, None where that is not known."""
    return None if modality is None or pretrained_on is None else modality not in pretrained_on


def _pair(
    first: Mapping[int, Reading], second: Mapping[int, Reading], config: SuiteConfig, names: tuple[str, str]
) -> tuple[list[Reading], list[Reading], bool]:
    """Readings of the same seeds where there are as many sources of both, else all; and whether it is so."""
    num = {entry.name: len(entry.sources) for entry in config.encoders}
    common = sorted(set(first) & set(second))
    if num[names[0]] == num[names[1]] and common:
        return [first[seed] for seed in common], [second[seed] for seed in common], True
    return list(first.values()), list(second.values()), False


def compare_encoders(
    main: str, found: Mapping[str, Mapping[int, Reading]], config: SuiteConfig, name: str, other: str
) -> tuple[Difference | None, list[float], float]:
    """Compare two encoders of a task.

    Returns:
        What the paired test over images says, None where none can be made; differences seed by seed, none
        where the numbers of seeds differ; the difference of the means.
    """
    first, second, is_paired = _pair(found[name], found[other], config, (name, other))
    values = [[reading.measures[main].value for reading in readings] for readings in (first, second)]
    by_seed = [a - b for a, b in zip(*values, strict=True)] if is_paired else []
    value = float(np.mean(values[0]) - np.mean(values[1]))
    panels = [_panel(readings, main) for readings in (first, second)]
    if panels[0] is None or panels[1] is None or stack_panels([panels[0], panels[1]]) is None:
        return None, by_seed, value
    tested = compare_panels(
        panels[0],
        panels[1],
        num_resamples=config.num_resamples,
        num=config.num_permutations,
        seed=config.seed,
    )
    return tested, by_seed, value


def _contrasts(
    task: Entry, main: str, found: Mapping[str, Mapping[int, Reading]], config: SuiteConfig
) -> list[Contrast]:
    baseline = config.baseline.name
    if baseline not in found:
        return []
    contrasts = []
    for name in found:
        if name == baseline:
            continue
        tested, by_seed, value = compare_encoders(main, found, config, name, baseline)
        spread = spread_over_seeds(by_seed)
        facts: dict[str, Any] = {}
        if tested is not None:
            facts = {"test": tested.test}
            if np.isfinite(tested.value):  # else no image can tell it of both
                facts |= {"low": tested.low, "high": tested.high, "p": tested.p}
                value = tested.value
        if spread is not None:
            facts |= {"deviation": spread.deviation, "seeds_low": spread.low, "seeds_high": spread.high}
        contrasts.append(
            Contrast(
                task=task.name,
                encoder=name,
                baseline=baseline,
                measure=main,
                value=value,
                by_seed=by_seed,
                **facts,
            )
        )
    return _corrected(contrasts)


def _corrected(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """Holm over those that were tested."""
    p_values = np.array([contrast.p for contrast in contrasts if contrast.p is not None], np.float64)
    corrected = iter(holm(p_values).tolist() if len(p_values) else [])
    return [
        contrast if contrast.p is None else contrast.model_copy(update={"p_holm": next(corrected)})
        for contrast in contrasts
    ]


def find_best(main: str, found: Mapping[str, Mapping[int, Reading]], config: SuiteConfig) -> str | None:
    """The encoder whose main measure is better than that of each other one, as far as that can be told.

    Each difference has to hold over test images after a correction for all pairs of encoders (Bonferroni: the
    best was chosen by the same figures), and, where there are several seeds of both, over seeds by the
    interval of Student's t.
    """
    if len(found) < 2:
        return None
    directions = {reading.measures[main].is_up for seeds in found.values() for reading in seeds.values()}
    if directions not in ({True}, {False}):
        return None
    sign = 1 if directions == {True} else -1
    means = {
        name: sign * float(np.mean([reading.measures[main].value for reading in seeds.values()]))
        for name, seeds in found.items()
    }
    best = max(means, key=means.__getitem__)
    num_pairs = len(found) * (len(found) - 1) // 2
    for other in found:
        if other == best:
            continue
        tested, by_seed, _ = compare_encoders(main, found, config, best, other)
        if tested is None or tested.p * num_pairs >= LEVEL or sign * tested.value <= 0:
            return None
        spread = spread_over_seeds([sign * gap for gap in by_seed])
        if spread is not None and spread.low <= 0:
            return None
    return best


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
