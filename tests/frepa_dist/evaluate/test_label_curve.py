"""Label curves: what is learned from, what is judged, what is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from frepa_dist.evaluate.label_curve import LabelCurve, run_label_curve, take_share
from frepa_dist.evaluate.label_page import write_curve
from frepa_dist.evaluate.scores import macro_auroc
from frepa_dist.evaluate.task import ProbeTask, read_parts
from shards.support.errors import ConfigError
from tests.frepa_dist.evaluate.drawn import draw_labeled


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    table = draw_labeled(folder, {"dark": 120, "light": 130}, num_patients=16, spread=60)
    return ProbeTask(images=str(folder), labels=table, num_resamples=20)


@pytest.fixture(scope="module")
def curve(task, small_encoder):
    return run_label_curve(small_encoder, task, head="knn", shares=(1.0, 0.2, 0.01), num_draws=3)


def test_rows_say_what_was_learned_and_found(curve):
    assert [row.share for row in curve.rows] == [0.01, 0.2, 1.0]
    small, some, full = curve.rows
    assert full.num_train == [curve.full.num_train]
    assert full.values["auroc"] == [curve.full.auroc.value]
    assert full.deviation("auroc") is None
    # patients have two pictures of a class: two patients are the least
    assert small.num_train == [[4, 4]] * 3
    assert all(sum(counts) < sum(curve.full.num_train) / 3 for counts in some.num_train)
    assert len(set(some.values["auroc"])) > 1
    assert some.deviation("auroc") == pytest.approx(np.std(some.values["auroc"], ddof=1))
    y = np.array(curve.full.test.y)
    for row in curve.rows:
        found = [macro_auroc(np.array(scores), y) for scores in row.scores]
        assert found == pytest.approx(row.values["auroc"])


def test_the_test_part_is_never_drawn_from(task):
    parts = read_parts(task)
    for draw in range(5):
        some = take_share(parts, 0.3, draw, seed=0)
        assert not (some.is_train & parts.is_test).any()
        assert not (some.is_train & ~parts.is_train).any()
        np.testing.assert_array_equal(some.is_test, parts.is_test)
        assert not set(some.groups) & set(parts.test_groups)


def test_table_page_and_json(curve, tmp_path):
    text = curve.describe()
    assert "1.0%           8" in text
    assert "AUROC" in text
    assert LabelCurve.model_validate(curve.as_json()) == curve
    write_curve([curve], tmp_path / "curve.html")
    page = (tmp_path / "curve.html").read_text()
    assert page.count("<svg") == len(curve.full.measures)
    assert "labels of the training part" in page
    assert "20%" in page


def test_shares_that_are_none(task, small_encoder):
    for options in ({"shares": (0.0,)}, {"shares": (1.5,)}, {"shares": ()}, {"num_draws": 0}):
        with pytest.raises(ConfigError, match="shares"):
            run_label_curve(small_encoder, task, **options)
