"""Checkpoints of real runs on gloo ranks: other stages, other world sizes, full disks, no waiting."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from frepa_dist.runs import find_checkpoint, list_checkpoints, read_json_lines, read_metrics
from frepa_dist.train.checkpoint import is_intact
from frepa_dist.train.checkpoint.files import TensorReader
from tests.frepa_dist.train.on_ranks import run_on_ranks
from tests.small_disk import run_on_small_disk

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_dataset):
    """What checkpoint_run.py leaves, run once on two ranks."""
    folder = tmp_path_factory.mktemp("save")
    run_on_ranks("checkpoint_run.py", "all", small_dataset, folder)
    return folder


@pytest.fixture(scope="module")
def result(folder):
    ranks = [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(2)]
    for key, value in ranks[0].items():
        if key != "waited":
            assert ranks[1][key] == value, f"ranks differ in {key}"
    return ranks[0]


def test_a_checkpoint_holds_what_it_says(folder):
    for checkpoint in list_checkpoints(folder / "whole"):
        assert is_intact(checkpoint)
        assert {path.name for path in checkpoint.iterdir()} == {
            "manifest.json",
            "rank-00000.safetensors",
            "rank-00001.safetensors",
            "state.json",
            "student.safetensors",
        }
    assert [int(path.name[5:]) for path in list_checkpoints(folder / "whole")] == [2, 4, 6]
    newest = find_checkpoint(folder / "whole")
    assert (newest.parent / "latest").read_text().strip() == newest.name
    weights = load_file(newest / "student.safetensors")
    with TensorReader(newest) as reader:
        trained = {name.removeprefix("student/master/") for name in reader.names("student/master/")}
        assert trained < weights.keys()
        assert weights.keys() - trained == {"pos_embed", "decoder_pos_embed"}
        for name in trained:
            value = reader.read(f"student/master/{name}", weights[name].numel())
            assert torch.equal(value, weights[name].view(-1))
        for kind in ("teacher/ema/", "teacher_critic/master/", "teacher_critic/exp_avg/", "random/1/cpu"):
            assert reader.names(kind), kind


def test_ranks_write_about_as_much_each(folder):
    newest = find_checkpoint(folder / "whole")
    sizes = [path.stat().st_size for path in newest.glob("rank-*.safetensors")]
    assert max(sizes) < 1.1 * min(sizes)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_restored_in_any_stage_and_saved_again_it_holds_the_same_numbers(result, precision, stage):
    assert result[f"stage-{precision}-{stage}"] == []
    for kind in ("master", "exp_avg", "exp_avg_sq", "step"):
        assert f"student/{kind}/layers.0.weight" in result["names"]
    assert any(name.startswith("judge/fixed/") for name in result["names"])


def test_two_ranks_then_one_then_two_learn_as_two_do(folder, small_dataset):
    """In stages 2, 0 and 3."""
    for num_ranks, until in ((1, 4), (2, 6)):
        (folder / "until").write_text(str(until))
        run_on_ranks("checkpoint_run.py", "go-on", small_dataset, folder, ranks=num_ranks)
    whole, moved = read_metrics(folder / "whole"), read_metrics(folder / "moved")
    assert [record["step"] for record in moved] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(moved, whole, strict=True):
        assert "loss/hmi" in theirs or theirs["step"] == 1
        for name in {"loss", "loss/rec", "loss/hmi", "teacher/distance", "mi/estimate"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (name, ours["step"])
    assert moved[2]["loss"] != moved[1]["loss"]
    weights, expected = (
        load_file(find_checkpoint(folder / name) / "student.safetensors") for name in ("moved", "whole")
    )
    apart = torch.stack([(weights[name] - expected[name]).norm() for name in weights]).norm()
    before = load_file(find_checkpoint(folder / "whole", 2) / "student.safetensors")
    moved_by = torch.stack([(before[name] - expected[name]).norm() for name in expected]).norm()
    assert apart < 0.02 * moved_by
    teachers = []
    for name in ("moved", "whole"):
        with TensorReader(find_checkpoint(folder / name)) as reader:
            teachers.append([reader.read(n, reader.numel(n)) for n in reader.names("teacher/ema/")])
    for ours, theirs in zip(*teachers, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    changed = [e for e in read_json_lines(folder / "moved" / "events.jsonl") if e["event"] == "changed"]
    assert ["world_size: 2 -> 1" in event["environment"] for event in changed] == [True, False]
    assert "world_size: 1 -> 2" in changed[1]["environment"]


def test_a_full_disk_is_outlived_and_told(result):
    passed = result["disk passes"]
    assert passed["steps"] == [2, 5, 6], "the last three that could be written"
    assert passed["folders"] == ["latest", "step-00000002", "step-00000005", "step-00000006"]
    assert [step for event, step in passed["events"] if event == "checkpoint_failed"] == [3, 4]
    assert [step for event, step in passed["events"] if event == "checkpoint"] == [1, 2, 5, 6]


def test_a_disk_that_stays_full_ends_the_run_on_all_ranks(result):
    for texts, count in ((result["disk stays"], 3), (result["disk at the end"], 4)):
        assert texts[0] == texts[1]
        assert f"{count} checkpoint(s) in a row could not be written" in texts[0]
        assert "rank 1" in texts[0]
        assert "No space left on device" in texts[0]
        assert "frepa resume" in texts[0]
    assert result["disk left"]["folders"] == ["latest", "step-00000002", "step-00000005", "step-00000006"]


def test_weights_that_are_not_finite_on_one_rank_make_no_checkpoint_on_any(result):
    assert result["not finite"][0] == result["not finite"][1]
    assert "no longer finite after step 3" in result["not finite"][0]
    assert "student/master/" in result["not finite"][0]
    assert result["not finite left"]["steps"] == [2]


def test_a_checkpoint_of_another_network_is_refused(result):
    assert all("of 'student/master/" in text for text in result["other model"])


def test_training_does_not_wait_for_the_disk_and_does_not_change_what_is_written(result):
    assert result["waited"] < 0.5, "each of the four files takes a second"
    assert result["critic"]
    assert result["torn in time"] == []


@pytest.mark.soak
def test_a_disk_that_fills_up_and_is_enlarged(small_dataset):
    """A real one: the second checkpoint does not fit, and what is there is gone on with."""
    result = run_on_small_disk(FULL, "200k", small_dataset, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "no checkpoint of step 2: rank 0" in result.stderr


FULL = """
import os, subprocess, sys
from pathlib import Path
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", TORCH_FORCE_WEIGHTS_ONLY_LOAD="1")
from cluster.launch import free_port
os.environ["MASTER_PORT"] = str(free_port())
from frepa_dist.methods.registry import METHODS
from frepa_dist.runs import list_checkpoints
from frepa_dist.train.checkpoint import is_intact, newest_intact
from frepa_dist.train.engines import process_group
from shards.support.errors import EnvironmentFault
from tests.frepa_dist.train.adversarial_method import Pair
from tests.frepa_dist.train.checkpoint_run import make_run, pair
from tests.frepa_dist.train.small_runs import create_trainer

METHODS["pair"] = Pair
disk, dataset = map(Path, sys.argv[1:])
config = pair(make_run(dataset, disk / "run", checkpoint_every=1, keep_checkpoints=1, steps=2))
with process_group() as world:
    trainer = create_trainer(config, world)
    try:
        trainer.run()
    except EnvironmentFault as error:
        assert "No space left on device" in str(error), error
    else:
        raise AssertionError("it fitted")
    assert trainer.step == 2
    (first,) = list_checkpoints(config.output)
    assert is_intact(first) and first.name == "step-00000001"
    subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
    trainer = create_trainer(config, world)
    trainer.resume(newest_intact(config.output))
    trainer.run()
    assert [path.name for path in list_checkpoints(config.output)] == ["step-00000002"]
"""
