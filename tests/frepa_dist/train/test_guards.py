"""Steps whose numbers cannot be right, on two gloo ranks: what they change, and how a run gets past them."""

from __future__ import annotations

import json

import pytest

from tests.frepa_dist.train.faulty_method import FAULTS, FOUND
from tests.frepa_dist.train.guard_steps import CASES
from tests.frepa_dist.train.test_opponent import RANKS, run_on_two_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What guard_steps.py found, by rank."""
    folder = tmp_path_factory.mktemp("steps")
    run_on_two_ranks("guard_steps.py", folder)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_a_fault_on_one_rank_changes_nothing_on_any(steps, case):
    for number, fault in enumerate(FAULTS):
        for rank, results in enumerate(steps):
            found = results[case][fault]
            assert set(found["bad"]) == FOUND[fault], "all ranks found the same"
            assert found["changed"] == [], f"{fault} changed something on rank {rank}"
            assert not found["logged"]
            faulty = fault == "critic_weight" or (rank == number % RANKS)
            assert found["own"] == (faulty and f"{fault}/loss" in ownership(fault))


def ownership(fault: str) -> set[str]:
    return {f"{fault}/loss"} if any(name.endswith("/loss") for name in FOUND[fault]) else set()


@pytest.mark.parametrize("case", CASES)
def test_the_next_step_trains_everything(steps, case):
    for results in steps:
        for fault in FAULTS:
            found = results[case][f"after {fault}"]
            assert found["bad"] == []
            assert found["still"] == []
            assert found["logged"]
