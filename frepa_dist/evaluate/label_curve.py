"""Label efficiency: how well a head does that learns from 1, 5, 10 or 100 % of the training part.

The test part is the same throughout, and features are computed once. A share is drawn several times, by
class and by whole patients; what spreads over draws is the choice of labels, and what the interval of a probe
tells, the choice of test images, is beside it.

Shapes: n images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from frepa_dist.evaluate.classifiers import Classifier
from frepa_dist.evaluate.extract import Extraction
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.probe import (
    Judged,
    extract_parts,
    find_leaks,
    judge_features,
    linear_training,
    probe_result,
)
from frepa_dist.evaluate.probe_result import SHOWN, ProbeResult
from frepa_dist.evaluate.scores import Float64, measures
from frepa_dist.evaluate.splits import draw_share
from frepa_dist.evaluate.task import Parts, ProbeTask, read_parts
from shards.support.errors import ConfigError
from shards.support.progress import Progress
from shards.support.settings import Settings

SHARES = (0.01, 0.05, 0.1, 1.0)


class ShareRow(Settings):
    """A share of the training part.

    Attributes:
        share: that was asked for.
        num_train: images of each class, of each draw: patients are not cut, and two images of two patients
            are the least.
        values: of each measure, one for each draw.
        scores: (draws, n, K) of the test images, in the order of the result's `full.test`.
    """

    share: float
    num_train: list[list[int]]
    values: dict[str, list[float]]
    scores: list[list[list[float]]]

    def mean(self, name: str) -> float:
        """Mean of a measure over draws."""
        return float(np.mean(self.values[name]))

    def deviation(self, name: str) -> float | None:
        """Standard deviation of a measure over draws, None of a single one."""
        values = self.values[name]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


class LabelCurve(Settings):
    """A probe by the share of the labels it learns from.

    Attributes:
        full: the probe that learns from all of them.
        rows: one for each share, ascending.
        num_draws: of each share below 1.
    """

    full: ProbeResult
    rows: list[ShareRow] = Field(min_length=1)
    num_draws: int

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")

    def describe(self) -> str:
        """A table for the terminal."""
        names = list(self.full.measures)
        lines = [
            f"{self.full.head} head, {sum(self.full.num_test)} test images, "
            f"{self.num_draws} draws of each share; mean (standard deviation over draws)",
            f"{'labels':>7} {'images':>11}  " + "".join(f"{SHOWN[name]:>20}" for name in names),
        ]
        for row in self.rows:
            cells = []
            for name in names:
                spread = row.deviation(name)
                cells.append(f"{row.mean(name):.3f}" + ("" if spread is None else f" ({spread:.3f})"))
            line = f"{row.share:7.1%} {_images(row):>11}  "
            lines.append(line + "".join(f"{cell:>20}" for cell in cells))
        found = self.full.auroc
        lines.append(f"all labels: AUROC {found.describe()}, interval over {self.full.resampled}")
        lines.append(f"leakage: {self.full.leakage}")
        return "\n".join(lines)


def _images(row: ShareRow) -> str:
    totals = [sum(counts) for counts in row.num_train]
    low, high = min(totals), max(totals)
    return f"{low}" if low == high else f"{low} to {high}"


def run_label_curve(
    encoder: str,
    task: ProbeTask,
    *,
    head: Classifier = "logistic",
    train: Sequence[str] = (),
    shares: Sequence[float] = SHARES,
    num_draws: int = 5,
    extraction: Extraction | None = None,
    allow_leakage: bool = False,
    states: Sequence[Path] = (),
) -> LabelCurve:
    """Probe an encoder with shares of the labels.

    Args:
        encoder: see `features.SOURCES`.
        task: the images, and what is to be told; its seed is that of the draws too.
        head: a classifier of frozen features.
        train: overrides of the training of `linear`.
        shares: of the training part, in (0, 1].
        num_draws: of each share below 1.
        extraction: how features are computed.
        allow_leakage: go on where test images were in the run's pretraining data; the result says so.
        states: private folders of the builds of those data, see `leakage.check_leakage`.

    Raises:
        FrepaError: what is wrong with encoder, images, labels or shares.
    """
    if not shares or not all(0 < share <= 1 for share in shares) or num_draws < 1:
        raise ConfigError(
            "shares and draws of the labels",
            where=f"{', '.join(f'{share:g}' for share in shares) or 'none'}; {num_draws} draws",
            allowed="shares above 0 and up to 1 (100 %), one draw or more",
        )
    training = linear_training(head, train, task.seed)
    parts = read_parts(task)
    leakage = find_leaks(encoder, parts, allow_leakage, states)
    extraction = extraction or Extraction()
    loaded = load_encoder(encoder, extraction.device)
    x, test_x = extract_parts(encoder, loaded, parts, extraction)

    def judge(some: Parts) -> Judged:
        return judge_features(head, x, test_x, some, task.seed, training, silent=True)

    wanted = sorted(set(shares))
    drawn = [(share, draw) for share in wanted for draw in range(num_draws if share < 1 else 1)]
    found: dict[float, list[tuple[Parts, Float64]]] = {share: [] for share in wanted}
    everything = judge(parts)
    with Progress(len(drawn), "label curve", unit="draw") as progress:
        for share, draw in drawn:
            some = take_share(parts, share, draw, task.seed)
            found[share].append((some, (everything if share >= 1 else judge(some)).scores))
            progress.update()
    full = probe_result(loaded.name, task, parts, everything).model_copy(update={"leakage": leakage})
    return LabelCurve(
        full=full,
        rows=[share_row(share, some, task.are_grades) for share, some in found.items()],
        num_draws=num_draws,
    )


def take_share(parts: Parts, share: float, draw: int, seed: int) -> Parts:
    """The same parts with a share of what is learned from."""
    places = np.flatnonzero(parts.is_train)
    is_train = np.zeros(len(parts.is_train), bool)
    is_train[places[draw_share(parts.y, parts.groups, share, draw, seed)]] = True
    return replace(parts, is_train=is_train)


def share_row(share: float, draws: Sequence[tuple[Parts, Float64]], are_grades: bool) -> ShareRow:
    """Measure the draws of a share: of each the parts, and the scores (n, K) of the test part."""
    wanted = measures(draws[0][1].shape[1], are_grades=are_grades)
    return ShareRow(
        share=share,
        num_train=[parts.train.counts(parts.is_train) for parts, _ in draws],
        values={
            name: [measure(scores, parts.test_y) for parts, scores in draws]
            for name, measure in wanted.items()
        },
        scores=[scores.tolist() for _, scores in draws],
    )
