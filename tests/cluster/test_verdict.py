from __future__ import annotations

import pytest

from cluster.verdict import Budget, Fault, Patience, Silence, describe_hang, find_fault
from frepa_dist.heartbeats import Pulse


def pulse(count: int = 1, step: int = 1, **more: object) -> Pulse:
    return Pulse(1, count=count, step=step, **more)


def test_silence_is_counted_from_the_last_news_of_each_rank():
    silence = Silence([0, 1], max_gap_seconds=2)
    silence.hear({}, 100.0)
    silence.hear({0: pulse(1)}, 101.0)
    silence.hear({0: pulse(1), 1: pulse(1)}, 102.0)
    silence.hear({0: pulse(1), 1: pulse(1)}, 103.0)
    assert silence.longest() == (0, 2.0)
    silence.hear({0: pulse(2), 1: pulse(1)}, 104.0)
    assert silence.longest() == (1, 2.0)
    assert silence.longest(over=[1]) == (0, 0.0)
    assert silence.longest(over=[0, 1]) == (-1, 0.0)


def test_a_rank_that_never_speaks_is_silent_from_the_beginning():
    silence = Silence([0], max_gap_seconds=10)
    for now in range(5):
        silence.hear({}, now)
    assert silence.longest() == (0, 4.0)


def test_the_time_in_which_the_listener_slept_does_not_count():
    silence = Silence([0], max_gap_seconds=1)
    silence.hear({0: pulse()}, 0.0)
    silence.hear({0: pulse()}, 10_000.0)
    assert silence.longest() == (0, 1.0)


def test_any_change_is_news_also_a_count_that_begins_again():
    silence = Silence([0], max_gap_seconds=10)
    silence.hear({0: pulse(7)}, 0.0)
    silence.hear({0: pulse(1)}, 5.0)
    assert silence.longest() == (0, 0.0)


FAILED = {"state": "failed"}


@pytest.mark.parametrize(
    ("pulses", "gone", "missing", "status", "expected"),
    [
        ({0: pulse(), 1: pulse(step=7)}, [1], [], 247, ("rank 1 was killed at about step 7 (SIGKILL", 5)),
        ({0: pulse(), 1: pulse(step=7)}, [1], [], 245, ("rank 1 was killed at about step 7 (SIGSEGV)", 5)),
        ({0: pulse(step=-1)}, [0], [], None, ("rank 0 was killed before the first step", 5)),
        ({0: pulse(**FAILED, code=5, error="late"), 1: pulse(**FAILED, code=3, error="bad")}, [], [], 3,
         ("rank 1: bad", 3)),
        ({0: pulse(**FAILED, code=5, error="lost", lost_peer=True), 1: pulse()}, [1], [], 5,
         ("rank 1 was killed", 5)),
        ({0: pulse(**FAILED, code=5, error="lost", lost_peer=True)}, [], [], 5, ("rank 0: lost", 5)),
        ({}, [], [0, 1], 1, ("ranks 0, 1 did not start: no module", 1)),
        ({}, [], [0, 1], -9, ("the launcher was killed by SIGKILL", 5)),
        ({0: pulse()}, [], [], 0, ("the launcher ended (status 0)", 5)),
    ],
)  # fmt: skip
def test_the_cause_is_what_happened_first(pulses, gone, missing, status, expected):
    fault = find_fault(pulses, gone, missing, status, "no module")
    assert fault.cause.startswith(expected[0])
    assert fault.code == expected[1]
    assert fault.lost_peer == (fault.cause == "rank 0: lost")


def test_a_hang_names_the_rank_that_is_stopped_or_behind():
    pulses = {0: pulse(step=9), 1: pulse(step=8), 2: pulse(step=9)}
    assert describe_hang(2, 60, pulses, [0]).cause.startswith(
        "rank 0 hung at about step 9, stopped by a signal"
    )
    assert describe_hang(2, 60, pulses, []).cause.startswith("rank 1 hung at about step 9, behind the others")
    equal = {0: pulse(step=9), 1: pulse(step=9)}
    assert describe_hang(1, 60, equal, []).cause == "rank 1 hung at about step 9: no heartbeat for 60 s"
    assert "another node or for the network" in describe_hang(1, 60, equal, [], num_nodes=2).cause


PASSING = Fault("gone", 5)


def test_restarts_wait_longer_each_time_up_to_a_limit_and_are_counted():
    budget = Budget(Patience(max_restarts=4, backoff_seconds=2, max_backoff_seconds=10))
    assert [budget.wait_seconds(PASSING, -1) for _ in range(5)] == [2, 4, 8, 10, None]


def test_a_new_checkpoint_gives_all_back_an_old_one_nothing():
    budget = Budget(Patience(max_restarts=2, backoff_seconds=1), checkpoint_step=100)
    assert [budget.wait_seconds(PASSING, step) for step in (100, 100, 200, 200, 200)] == [1, 2, 1, 2, None]


@pytest.mark.parametrize("code", [2, 3, 4])
def test_what_will_not_pass_is_not_tried_again(code):
    assert Budget(Patience()).wait_seconds(Fault("bad", code), 0) is None


def test_a_bug_that_comes_twice_at_one_place_stays_and_one_after_progress_may_pass():
    budget, bug = Budget(Patience()), Fault("TypeError", 1)
    assert budget.wait_seconds(bug, -1) is not None
    assert budget.wait_seconds(bug, 10) is not None
    assert budget.wait_seconds(bug, 10) is None
