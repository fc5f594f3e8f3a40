from __future__ import annotations

import numpy as np
import pytest

from cluster.sweep.points import (
    check_holds,
    check_sweep,
    draw_points,
    expand,
    extreme_points,
    lookup,
    report_steps,
    resolve,
    trial_config,
)
from shards.support.errors import ConfigError
from tests.cluster.sweep.making import SEEDS, SPACE, make_sweep


def test_dotted_keys_and_groups_mean_the_same():
    assert expand({"a.b": 1, "a": {"c.d": 2}}) == {"a": {"b": 1, "c": {"d": 2}}}
    assert lookup({"a": {"b": 1}}, "a.b") == 1
    with pytest.raises(KeyError):
        lookup({"a": 1}, "a.b")


def test_more_trials_extend_fewer_and_another_seed_draws_others():
    few, many = draw_points(make_sweep(num_trials=3)), draw_points(make_sweep(num_trials=9))
    assert many[:3] == few
    assert draw_points(make_sweep(num_trials=3, seed=1)) != few
    weights = [point["method.hmi.weight"] for point in draw_points(make_sweep(num_trials=200))]
    assert abs(np.mean(np.log10(weights)) + 1) < 0.1  # the middle of .01 and 1


def test_a_draw_is_the_same_for_all_values_that_it_is_crossed_with():
    points = draw_points(make_sweep(space=SPACE | SEEDS, num_trials=2))
    assert [point["train.seed"] for point in points] == [0, 1, 2, 0, 1, 2]
    assert len({point["method.hmi.weight"] for point in points}) == 2


def test_the_ends_of_all_distributions_are_tried():
    found = {(p["method.hmi.weight"], p["train.base_learning_rate"]) for p in extreme_points(make_sweep())}
    assert found == {(0.01, 1e-3), (1.0, 4e-3), (1.0, 1e-3), (0.01, 4e-3)}


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"space": {"method.hmi.wait": {"uniform": [0, 1]}}}, "wait"),
        ({"space": {"train.learning_rate": {"uniform": [0.1, 1]}}}, "unknown key 'train.learning_rate'"),
        ({"space": {"method.mask_ratio": {"uniform": [0.5, 1.5]}}}, "mask_ratio"),
        ({"space": {"train.steps": {"choice": [1, 2]}}}, "the sweep decides"),
        ({"space": {"method.norm_pix_loss": {"choice": [True, False]}}}, "cannot be compared"),
        ({"set": {"train.batch": 3}}, "train.batch"),
        ({"resources": {"workers": 3}}, "3 workers"),
        ({"metric": {"kind": "hf_recall", "images": "x"}}, "true spread"),
        ({"space": {"train.seed": {"randint": [0, 9]}}, "scheduler": {"kind": "pbt"}}, "cannot go on"),
    ],
)
def test_what_would_fail_later_is_found_before_anything_starts(over, said):
    with pytest.raises(ConfigError, match=said):
        check_sweep(make_sweep(**over))


def test_a_trial_is_the_base_with_what_is_set_and_sampled(tmp_path):
    sweep = make_sweep(set={"train.steps": 7, "train": {"keep_every": 3}})
    config = resolve(sweep, {"method.hmi.weight": 0.5, "train.base_learning_rate": 1}, tmp_path)
    assert (config.method.hmi.weight, config.train.steps, config.output) == (0.5, 7, tmp_path)
    assert config.train.keep_every == 3  # as best.yaml has it
    assert trial_config(config).train.keep_every == config.train.checkpoint_every


def test_a_base_that_changes_meanwhile_changes_no_trial(tmp_path):
    base = tmp_path / "own.yaml"
    base.write_text("base: demo/retmae\ntrain: {weight_decay: 0.1}\n")
    sweep = make_sweep(base=str(base), output=tmp_path)
    (tmp_path / "base.yaml").write_text(base.read_text())  # as the driver does
    base.write_text("base: demo/retmae\ntrain: {weight_decay: 0.9}\n")
    assert resolve(sweep, {}, tmp_path / "run").train.weight_decay == 0.1


def test_values_that_do_not_arrive_are_found():
    with pytest.raises(ConfigError, match=r"a.b is 1, 2 was sampled; a.c is nothing"):
        check_holds({"a": {"b": 1}}, {"a.b": 2, "a.c": 3}, where="x")
    check_holds({"a": [1, 2], "b": 1.0}, {"a": (1, 2), "b": 1}, where="x")


def test_every_scheduled_checkpoint_and_the_last_are_reported():
    assert report_steps(6, 2) == [2, 4, 6]
    assert report_steps(7, 3) == [3, 6, 7]
    assert report_steps(5, 100) == [5]
