"""Checkpoint intervals: published values, limits, and the minimum of the complete model."""

from __future__ import annotations

import math

import pytest
from scipy.optimize import minimize_scalar

from cluster.planning.checkpoints import (
    asynchronous_seconds,
    best_interval,
    checkpoint_bytes,
    daly_interval,
    daly_seconds,
    job_mtbf_seconds,
    restart_seconds,
    young_interval,
)

MINUTE, HOUR = 60, 3600


@pytest.mark.parametrize(("mtbf", "published"), [(24 * HOUR, 117), (6 * HOUR, 57), (15 * MINUTE, 9.1)])
def test_daly_s_published_optima(mtbf, published):
    """Figures 3 to 5 of the paper: dumps of 5 minutes."""
    assert daly_interval(5 * MINUTE, mtbf) / MINUTE == pytest.approx(published, abs=0.5)


@pytest.mark.parametrize("ratio", [1e-4, 1e-3, 1e-2, 0.1, 0.5])
def test_daly_s_interval_is_where_his_complete_model_is_lowest(ratio):
    found = minimize_scalar(
        lambda log: daly_seconds(1, math.exp(log), ratio, 0.02, 1.0), bounds=(-9, 1), method="bounded"
    )
    assert daly_interval(ratio, 1.0) == pytest.approx(math.exp(found.x), rel=0.01)


def test_young_s_is_the_limit_of_rare_failures():
    assert young_interval(50, 100) == 100
    assert daly_interval(1, 1e8) == pytest.approx(young_interval(1, 1e8), rel=1e-3)
    assert daly_interval(3, 1) == 1  # a checkpoint that takes longer than twice the time between failures


def test_without_failures_only_checkpoints_cost():
    assert daly_seconds(1000, 100, 7, 50, math.inf) == pytest.approx(1070)
    assert asynchronous_seconds(1000, 100, 7, 30, 50, math.inf) == pytest.approx(1070)
    # one that is written for longer than the interval makes the next one wait
    assert asynchronous_seconds(1000, 100, 7, 150, 50, math.inf) == pytest.approx(1570)


def test_written_at_once_both_models_agree_where_failures_are_rare():
    exact = daly_seconds(1e6, 1000, 5, 60, 1e6)
    assert asynchronous_seconds(1e6, 1000, 5, 0, 60, 1e6) == pytest.approx(exact, rel=1e-6)
    later = asynchronous_seconds(1e6, 1000, 5, 200, 60, 1e6)
    assert later - exact == pytest.approx(200, rel=0.02)  # one failure, one write that was lost


def test_failures_without_end_never_end():
    assert asynchronous_seconds(1000, 100, 7, 30, 500, 400) == math.inf


def test_the_interval_is_no_shorter_than_a_write():
    assert best_interval(0.1, 5, 1e4) == daly_interval(0.1, 1e4) > 40
    assert best_interval(0.1, 100, 1e4) == 100
    assert best_interval(0.1, 5, math.inf) == math.inf


def test_rates_of_gpus_add_up():
    assert job_mtbf_seconds(50_000, 1000) == 50 * HOUR
    assert job_mtbf_seconds(None, 1000) == math.inf
    assert restart_seconds(60, 0.25, 600, 180) == 0.75 * 60 + 150 + 180


def test_bytes_of_a_checkpoint_are_those_that_were_measured():
    """BENCHMARKS.md: 2.14 GB of RetMAE with ViT-B."""
    kinds = {"student": "engine", "teacher": "ema", "teacher_critic": "plain", "auxiliary": "frozen"}
    millions = {"student": 111.91, "teacher": 85.80, "teacher_critic": 1.05, "auxiliary": 300.0}
    parameters = {name: round(1e6 * number) for name, number in millions.items()}
    trained = parameters | {"teacher": 0, "auxiliary": 0}
    assert checkpoint_bytes(kinds, parameters, trained) / 1e9 == pytest.approx(2.14, abs=0.01)
