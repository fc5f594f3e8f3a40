from __future__ import annotations

import pytest
from pydantic import ValidationError

from cluster.sweep.config import ResourcesConfig, read_sweep
from cluster.sweep.points import check_sweep
from shards.support.errors import ConfigError
from tests.cluster.sweep.making import METRIC, SEEDS, SPACE, make_sweep
from tests.twins import CONFIGS


@pytest.mark.parametrize("kind", ["loss", "loss/rec", "train_loss", "mi/estimate"])
def test_a_training_loss_is_no_metric_and_the_reason_is_told(kind):
    with pytest.raises(ValidationError, match=r"says nothing between trials.*probe, knn"):
        make_sweep(metric={**METRIC, "kind": kind})


def test_the_mode_follows_from_the_kind():
    assert make_sweep().metric.direction == "min"
    with pytest.raises(ValidationError, match="maximal"):
        make_sweep(metric={"kind": "probe", "images": "x", "mode": "min"})


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"search": "grid"}, "grid"),
        ({"search": "optuna", "space": SPACE | SEEDS}, "a choice"),
        ({"search": "optuna", "scheduler": {"kind": "pbt"}}, "by itself"),
        ({"scheduler": {"kind": "pbt"}, "space": SEEDS}, "nothing to change"),
        ({"scheduler": {"kind": "pbt"}, "num_trials": 1}, "population"),
        ({"space": {}}, "at least 1"),
        ({"trials": 3}, "trials"),
    ],
)
def test_what_does_not_go_together_is_refused(over, said):
    with pytest.raises(ValidationError, match=said):
        make_sweep(**over)


def test_draws_are_crossed_with_lists():
    assert make_sweep(space=SPACE | SEEDS, num_trials=5).num_planned == 15


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"workers": 3, "nodes": 2}, "divide"),
        ({"workers": 2, "gpus_per_worker": 0.5}, "NCCL"),
        ({"gpus_per_worker": 1.5}, "NCCL"),
        ({"cpus_per_worker": 0}, "at once"),
    ],
)
def test_resources_that_cannot_work_are_refused(resources, said):
    with pytest.raises(ValidationError, match=said):
        ResourcesConfig.model_validate(resources)


def test_a_bundle_holds_the_workers_of_a_node():
    resources = ResourcesConfig(workers=4, nodes=2, cpus_per_worker=0.5, gpus_per_worker=1)
    assert resources.bundles() == [{"CPU": 1.0, "GPU": 2.0}] * 2


def test_the_base_of_a_sweep_is_a_run_config_and_lies_beside_it(tmp_path):
    (tmp_path / "own.yaml").write_text("base: demo/retmae\n")
    (tmp_path / "sweep.yaml").write_text(
        "base: own.yaml\nmetric: {kind: knn, images: x}\noutput: out\nspace: {train.seed: {grid: [1, 2]}}\n"
    )
    sweep = read_sweep(tmp_path / "sweep.yaml", ["num_trials=2", "set.train.steps=4"])
    assert sweep.base == str(tmp_path / "own.yaml")
    assert (sweep.num_planned, sweep.set) == (4, {"train": {"steps": 4}})
    with pytest.raises(ConfigError, match="metrik"):
        read_sweep(tmp_path / "sweep.yaml", ["metrik.kind=knn"])


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_can_start_and_tries_its_answer_with_three_seeds(path):
    sweep = read_sweep(f"sweep/{path.stem}")
    check_sweep(sweep)
    assert sweep.space["train.seed"].grid == (0, 1, 2)
