"""Simulated jobs against what is known in closed form."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from cluster.planning.caches import Caches, Storage
from cluster.planning.checkpoints import asynchronous_seconds, daly_interval, daly_seconds
from cluster.planning.experiments import find_optimum, interval_steps, run_seeds, sweep_intervals
from cluster.planning.simulate import Scenario, simulate

# a step is short beside all else, as the formulas know of none
PLAIN = Scenario(
    steps=40_000,
    step_seconds=1.0,
    checkpoint_steps=200,
    stall_seconds=4.0,
    write_seconds=0.0,
    mtbf_seconds=math.inf,
)
STORAGE = Storage(
    bytes_per_step=100.0,
    first_bytes=5000.0,
    node_bytes_per_second=1000.0,
    all_bytes_per_second=math.inf,
    epoch_steps=1000,
    seen_share=1.0,
    keeps=True,
)


def test_without_failures_goodput_is_what_checkpoints_leave():
    outcome = simulate(PLAIN, 0)
    assert outcome.seconds == pytest.approx(40_000 + 200 * 4)
    assert outcome.goodput == pytest.approx(200 / 204)
    assert (outcome.spent.checkpoints, outcome.spent.lost, outcome.failures) == (pytest.approx(800), 0, 0)


def test_a_write_beside_training_costs_its_stall_and_the_last_one_is_waited_for():
    assert simulate(replace(PLAIN, write_seconds=50), 0).seconds == pytest.approx(40_800 + 50)
    # one that takes longer than the interval makes each of the others wait
    slow = simulate(replace(PLAIN, write_seconds=300), 0)
    assert slow.seconds == pytest.approx(40_000 + 200 * 4 + 199 * 100 + 300)
    assert slow.spent.total == pytest.approx(slow.seconds)


@pytest.mark.parametrize("mtbf", [500.0, 5_000.0, 50_000.0])
def test_expected_time_is_that_of_daly_s_complete_model(mtbf):
    scenario = replace(PLAIN, mtbf_seconds=mtbf, restart_seconds=30.0)
    outcomes = run_seeds(scenario, 60)
    seconds = np.array([outcome.seconds for outcome in outcomes])
    expected = daly_seconds(scenario.steps, 200, 4, 30, mtbf)
    error = seconds.std(ddof=1) / math.sqrt(len(seconds))
    assert abs(seconds.mean() - expected) < 3 * error
    assert error < 0.02 * expected  # or nothing would be held
    failures = sum(outcome.failures for outcome in outcomes)
    assert failures == pytest.approx(seconds.sum() / mtbf, abs=4 * math.sqrt(seconds.sum() / mtbf))


def test_expected_time_of_writes_beside_training():
    scenario = replace(PLAIN, mtbf_seconds=20_000, write_seconds=100, detect_seconds=20, restart_seconds=10)
    seconds = np.array([outcome.seconds for outcome in run_seeds(scenario, 150)])
    error = seconds.std(ddof=1) / math.sqrt(len(seconds))
    expected = asynchronous_seconds(scenario.steps, 200, 4, 100, 30, 20_000)
    assert abs(seconds.mean() - expected) < 3 * error
    # were the write taken to be whole at once, the formula would not hold
    assert abs(seconds.mean() - asynchronous_seconds(scenario.steps, 200, 4, 0, 30, 20_000)) > 3 * error


@pytest.fixture(scope="module")
def curve():
    mtbf, delta = 20_000.0, 10.0
    scenario = replace(PLAIN, steps=1_000_000, mtbf_seconds=mtbf, stall_seconds=delta, restart_seconds=60.0)
    steps = interval_steps(daly_interval(delta, mtbf), 1.0, 11, 5.0)
    return sweep_intervals(scenario, steps, 24)


def test_the_simulated_optimum_is_daly_s(curve):
    """Within the spread that seeds leave; that of another mean time between failures is not."""
    found = curve.optimum
    assert found.low < daly_interval(10, 20_000) < found.high
    assert not found.low < daly_interval(10, 10_000) < found.high
    assert not found.low < daly_interval(10, 40_000) < found.high


def test_the_curve_is_daly_s(curve):
    expected = np.array([1 / daly_seconds(1, x, 10, 60, 20_000) for x in curve.intervals])
    assert (np.abs(curve.means - expected) < 3.5 * curve.errors).all()


def test_an_optimum_that_is_known_is_found():
    x = np.geomspace(50, 5000, 9)
    goodput = 1 / (1 + 10 / x + x / 40_000)
    noise = np.random.default_rng(0).normal(0, 1e-4, (20, 9))
    found = find_optimum(x, goodput + noise)
    assert found.low < math.sqrt(10 * 40_000) < found.high
    assert found.high / found.low < 1.1
    assert find_optimum(x, np.tile(1 / (1 + 10 / x), (20, 1)) + noise / 1e3) is None  # without end


def test_a_seed_gives_the_same_job_and_the_same_failures_at_every_interval():
    scenario = replace(PLAIN, mtbf_seconds=3000, straggler_sigma=0.1, ranks=16)
    assert simulate(scenario, 3) == simulate(scenario, 3)
    assert simulate(scenario, 3) != simulate(scenario, 4)


def test_the_slowest_of_many_ranks_sets_the_pace():
    """The mean of the largest of W lognormal draws, by numerical integration."""
    sigma, ranks = 0.05, 64
    scenario = replace(PLAIN, straggler_sigma=sigma, ranks=ranks, checkpoint_steps=10)
    spent = simulate(scenario, 0).spent
    z = np.linspace(-8, 8, 20_001)
    density = ranks * norm.pdf(z) * norm.cdf(z) ** (ranks - 1)
    slowest = np.trapezoid(np.exp(sigma * z) * density, z)
    assert 1 + spent.stragglers / spent.useful == pytest.approx(slowest, rel=1e-3)
    # where checkpoints are far apart one draw stands for several steps
    rare = simulate(replace(scenario, checkpoint_steps=1000), 0).spent
    assert 1 + rare.stragglers / rare.useful == pytest.approx(slowest, rel=3e-3)


def test_a_hang_is_noticed_later():
    scenario = replace(PLAIN, mtbf_seconds=2000, detect_seconds=5, hang_seconds=100, hang_share=0.5)
    outcomes = run_seeds(scenario, 20)
    failures = sum(outcome.failures for outcome in outcomes)
    down = sum(outcome.spent.down for outcome in outcomes)
    assert down / failures == pytest.approx(0.5 * 5 + 0.5 * 100, rel=0.1)


def test_what_a_job_spends_adds_up():
    scenario = replace(
        PLAIN,
        mtbf_seconds=2000,
        write_seconds=30,
        detect_seconds=5,
        restart_seconds=20,
        straggler_sigma=0.1,
        ranks=64,
        nodes=8,
        lost_cache_share=1.0,
        storage=replace(STORAGE, bytes_per_step=1500.0),
    )
    spent = simulate(scenario, 0).spent
    assert spent.useful == pytest.approx(40_000)
    assert min(vars(spent).values()) > 0
    # each failure loses between nothing and an interval with the write before it
    outcome = simulate(scenario, 0)
    assert 0 < spent.lost / outcome.failures < (200 * 1.6 + 2 * 34) * 1.1


def test_a_cold_cache_slows_the_first_epoch():
    scenario = replace(PLAIN, storage=replace(STORAGE, bytes_per_step=3000.0))
    spent = simulate(scenario, 0).spent
    assert spent.data == pytest.approx(5 + 1000 * 2)  # first bytes, then 3 s a step instead of 1
    always = simulate(replace(scenario, storage=replace(scenario.storage, keeps=False)), 0).spent
    assert always.data == pytest.approx(5 + 40_000 * 2)


def test_nodes_share_the_storage_and_those_that_begin_again_are_cold():
    storage = replace(STORAGE, all_bytes_per_second=2000.0)
    caches = Caches(storage, 8)
    steps = np.array([0, 999, 1000])
    assert caches.first_seconds() == 8 * 5000 / 2000
    assert caches.step_seconds(steps).tolist() == [0.4, 0.4, 0.0]
    caches.read_up_to(500)
    assert caches.first_seconds() == 0
    assert caches.step_seconds(np.array([100, 499, 500, 999])).tolist() == [0, 0, 0.4, 0.4]
    caches.empty(3, 400)
    assert caches.first_seconds() == 5000 / 1000  # its own network
    assert caches.step_seconds(np.array([400, 500, 1000, 1399, 1400])).tolist() == [0.1, 0.4, 0.1, 0.1, 0]


def test_a_node_that_sees_a_part_of_the_shards_fills_its_cache_by_and_by():
    caches = Caches(replace(STORAGE, seen_share=0.25), 1)
    seconds = caches.step_seconds(np.array([0, 1000, 2000, 10_000]))
    assert seconds == pytest.approx(0.1 * 0.75 ** np.array([0, 1, 2, 10]))


def test_weeks_on_a_thousand_gpus_take_a_moment():
    scenario = replace(
        PLAIN,
        steps=6 * 7 * 86400,
        checkpoint_steps=300,
        write_seconds=20,
        mtbf_seconds=2 * 86400,
        restart_seconds=300,
        straggler_sigma=0.02,
        ranks=1024,
        nodes=128,
        lost_cache_share=1.0,
        storage=replace(STORAGE, keeps=False),
    )
    outcome = simulate(scenario, 0)
    assert 10 < outcome.failures < 40
    assert 0.9 < outcome.goodput < 0.95
