"""Steps whose numbers cannot be right, on two gloo ranks: what they change, and how a run gets past them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from frepa_dist.config import GuardConfig
from frepa_dist.runs import EVENTS, find_checkpoint, read_json_lines, read_metrics
from frepa_dist.train.engines import World
from frepa_dist.train.guards import Reading
from frepa_dist.train.ledger import Ledger, Watch, read_keys, spike_limit
from tests.frepa_dist.train.faulty_method import FAULTS, FOUND
from tests.frepa_dist.train.guard_runs import BATCHES_PER_EPOCH, LAST_GOOD, STEPS, place_of
from tests.frepa_dist.train.guard_steps import CASES
from tests.frepa_dist.train.on_ranks import RANKS, run_on_ranks
from tests.frepa_dist.train.test_opponent import all_tensors

AT_ONCE = 5  # pairs of runs by the same processes

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What guard_steps.py found, by rank."""
    folder = tmp_path_factory.mktemp("steps")
    run_on_ranks("guard_steps.py", folder)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_a_fault_on_one_rank_changes_nothing_on_any(steps, case):
    for number, fault in enumerate(FAULTS):
        for rank, results in enumerate(steps):
            found = results[case][fault]
            assert set(found["bad"]) == FOUND[fault], "all ranks found the same"
            assert found["changed"] == [], f"{fault} changed something on rank {rank}"
            assert not found["logged"]
            is_where = fault == "critic_weight" or rank == number % RANKS
            assert found["own"] == (is_where and any(name.endswith("/loss") for name in FOUND[fault]))


@pytest.mark.parametrize("case", CASES)
def test_the_next_step_trains_everything(steps, case):
    for results in steps:
        for fault in FAULTS:
            found = results[case][f"after {fault}"]
            assert found["bad"] == []
            assert found["still"] == []
            assert found["logged"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_dataset):
    """Folder of the runs of guard_runs.py."""
    folder = tmp_path_factory.mktemp("runs")
    run_on_ranks("guard_runs.py", small_dataset, Path("0"), Path("0"), folder)
    return folder


def events(run, name):
    return [event for event in read_json_lines(run / "events.jsonl") if event["event"] == name]


def assert_same_end(one, other):
    """Weights, moments, teacher, critic and method state, bit for bit."""
    ours, theirs = (all_tensors(find_checkpoint(run)) for run in (one, other))
    assert ours.keys() == theirs.keys()
    assert any("/ema/" in name for name in ours)
    assert any("exp_avg" in name for name in ours)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def losses(run):
    return {record["step"]: record["loss"] for record in read_metrics(run) if "loss" in record}


def test_a_skipped_batch_leaves_the_run_as_one_without_it(runs):
    assert_same_end(runs / "transient", runs / "without")
    assert losses(runs / "transient") == losses(runs / "without")
    assert sorted(losses(runs / "without")) == [1, 2, *range(4, STEPS + 1)]


def test_a_skipped_step_is_written_down_with_its_samples(runs):
    (event,) = events(runs / "transient", "step_skipped")
    assert (event["step"], event["epoch"], event["batch"]) == (3, *place_of(3))
    assert event["not_finite"] == ["student/gradient"]
    assert sorted(event["keys"]) == sorted(read_keys(runs / "transient")[3][1])
    counted = {record["step"]: record["guard/skipped"] for record in read_metrics(runs / "transient")}
    assert counted == {step: float(step == 3) for step in range(1, STEPS + 1)}
    records = [record for run in runs.iterdir() if run.is_dir() for record in read_metrics(run)]
    assert all(math.isfinite(value) for record in records for value in record.values())


def test_a_run_goes_back_and_past_the_bad_batches(runs):
    run = runs / "persistent"
    assert [event["step"] for event in events(run, "step_skipped")] == [6, 7]
    assert events(run, "step_skipped")[1]["not_finite"] == ["critic/gradient"]
    assert events(run, "step_skipped")[0]["ranks"] == [1]
    (event,) = events(run, "went_back")
    assert (event["step"], event["to_step"]) == (7, LAST_GOOD)
    assert [(place["epoch"], place["batch"]) for place in event["passed_over"]] == [place_of(6), place_of(7)]
    assert [event["step"] for event in events(run, "batch_passed_over")] == [6, 7]
    assert_same_end(run, runs / "avoiding")
    assert losses(run) == losses(runs / "avoiding")
    state = json.loads((find_checkpoint(run) / "state.json").read_text())
    assert state["state"]["guard"]["passed"] == [list(place_of(6)), list(place_of(7))]


def test_a_run_goes_back_at_once_where_weights_are_broken(runs):
    run = runs / "broken"
    (event,) = events(run, "went_back")
    assert (event["step"], event["to_step"]) == (6, LAST_GOOD)
    assert [event["step"] for event in events(run, "batch_passed_over")] == [6]
    assert sorted(losses(run)) == [step for step in range(1, STEPS + 1) if step != 6]


def test_a_checkpoint_of_broken_weights_is_none_and_the_run_goes_on_from_the_one_before(runs):
    run = runs / "late"
    (failed,) = events(run, "checkpoint_failed")
    assert failed["step"] == 2 * LAST_GOOD
    (event,) = events(run, "went_back")
    assert (event["step"], event["to_step"]) == (2 * LAST_GOOD + 1, LAST_GOOD)
    assert sorted(losses(run)) == [step for step in range(1, STEPS + 1) if step != 2 * LAST_GOOD + 1]


def test_a_spike_is_told_and_skipped_where_that_is_asked_for(runs):
    run = runs / "spiking"
    (event,) = events(run, "loss_spike")
    assert event["step"] == 5
    assert event["loss"] > event["limit"] > 1.1
    assert event["skipped"]
    assert {step for step, (used, _) in read_keys(run).items() if not used} == {5}
    assert sorted(losses(run)) == [step for step in range(1, STEPS + 1) if step != 5]
    assert [record["guard/spikes"] for record in read_metrics(run)] == [
        step == 5 for step in range(1, STEPS + 1)
    ]


def test_every_planned_sample_is_used_once_but_for_what_the_ledger_names(runs):
    everyone = read_keys(runs / "without")
    assert list(everyone) == list(range(1, STEPS + 1))
    for epoch in range(STEPS // BATCHES_PER_EPOCH):
        first = epoch * BATCHES_PER_EPOCH + 1
        planned = [key for step in range(first, first + BATCHES_PER_EPOCH) for key in everyone[step][1]]
        assert len(planned) == len(set(planned)) == 2 * BATCHES_PER_EPOCH
    for name, missing in {"transient": {3}, "without": {3}, "persistent": {6, 7}, "avoiding": {6, 7}}.items():
        found = read_keys(runs / name)
        assert {step: sorted(keys) for step, (_, keys) in found.items()} == {
            step: sorted(keys) for step, (_, keys) in everyone.items()
        }
        assert {step for step, (used, _) in found.items() if not used} == missing


@pytest.mark.parametrize(
    ("name", "word"), [("hopeless", "after going back 1 times"), ("never", "no checkpoint")]
)
def test_a_run_that_going_back_does_not_help_ends_on_all_ranks(runs, name, word):
    for rank in range(RANKS):
        assert word in (runs / name / f"error-{rank}.txt").read_text()
    assert len(events(runs / name, "went_back")) == (name == "hopeless")
    made = [event["step"] for event in events(runs / name, "checkpoint")]
    assert made == ([LAST_GOOD] if name == "hopeless" else []), "doubtful states are not kept"


@pytest.mark.soak
@pytest.mark.timeout(60 * (5 + int(os.environ.get("FREPA_SOAK_REPEATS", "20"))))
def test_random_faults_leave_a_run_as_one_without_their_batches(tmp_path, small_dataset):
    repeats = int(os.environ.get("FREPA_SOAK_REPEATS", "20"))
    for first in range(0, repeats, AT_ONCE):
        count = min(AT_ONCE, repeats - first)
        run_on_ranks("guard_runs.py", small_dataset, Path(str(first)), Path(str(count)), tmp_path)
    for repeat in range(repeats):
        faulty, without = (tmp_path / f"{name}-{repeat}" for name in ("faulty", "without"))
        assert len(events(faulty, "step_skipped")) == 2
        assert_same_end(faulty, without)
        assert losses(faulty) == losses(without)


def test_spikes_are_told_from_the_median_of_what_came_before():
    steady = [1.0 + 0.01 * (number % 5) for number in range(50)]
    assert spike_limit(steady[:19], 10) == math.inf
    assert spike_limit(steady, None) == math.inf
    limit = spike_limit(steady, 10)
    assert 1.1 < limit < 1.3
    assert spike_limit([*steady, *[50.0] * 20], 10) < 2, "spikes among them do not raise the limit"
    assert spike_limit([2.0] * 50, 10) == pytest.approx(2.2), "equal losses leave room for rounding"


def reading(loss, *, is_spike=False, was_skipped=False):
    return Reading((), loss, is_spike, was_skipped, own_loss_is_bad=False)


def test_the_ledger_counts_and_comes_back_from_a_checkpoint():
    ledger = Ledger(GuardConfig(patience=3, most_returns=1))
    for batch in range(30):
        ledger.account((0, batch), reading(1.0))
    ledger.account((0, 30), reading(9.0, is_spike=True))
    for batch in (31, 32):
        ledger.account((0, batch), reading(math.nan, was_skipped=True))
    again = Ledger(ledger.config)
    again.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert (again.streak, again.limit) == ([(0, 31), (0, 32)], ledger.limit)
    assert not ledger.must_go_back
    ledger.account((0, 33), reading(math.nan, was_skipped=True))
    assert ledger.must_go_back
    assert ledger.may_go_back
    expected = {"skipped": 3, "passed_over": 0, "spikes": 1, "returns": 0}
    assert ledger.take_counts() == {f"guard/{name}": float(count) for name, count in expected.items()}
    ledger.went_back(list(ledger.streak), {(0, 2)}, 0)
    assert ledger.passed == {(0, 2), (0, 31), (0, 32), (0, 33)}
    assert not ledger.must_go_back
    assert not ledger.may_go_back
    ledger.account((0, 31), None)
    assert ledger.take_counts()["guard/passed_over"] == 1
    ledger.saved()
    assert ledger.may_go_back


def test_guards_of_methods_are_written_when_they_begin_and_end(tmp_path):
    watch = Watch(tmp_path, World(0, 0, 1, torch.device("cpu")), log_keys=False)
    watch.note_guards(10, {"mi/skipped": 0.0, "adversarial_image/multiplier": 1.0, "data/skipped": 0.5})
    watch.note_guards(20, {"mi/skipped": 0.25, "adversarial_image/multiplier": 0.95})
    watch.note_guards(30, {"mi/skipped": 0.5, "adversarial_image/multiplier": 1.0})
    found = [(event["event"], event["step"], event["metric"]) for event in read_json_lines(tmp_path / EVENTS)]
    assert found == [
        ("guard_acts", 20, "mi/skipped"),
        ("guard_acts", 20, "adversarial_image/multiplier"),
        ("guard_rests", 30, "adversarial_image/multiplier"),
    ]
