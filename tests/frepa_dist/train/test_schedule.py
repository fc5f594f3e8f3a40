from itertools import pairwise

import pytest

from frepa_dist.config import OpponentConfig, TrainConfig
from frepa_dist.train.schedule import learning_rate, opponent_learning_rate, peak_learning_rate

CONFIG = TrainConfig(
    global_batch_size=512, micro_batch_size=64, steps=100, base_learning_rate=1e-3, warmup_fraction=0.1
)


def test_the_rate_grows_with_the_batch():
    assert peak_learning_rate(CONFIG) == pytest.approx(2e-3)


def test_warm_up_is_linear_and_ends_at_the_peak():
    rates = [learning_rate(CONFIG, step, 100) for step in range(11)]
    assert rates[:10] == pytest.approx([2e-3 * (i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(2e-3)


def test_the_cosine_falls_to_the_floor():
    rates = [learning_rate(CONFIG, step, 100) for step in range(10, 100)]
    assert all(a > b for a, b in pairwise(rates))
    assert learning_rate(CONFIG, 55, 100) == pytest.approx(1e-3)
    floored = CONFIG.model_copy(update={"min_learning_rate": 1e-4})
    assert learning_rate(floored, 99, 100) > 1e-4
    assert learning_rate(floored, 99, 100) < learning_rate(CONFIG, 99, 100) + 1e-4 + 1e-9


def test_without_warm_up_it_starts_at_the_peak():
    config = CONFIG.model_copy(update={"warmup_fraction": 0.0})
    assert learning_rate(config, 0, 100) == pytest.approx(2e-3)


def test_opponents_follow_the_shape_with_a_peak_of_their_own():
    config = CONFIG.model_copy(update={"opponent": OpponentConfig(learning_rate=3e-4)})
    for step in (0, 5, 10, 50, 99):
        share = learning_rate(config, step, 100) / peak_learning_rate(config)
        assert opponent_learning_rate(config, step, 100) == pytest.approx(3e-4 * share)
    assert opponent_learning_rate(config, 10, 100) == pytest.approx(3e-4)
