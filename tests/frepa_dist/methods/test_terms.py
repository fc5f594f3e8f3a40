from __future__ import annotations

import pytest

from frepa_dist.methods.base import StepInfo
from frepa_dist.methods.terms import TermConfig, is_active, scheduled_weight


def at(step: int) -> StepInfo:
    return StepInfo(step=step, total_steps=1000, seed=0)


def test_a_warm_up_then_a_ramp_then_the_weight():
    term = TermConfig(weight=0.2, warmup_fraction=0.1, ramp_fraction=0.05)
    assert scheduled_weight(term, at(0)) == scheduled_weight(term, at(100)) == 0
    assert scheduled_weight(term, at(125)) == pytest.approx(0.1)
    assert scheduled_weight(term, at(150)) == scheduled_weight(term, at(999)) == 0.2
    assert [is_active(term, at(step)) for step in (99, 100, 999)] == [False, True, True]


def test_without_a_ramp_it_jumps_and_without_a_warm_up_it_is_there():
    sudden = TermConfig(weight=0.2, warmup_fraction=0.1)
    assert [scheduled_weight(sudden, at(step)) for step in (99, 100)] == [0, 0.2]
    assert scheduled_weight(TermConfig(), at(0)) == 1


def test_a_term_that_is_off():
    assert scheduled_weight(None, at(5)) == 0
    assert not is_active(None, at(5))
    assert not is_active(TermConfig(weight=0), at(5))
