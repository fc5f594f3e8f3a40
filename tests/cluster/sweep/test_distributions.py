from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.sweep.distributions import Distribution, flatten_space

KINDS = [
    {"choice": [1, "a", None]},
    {"uniform": [-1, 2]},
    {"loguniform": [1e-5, 1e-1]},
    {"randint": [3, 7]},
]


@pytest.mark.parametrize("kind", KINDS)
@given(u=st.floats(0, 1, exclude_max=True))
def test_a_draw_lies_between_the_ends(kind, u):
    distribution = Distribution.model_validate(kind)
    value = distribution.draw(u)
    if distribution.values:
        assert value in distribution.values
    else:
        low, high = distribution.ends()
        assert low <= value <= high
        assert distribution.clip(value) == value
        assert (distribution.clip(low - 1), distribution.clip(high + 1)) == (low, high)


def test_draws_follow_their_law():
    log = Distribution(loguniform=(1e-4, 1.0))
    assert log.draw(0.5) == pytest.approx(1e-2)
    assert [Distribution(randint=(0, 3)).draw(u) for u in (0, 0.34, 0.99)] == [0, 1, 2]
    assert Distribution(choice=("a", "b")).draw(0.6) == "b"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({}, "exactly one"),
        ({"choice": [1], "uniform": [0, 1]}, "exactly one"),
        ({"grid": []}, "empty"),
        ({"choice": [1, 1]}, "twice"),
        ({"uniform": [1, 1]}, "larger"),
        ({"loguniform": [0, 1]}, "above 0"),
        ({"randint": [2, 2]}, "larger"),
        ({"normal": [0, 1]}, "normal"),
    ],
)
def test_what_is_no_distribution_is_refused(kind, said):
    with pytest.raises(ValidationError, match=said):
        Distribution.model_validate(kind)


def test_a_space_is_flat_however_it_is_written():
    nested = {"method": {"hmi": {"weight": {"uniform": [0, 1]}}}, "train.seed": {"grid": [0]}}
    assert flatten_space(nested) == {"method.hmi.weight": {"uniform": [0, 1]}, "train.seed": {"grid": [0]}}
