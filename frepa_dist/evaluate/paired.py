"""Which of several encoders is better: paired tests on the scores of the same test images.

Two classes and independent images: DeLong's test of the AUROC. Several classes, several images of a patient,
or another measure: patients (images) are permuted. p values are corrected by Holm over all pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from frepa_dist.evaluate.compare import Difference, delong, holm, permutation_test
from frepa_dist.evaluate.probe_result import SHOWN, Estimate, ProbeResult
from frepa_dist.evaluate.scores import measures
from shards.support.errors import DataError
from shards.support.progress import track
from shards.support.settings import Settings

Ordered = Literal["auroc", "auprc"]
"""Measures that mean the same of ranks as of scores: encoders' scores have no common unit."""


class PairedDifference(Settings):
    """What one encoder has over another.

    Attributes:
        first, second: names of the results.
        value: measure of the first minus that of the second.
        low, high: 95% interval of it, not corrected for the number of pairs.
        p: of a two-sided test that there is none.
        p_holm: corrected for all pairs.
        test: which test that is.
    """

    first: str
    second: str
    value: float
    low: float
    high: float
    p: float
    p_holm: float
    test: str

    @classmethod
    def of(cls, first: str, second: str, found: Difference, p_holm: float) -> PairedDifference:
        """Name what a test found."""
        return cls(first=first, second=second, p_holm=p_holm, **asdict(found))


class Comparison(Settings):
    """All pairs of some results.

    Attributes:
        measure: that is compared.
        images: where the test images lie.
        num_test: how many there are.
        num_units: independent ones among them: patients, or images.
        values: the measure of each, with its interval.
        pairs: every two of them.
        num_permutations: of each permutation test.
        seed: of these.
    """

    measure: Ordered
    images: str
    num_test: int
    num_units: int
    values: dict[str, Estimate]
    pairs: list[PairedDifference]
    num_permutations: int
    seed: int

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")

    def describe(self) -> str:
        """Tables for the terminal."""
        width = max(len(name) for name in self.values)
        lines = [f"{SHOWN[self.measure]}, {self.num_test} test images, {self.num_units} independent units"]
        lines += [f"{name:{width}}  {found.describe()}" for name, found in self.values.items()]
        lines.append(f"first - second, 95% interval, p, p after Holm over {len(self.pairs)} pairs")
        for pair in self.pairs:
            interval = f"[{pair.low:+.3f}, {pair.high:+.3f}]"
            lines.append(
                f"{pair.first:{width}} - {pair.second:{width}}  {pair.value:+.3f} {interval}  "
                f"p = {pair.p:.3g}, {pair.p_holm:.3g}  ({pair.test})"
            )
        return "\n".join(lines)


def run_compare(
    files: Sequence[Path], *, measure: Ordered = "auroc", num: int = 2000, seed: int = 0
) -> Comparison:
    """Compare results of `frepa evaluate probe`.

    Args:
        files: two or more, of the same test images.
        measure: that is compared.
        num: permutations of a test.
        seed: of the permutations.

    Raises:
        DataError: a file is no such result, or the test images differ.
    """
    return compare_results(
        dict(zip(_short_names(files), map(read_probe, files), strict=True)),
        measure=measure,
        num=num,
        seed=seed,
    )


def _short_names(files: Sequence[Path]) -> list[str]:
    """Names of files without what they all have in common."""
    stems = [path.stem for path in files]
    if len(set(stems)) == len(stems):
        return stems
    paths = [str(path) for path in files]
    if len(set(paths)) < len(paths):
        raise DataError("a result is named twice", where=next(p for p in paths if paths.count(p) > 1))
    return paths


def read_probe(path: Path) -> ProbeResult:
    """Read a result of `frepa evaluate probe`.

    Raises:
        DataError: it is none.
    """
    try:
        return ProbeResult.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        problem = f"{error.error_count()} wrong fields" if isinstance(error, ValidationError) else error
        raise DataError(
            f"not a result of `frepa evaluate probe`: {problem}", where=path, fix="write one with --out"
        ) from error


def compare_results(
    results: Mapping[str, ProbeResult], *, measure: Ordered = "auroc", num: int = 2000, seed: int = 0
) -> Comparison:
    """Compare every two of some results by their names.

    Raises:
        DataError: there are fewer than two, or the test images differ.
    """
    if len(results) < 2:
        raise DataError(f"{len(results)} result to compare", allowed="two or more")
    (first_name, first), *others = results.items()
    for name, other in others:
        check_same_test(first_name, first, name, other)
    _, y, groups = first.test.arrays()
    pairs = list(combinations(results, 2))
    shown = track(pairs, total=len(pairs), description="compare", unit="pair")
    found = [compare_pair(results[a], results[b], measure, num=num, seed=seed) for a, b in shown]
    corrected = holm(np.array([one.p for one in found])).tolist()
    return Comparison(
        measure=measure,
        images=first.images if first.transfer is None else first.transfer.images,
        num_test=len(y),
        num_units=len(y) if groups is None else len(np.unique(groups)),
        values={name: result.measures[measure] for name, result in results.items()},
        pairs=[
            PairedDifference.of(a, b, one, p) for (a, b), one, p in zip(pairs, found, corrected, strict=True)
        ],
        num_permutations=num,
        seed=seed,
    )


def check_same_test(first_name: str, first: ProbeResult, other_name: str, other: ProbeResult) -> None:
    """See that two results are of the same test images, with the same labels and patients.

    Raises:
        DataError: they are not.
    """
    problem = ""
    differing = set(first.test.names) ^ set(other.test.names)
    if differing:
        problem = f"{len(differing)} test images are in one of them alone, such as {min(differing)}"
    elif first.test.names != other.test.names:
        problem = "their test images are in another order"
    elif first.classes != other.classes:
        problem = f"their classes are {', '.join(first.classes)} and {', '.join(other.classes)}"
    elif first.test.y != other.test.y:
        problem = "some test images have other labels"
    elif first.test.groups != other.test.groups:
        problem = "their patients are not the same"
    if problem:
        raise DataError(
            f"{first_name} and {other_name} cannot be compared: {problem}",
            allowed="results of the same images, labels, classes and split",
            fix="probe both with the same images, options and --seed",
        )


def compare_pair(
    first: ProbeResult, second: ProbeResult, measure: Ordered, *, num: int = 2000, seed: int = 0
) -> Difference:
    """Compare two results of the same test images."""
    one, y, groups = first.test.arrays()
    other, _, _ = second.test.arrays()
    independent = groups is None or len(np.unique(groups)) == len(groups)
    if measure == "auroc" and independent and one.shape[1] == 2 and np.bincount(y).min() > 1:
        found = delong(one[:, 1], other[:, 1], y == 1)
        if not np.isnan(found.p):
            return found
    return permutation_test(one, other, y, groups, measures(one.shape[1])[measure], num=num, seed=seed)
