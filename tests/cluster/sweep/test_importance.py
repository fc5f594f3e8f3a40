from __future__ import annotations

import numpy as np

from cluster.sweep.distributions import Distribution
from cluster.sweep.importance import encode, find_importance

SPACE = {
    "a": Distribution(loguniform=(1e-3, 1.0)),
    "b": Distribution(uniform=(0, 1)),
    "c": Distribution(choice=("x", "y")),
}


def draw(num):
    rng = np.random.default_rng(0)
    return [{key: d.draw(rng.random()) for key, d in SPACE.items()} for _ in range(num)]


def test_the_key_that_decides_is_found_and_the_others_are_not():
    points = draw(40)
    found = find_importance(SPACE, points, [np.log10(point["a"]) for point in points])
    assert next(iter(found.keys)) == "a"
    assert found.keys["a"][0] > 10 * max(found.keys["b"][0], found.keys["c"][0])
    assert found.fit > 0.8
    assert found.num_trials == 40
    assert "40 trials" in found.describe()


def test_noise_is_said_to_be_noise():
    points, rng = draw(40), np.random.default_rng(1)
    found = find_importance(SPACE, points, rng.normal(size=40))
    assert found.fit < 0.2
    assert "read nothing into" in found.describe()


def test_too_few_trials_say_nothing():
    assert find_importance(SPACE, draw(7), range(7)) is None
    assert find_importance(SPACE, draw(20), [1.0] * 20) is None


def test_settings_become_numbers():
    np.testing.assert_allclose(encode(SPACE, [{"a": 1.0, "b": 0.5, "c": "y"}]), [[0, 0.5, 1]])
