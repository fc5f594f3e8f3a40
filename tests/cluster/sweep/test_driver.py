"""What a driver decides before and after Ray."""

from __future__ import annotations

import os

import pytest
from ray.exceptions import OutOfMemoryError

from cluster.sweep.around_ray import RAY_VARIABLES, keep_fitting, ray_variables
from cluster.sweep.driver import conclude, locate, same_sweep
from cluster.sweep.journal import Journal
from cluster.sweep.layout import SWEEP, Layout, load_sweep
from cluster.sweep.measure import check_metric
from shards.support.errors import ConfigError, DataError, EnvironmentFault, FrepaError
from shards.support.settings import dump_yaml
from tests.cluster.sweep.making import failure, make_sweep, report, trial

VALUES = {"method.hmi.weight": 0.1, "train.base_learning_rate": 1e-3}


def store(sweep):
    (sweep.output / SWEEP).write_text(dump_yaml(sweep.model_dump(mode="json", exclude_none=True)))


def test_a_sweep_is_known_again_and_another_is_not_taken_for_it(tmp_path):
    sweep = locate(make_sweep(output=tmp_path))
    assert not same_sweep(sweep)
    store(sweep)
    assert load_sweep(tmp_path) == sweep
    assert same_sweep(make_sweep(output=tmp_path))
    with pytest.raises(ConfigError, match="num_trials, seed differ"):
        same_sweep(make_sweep(output=tmp_path, num_trials=9, seed=3))


def write(tmp_path, *entries):
    journal = Journal(Layout(tmp_path).journal)
    for entry in entries:
        journal.write(**entry)
    return make_sweep(output=tmp_path, num_trials=2)


def test_a_sweep_that_is_done_ends_with_0(tmp_path, capsys):
    ends = (report(0, 1, 0.5, last=True), report(1, 1, 0.7, stopped=True))
    assert conclude(write(tmp_path, trial(0, VALUES), trial(1, VALUES), *ends)) == 0
    assert "best" in capsys.readouterr().out


def test_a_sweep_that_was_stopped_ends_with_75_and_says_how_to_go_on(tmp_path, capsys):
    assert conclude(write(tmp_path, trial(0, VALUES), report(0, 1, 0.5, last=True))) == 75
    assert f"frepa sweep --resume {tmp_path}" in capsys.readouterr().out


def test_a_sweep_with_failed_trials_ends_with_5_names_them_and_keeps_the_others(tmp_path):
    sweep = write(
        tmp_path,
        trial(0, VALUES),
        trial(1, VALUES),
        report(0, 1, 0.5, last=True),
        failure(1, "rank 0: no more memory", final=True),
    )
    with pytest.raises(EnvironmentFault, match=r"1 of 2 trials failed \(001: rank 0") as caught:
        conclude(sweep)
    assert caught.value.exit_code == 5
    assert (tmp_path / "best.yaml").is_file()


@pytest.mark.parametrize("kind", ["probe", "high_band"])
def test_images_that_are_not_there_are_missed_at_once(kind, tmp_path):
    with pytest.raises((ConfigError, DataError)) as caught:
        check_metric(make_sweep(metric={"kind": kind, "images": str(tmp_path / "none")}).metric)
    assert isinstance(caught.value, FrepaError)


def test_rays_variables_are_put_back(monkeypatch):
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "7")
    before = dict(os.environ)
    with ray_variables():
        assert {name: os.environ[name] for name in RAY_VARIABLES} == RAY_VARIABLES
    assert dict(os.environ) == before


class Breaking:
    """A tuner under which Ray breaks as planned; each entry is how many reports came before."""

    def __init__(self, *reports):
        self.plan, self.reports, self.resumed = list(reports), 0, []

    def fit(self, resume):
        self.resumed.append(resume)
        if self.plan:
            self.reports += self.plan.pop(0)
            try:
                raise OutOfMemoryError("2 workers were killed")
            except OutOfMemoryError as error:  # as Ray Tune passes it on
                raise RuntimeError("Caught unexpected exception") from error


def test_where_ray_breaks_down_the_sweep_goes_on(capsys):
    tuner = Breaking(0, 1, 0, 0, 2, 0, 0)  # never four times without a report in between
    keep_fitting(tuner.fit, lambda: tuner.reports, resume=False)
    assert tuner.resumed == [False] + [True] * 7
    assert "Ray broke down (OutOfMemoryError: 2 workers were killed)" in capsys.readouterr().err


def test_a_ray_that_breaks_again_and_again_ends_it():
    tuner = Breaking(1, 0, 0, 0, 0, 0)
    with pytest.raises(EnvironmentFault, match="4 times without a report"):
        keep_fitting(tuner.fit, lambda: tuner.reports, resume=False)


def test_a_fault_that_is_not_rays_is_raised_as_it_is():
    def fit(resume):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        keep_fitting(fit, lambda: 0, resume=False)
