"""What a suite concludes from hand-made results: who is best for sure, pairs of seeds, unseen modalities."""

from __future__ import annotations

import numpy as np
import pytest

from frepa_dist.evaluate.suite.config import SuiteConfig
from frepa_dist.evaluate.suite.panel import Panel
from frepa_dist.evaluate.suite.readings import Measured, Reading
from frepa_dist.evaluate.suite.run import Place, Results
from frepa_dist.evaluate.suite.sources import Pretraining
from frepa_dist.evaluate.suite.summary import is_unseen, summarize

NUM = 40
NOISE = np.random.default_rng(0).normal(0, 0.05, NUM)
SHAKY = np.random.default_rng(1).normal(0, 1, NUM)


def conclude(values, is_up=True, panels=True, shaky=0.0, **of_encoders):
    """Summarize a task `t`; `values` are those of each encoder's seeds, None where one failed.

    `shaky` is the standard deviation of what sets `b` apart from the others, image by image.
    """
    config = SuiteConfig.model_validate(
        {
            "output": "out",
            "num_resamples": 100,
            "num_permutations": 999,
            "encoders": [
                {"name": name, "sources": [f"{name}{n}" for n in range(len(seeds))]}
                for name, seeds in values.items()
            ],
            "tasks": [{"kind": "segment", "name": "t", "modality": "ct", "images": "i", "masks": "m"}],
        }
    )
    results = Results(pretraining={name: Pretraining() for name in values} | of_encoders)
    for name, seeds in values.items():
        for seed, value in enumerate(seeds):
            if value is not None:
                noise = NOISE + (shaky * SHAKY if name == "b" else 0)
                panel = Panel((value + noise - noise.mean())[None], np.arange(NUM)) if panels else None
                measured = Measured(value, value - 0.1, value + 0.1, is_up=is_up, panel=panel)
                results.readings[Place("t", name, seed)] = Reading({"m": measured}, None, "images")
    return summarize(config, results).tasks[0]


def test_the_best_is_marked_only_when_that_is_sure():
    assert conclude({"a": [0.5], "b": [0.6], "c": [0.4]}).best == "b"
    assert conclude({"a": [0.5], "b": [0.6], "c": [0.4]}, is_up=False).best == "c"
    assert conclude({"a": [0.5], "b": [0.6], "c": [0.4]}, is_up=None).best is None  # no direction
    assert conclude({"a": [0.5], "b": [0.6]}, panels=False).best is None  # no test
    assert conclude({"a": [0.5], "b": [0.6], "c": [0.6]}).best is None  # two alike
    assert conclude({"a": [0.5]}).best is None
    # sure over images, and not over seeds: the seeds disagree
    assert conclude({"a": [0.5, 0.5, 0.5], "b": [0.9, 0.45, 0.5]}).best is None
    over_seeds = conclude({"a": [0.5, 0.5, 0.5], "b": [0.6, 0.61, 0.59]})
    assert (over_seeds.best, over_seeds.is_best_over_seeds) == ("b", True)
    of_one = conclude({"a": [0.5, 0.5, 0.5], "b": [0.6, 0.61, 0.59], "c": [0.4]})
    assert (of_one.best, of_one.is_best_over_seeds) == ("b", False)  # who knows about c


def test_the_best_was_chosen_by_the_same_figures():
    of_two = conclude({"a": [0.5], "b": [0.6]}, shaky=0.31)
    assert 0.017 < of_two.contrasts[0].p < 0.04
    assert of_two.best == "b"
    assert conclude({"a": [0.5], "b": [0.6], "c": [0.4]}, shaky=0.31).best is None  # three pairs


def test_differences_are_paired_seed_by_seed():
    task = conclude({"a": [0.1, 0.2, 0.3], "b": [0.2, 0.3, 0.5], "c": [0.1]})
    first, other = task.contrasts
    assert first.by_seed == pytest.approx([0.1, 0.1, 0.2])
    assert first.value == pytest.approx(np.mean([0.1, 0.1, 0.2]))
    assert first.deviation == pytest.approx(np.std([0.1, 0.1, 0.2], ddof=1))
    assert first.seeds_low < 0 < first.low  # sure over images, not over three seeds
    assert (other.by_seed, other.deviation) == ([], None)  # another number of seeds
    assert first.p_holm == pytest.approx(2 * first.p)
    row = task.main_row("a")
    assert (row.mean, row.deviation) == (pytest.approx(0.2), pytest.approx(0.1))
    alone = task.main_row("c")
    assert (alone.deviation, alone.low, alone.high) == (None, pytest.approx(0), pytest.approx(0.2))


def test_a_failed_seed_leaves_the_others_paired():
    task = conclude({"a": [0.1, 0.2, None], "b": [0.2, None, 0.5]})
    (found,) = task.contrasts
    assert found.by_seed == pytest.approx([0.1])
    assert found.value == pytest.approx(0.1)  # of the seed that both have
    assert task.main_row("b").mean == pytest.approx(0.35)
    assert conclude({"a": [None], "b": [0.2]}).contrasts == []


def test_unseen_modalities():
    assert is_unseen("ct", ("ct", "mri")) is False
    assert is_unseen("ct", ("mri",)) is True
    assert is_unseen(None, ("mri",)) is is_unseen("ct", None) is None
    task = conclude({"a": [0.1], "b": [0.2]}, b=Pretraining(modalities=("fundus",), told="the config"))
    assert [task.main_row(name).is_unseen for name in "ab"] == [None, True]
