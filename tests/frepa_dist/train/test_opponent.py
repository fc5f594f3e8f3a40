"""A discriminator beside the student, on two gloo ranks: gradients, weights, checkpoints, metrics."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from frepa_dist.runs import find_checkpoint, read_metrics
from frepa_dist.train.live import find_series
from shards.support.targets import unique_label
from tests.frepa_dist.train.on_ranks import RANKS, run_on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def deviations(tmp_path_factory):
    """Of every case, from what plain autograd gives."""
    folder = tmp_path_factory.mktemp("gradients")
    run_on_ranks("opponent_gradients.py", folder)
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
    assert ranks[0] == ranks[1], "guards, weights and vectors are the same on all ranks"
    return ranks[0]


STAGES = [(0, 0), (1, 0), (1, 1), (2, 2), (3, 0), (3, 2), (0, 3)]


@pytest.mark.parametrize(("student", "opponent"), STAGES)
def test_both_train_as_plain_autograd_would_in_every_stage(deviations, student, opponent):
    case = deviations[f"{student}-{opponent}-fp32"]
    for network in ("student", "judge"):
        assert case[network]["gradient"] < 1e-5
        assert case[network]["weight"] < 1e-6
    assert case["judge"]["vector"] < 1e-6


def test_both_train_as_plain_autograd_would_in_bf16(deviations):
    case = deviations["2-0-bf16"]
    for network in ("student", "judge"):
        assert case[network]["gradient"] < 0.03
        assert case[network]["weight"] < 0.03


def test_the_guard_is_the_same_on_all_ranks_and_as_on_one(deviations):
    for case in deviations.values():
        assert case["guard"]["updates"] == 2
        assert case["guard"]["deviation"] < 0.01


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_dataset):
    """Folder of the runs of opponent_run.py."""
    folder = tmp_path_factory.mktemp("runs")
    run_on_ranks("opponent_run.py", small_dataset, folder)
    return folder


def trace(run: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in record.items() if "time/" not in name and "second" not in name}
        for record in read_metrics(run)
    ]


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that ranks wrote to a checkpoint, by name, flattened."""
    from frepa_dist.train.checkpoint.files import TensorReader

    with TensorReader(folder) as reader:
        return {name: reader.read(name, reader.numel(name)) for name in reader.names()}


def test_a_resumed_run_equals_the_whole_one_bit_for_bit(runs):
    assert trace(runs / "interrupted") == trace(runs / "whole")
    whole, again = (all_tensors(find_checkpoint(runs / name)) for name in ("whole", "interrupted"))
    assert whole.keys() == again.keys()
    assert any("judge/" in name and "norm.left" in name for name in whole), "vectors are in the checkpoint"
    different = [name for name in whole if not torch.equal(whole[name], again[name])]
    assert not different
    earlier = all_tensors(find_checkpoint(runs / "whole", 2))
    judged = [name for name in whole if name.startswith("judge/master/") and "weight" in name]
    assert judged
    assert all(not torch.equal(whole[name], earlier[name]) for name in judged), "it went on learning"


def test_what_is_written_down_of_an_opponent(runs):
    records = read_metrics(runs / "whole")
    resting = {name for name in records[0] if name.startswith("judge/")}
    assert not resting, "it rests in the first step"
    names = {"judge/loss", "judge/hinge", "judge/r1", "judge/accuracy", "gradient_norm/judge", "lr/opponent"}
    assert all(names <= record.keys() for record in records[1:])
    assert all(np.isfinite(value) for record in records for value in record.values())
    assert records[-1]["lr/opponent"] == pytest.approx(2e-4 * records[-1]["lr"] / (1.5e-4 * 4 / 256))
    assert set(load_file(find_checkpoint(runs / "whole") / "student.safetensors")) == {
        f"layers.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }


def test_both_ranks_show_what_is_logged_while_they_train(runs):
    seen = json.loads((runs / "scraped.json").read_text())
    records = read_metrics(runs / "whole")
    for rank, shown in seen[-1].items():
        labels, samples = shown["labels"], shown["samples"]
        run = unique_label(runs / "whole")
        assert labels == {"job": "frepa_train", "run": run, "rank": rank, "node": "0"}
        for name, value in records[-1].items():
            series = find_series(name)
            if series is not None:  # each rank has a clock of its own
                tolerance = 0.9 if name == "samples_per_second" else 1e-6
                shown_value = samples[" ".join((series[0], *series[1].values()))]
                assert shown_value == pytest.approx(value, rel=tolerance), name
        assert samples["frepa_train_samples_total"] == 2 * 4, "its half of each batch"
        assert samples["frepa_train_step_seconds_count"] == 4
        names = {key.split()[0] for key in samples}
        assert ("frepa_train_checkpoints_total" in names) == (rank == "0")
    assert seen[-1].keys() == {"0", "1"}
    steps = [[one[rank]["samples"]["frepa_train_step"] for one in seen] for rank in ("0", "1")]
    assert all(sorted(own) == own and len(set(own)) > 2 for own in steps), "it was scraped while it trained"
    losses = {one["0"]["samples"].get("frepa_train_loss total") for one in seen} - {None}
    assert losses <= {record["loss"] for record in records}
    assert not list((runs / "targets").iterdir())


def test_deepspeeds_monitor_has_each_logged_step_once(runs):
    records = read_metrics(runs / "interrupted")
    names = {name for record in records for name in record} - {"step"} | {"time/checkpoint"}
    files = {path.name for path in (runs / "interrupted" / "monitors" / "csv").iterdir()}
    assert files == {f"{name.replace('/', '_')}.csv" for name in names}, "nothing of an engine's own"
    for name in ("loss", "loss/rec", "judge/loss"):
        path = runs / "interrupted" / "monitors" / "csv" / f"{name.replace('/', '_')}.csv"
        header, *rows = list(csv.reader(path.open()))
        assert header == ["step", name.rpartition("/")[2]]
        logged = [(record["step"], record[name]) for record in records if name in record]
        assert [(int(step), float(value)) for step, value in rows] == logged, name


def test_a_compiled_student_trains_as_another_and_keeps_its_names(runs):
    compiled, eager = (find_checkpoint(runs / name) / "student.safetensors" for name in ("compiled", "eager"))
    ours, theirs = load_file(compiled), load_file(eager)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6) for name in ours)
    for one, other in zip(read_metrics(runs / "compiled"), read_metrics(runs / "eager"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_weights_of_an_opponent_take_gradients_in_its_turn_only(monkeypatch):
    from frepa_dist.config import TrainConfig
    from frepa_dist.methods.base import Losses
    from frepa_dist.train import engines
    from frepa_dist.train.opponent import OpponentSubmodule

    monkeypatch.setattr(engines, "create_engine", lambda module, *_: module)
    module = nn.Linear(2, 1)
    module.bias.requires_grad_(False)  # for good
    world = engines.World(0, 0, 1, torch.device("cpu"))
    opponent = OpponentSubmodule(module, TrainConfig(steps=1), 1, world)
    seen: list[bool] = []

    def compute() -> Losses | None:
        seen.append(module.weight.requires_grad and not module.bias.requires_grad)
        raise RuntimeError("in its turn")

    assert not module.weight.requires_grad
    with pytest.raises(RuntimeError, match="in its turn"):
        opponent.train(compute)
    assert seen == [True]
    assert not module.weight.requires_grad
    assert opponent.call(torch.ones(3, 2)).dtype == torch.bfloat16  # under the student's autocast
    assert module.weight.dtype == torch.float32
