"""Differences between the encoders of a suite: paired by test image, and seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from frepa_dist.evaluate.compare import Difference, holm
from frepa_dist.evaluate.suite.config import Entry, SuiteConfig
from frepa_dist.evaluate.suite.panel import Panel, compare_panels, spread_over_seeds, stack_panels
from frepa_dist.evaluate.suite.readings import Reading
from shards.support.settings import Settings

LEVEL = 0.05  # of the tests that let a best encoder be marked
Seeds = Mapping[int, Reading]
"""What the sources of an encoder gave, by their number."""


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


def panel_of(readings: Sequence[Reading], measure: str) -> Panel | None:
    """All seeds on the test images, None where single images do not make the measure."""
    panels = [reading.measures[measure].panel for reading in readings if measure in reading.measures]
    known = [panel for panel in panels if panel is not None]
    return stack_panels(known) if known and len(known) == len(readings) else None


def _pair(
    first: Seeds, second: Seeds, config: SuiteConfig, names: tuple[str, str]
) -> tuple[list[Reading], list[Reading], bool]:
    """Readings of the same seeds where there are as many sources of both, else all; and whether it is so."""
    num = {entry.name: len(entry.sources) for entry in config.encoders}
    common = sorted(set(first) & set(second))
    if num[names[0]] == num[names[1]] and common:
        return [first[seed] for seed in common], [second[seed] for seed in common], True
    return list(first.values()), list(second.values()), False


def compare_encoders(
    main: str, found: Mapping[str, Seeds], config: SuiteConfig, name: str, other: str
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
    panels = [panel_of(readings, main) for readings in (first, second)]
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


def find_contrasts(task: Entry, main: str, found: Mapping[str, Seeds], config: SuiteConfig) -> list[Contrast]:
    """Compare every encoder with the baseline, where that has a result."""
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
                facts |= {"low": tested.low, "high": tested.high}
                facts |= {"p": tested.p} if np.isfinite(tested.p) else {}
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


def find_best(main: str, found: Mapping[str, Seeds], config: SuiteConfig) -> tuple[str, bool] | None:
    """The encoder whose main measure is better than that of each other one, as far as that can be told.

    Each difference has to hold over test images after a correction for all pairs of encoders (Bonferroni: the
    best was chosen by the same figures), and, where there are several seeds of both, over seeds by the
    interval of Student's t.

    Returns:
        The encoder, and whether each difference was judged over seeds too; None where none is the best.
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
    is_over_seeds = True
    for other in found:
        if other == best:
            continue
        tested, by_seed, _ = compare_encoders(main, found, config, best, other)
        if tested is None or not (tested.p * num_pairs < LEVEL and sign * tested.value > 0):
            return None
        spread = spread_over_seeds([sign * gap for gap in by_seed])
        if spread is None:
            is_over_seeds = False
        elif spread.low <= 0:
            return None
    return best, is_over_seeds
