"""What Ray's searchers and schedulers are told, and what they remember."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import TrialScheduler

from cluster.sweep.journal import Journal
from cluster.sweep.schedulers import Explorer, PlannedPoints, RememberingAsha, create_search, param_space
from tests.cluster.sweep.making import make_sweep, report


def new_asha(path):
    asha = RememberingAsha(path, max_t=4, grace_period=1, reduction_factor=2)
    asha.set_search_properties("value", "min")
    return asha


def tell(asha, number, k, value):
    trial = SimpleNamespace(trial_id=f"trial_{number:05d}")
    asha.on_trial_add(None, trial)
    return asha.on_trial_result(None, trial, {"training_iteration": k, "value": value})


REPORTS = [(0, 1, 0.5), (1, 1, 0.9), (2, 1, 0.4), (0, 2, 0.45), (3, 1, 0.7), (2, 2, 0.3)]


def test_asha_goes_on_after_a_restart_as_if_there_had_been_none(tmp_path):
    path = tmp_path / "journal.jsonl"
    whole = [tell(new := new_asha(path), *REPORTS[0])] + [tell(new, *entry) for entry in REPORTS[1:]]
    assert whole.count(TrialScheduler.STOP) == 2
    journal, first = Journal(path), new_asha(path)
    for number, k, value in REPORTS[:3]:
        stopped = tell(first, number, k, value) == TrialScheduler.STOP
        journal.write(**report(number, k, value, stopped=stopped))
    second = new_asha(path)  # all that the first knew is gone
    assert [tell(second, *entry) for entry in REPORTS[3:]] == whole[3:]
    # a trial that Ray starts again reports again, and is told the same
    assert [tell(second, *entry) for entry in REPORTS] == whole


def test_without_the_journal_a_restart_would_decide_otherwise(tmp_path):
    """The control of the test above: Ray restores nothing of its schedulers."""
    blank = new_asha(tmp_path / "none.jsonl")
    assert tell(blank, 3, 1, 0.7) == TrialScheduler.CONTINUE


def test_changed_settings_name_their_parent_and_stay_where_they_may():
    sweep = make_sweep()
    explore = Explorer(sweep.space)
    random.seed(0)
    given = {
        "method.hmi.weight": 1.2,
        "train.base_learning_rate": 4e-3,
        "sweep": "x",
        "name": "002-abc",
        "parent": "007",
    }
    new = explore(given)
    assert new["method.hmi.weight"] == 1.0
    assert (new["parent"], new["sweep"], new["train.base_learning_rate"]) == ("002-abc", "x", 4e-3)
    assert new["name"].startswith("002-")
    assert explore(given)["name"] != new["name"]


def test_ray_gives_the_points_that_were_drawn_under_names_that_count_them(tmp_path):
    from ray.tune.experiment import Experiment

    sweep = make_sweep(output=tmp_path)
    search = PlannedPoints(sweep)
    search.add_configurations(
        Experiment(
            "x", lambda config: None, config=param_space(sweep), num_samples=4, storage_path=str(tmp_path)
        )
    )
    trials = [search.next_trial() for _ in range(4)]
    assert search.next_trial() is None
    assert [trial.trial_id for trial in trials] == [f"trial_{n:05d}" for n in range(4)]
    assert [trial.config["name"] for trial in trials] == ["000", "001", "002", "003"]
    from cluster.sweep.points import draw_points

    for trial, point in zip(trials, draw_points(sweep), strict=True):
        assert {key: trial.config[key] for key in point} == point
        assert trial.config["sweep"] == str(tmp_path)


def test_tpe_suggests_within_the_space_and_alike_for_a_seed():
    def suggest(seed):
        sweep = make_sweep(search="optuna", num_trials=8, seed=seed)
        search = create_search(sweep)
        space = {key: value for key, value in param_space(sweep).items() if key != "sweep"}
        search.set_search_properties("value", "min", space)
        found = []
        for number in range(6):
            found.append(search.suggest(str(number)))
            weight = found[-1]["method.hmi.weight"]
            search.on_trial_complete(str(number), {"value": weight, "training_iteration": 1})
        return found

    one = suggest(0)
    assert one == suggest(0)
    assert one != suggest(1)
    assert all(0.01 <= point["method.hmi.weight"] <= 1 for point in one)
    assert set(one[0]) == {"method.hmi.weight", "train.base_learning_rate"}


@pytest.mark.parametrize("kind", ["none", "asha", "pbt"])
def test_ray_can_keep_each_scheduler_and_the_recorder(kind, tmp_path):
    import ray.cloudpickle as pickle

    from cluster.sweep.recorder import Recorder
    from cluster.sweep.schedulers import create_scheduler

    sweep = make_sweep(scheduler={"kind": kind}, output=tmp_path)
    pickle.loads(pickle.dumps((create_scheduler(sweep, 3), Recorder(tmp_path), create_search(sweep))))
