"""Training through the real launcher: `frepa pretrain`, two gloo ranks, ZeRO, resume."""

from __future__ import annotations

import json
import shutil
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from frepa_dist.runs import find_checkpoint, list_checkpoints, read_json_lines, read_metrics
from shards.dataset import load_snapshot, read_index
from shards.support.errors import DataError, DivergedError, EnvironmentFault
from tests.frepa_dist.train.started_runs import (
    STEPS,
    arguments,
    frepa,
    in_fp32,
    train_here,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]


def test_a_run_leaves_what_others_read(uninterrupted):
    precision, run = uninterrupted
    metrics = read_metrics(run)
    assert [record["step"] for record in metrics] == list(range(1, STEPS + 1))
    assert all(np.isfinite(value) for record in metrics for value in record.values())
    assert {"loss", "loss/rec", "loss/hmi", "mi/estimate", "teacher/distance", "lr"} <= metrics[-1].keys()
    assert json.loads((run / "outcome.json").read_text())["outcome"] == "done"
    assert [int(path.name[5:]) for path in list_checkpoints(run)] == [4, 8, 10]
    weights = load_file(find_checkpoint(run) / "student.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())
    if precision == "bf16":  # the master weights, not bf16 ones widened
        weight = weights["blocks.0.attn.qkv.weight"]
        assert not torch.equal(weight, weight.bfloat16().float())
        position = weights["pos_embed"]
        assert not torch.equal(position, position.bfloat16().float())
    assert metrics[-1]["teacher/distance"] > 0
    assert read_json_lines(run / "events.jsonl")[0]["event"] == "start"


@in_fp32  # bf16 rounds sums in the order in which they are cut
def test_one_rank_with_accumulation_trains_as_two_without(uninterrupted, dataset, tmp_path):
    precision, whole = uninterrupted
    run = tmp_path / "run"
    changes = {"train.precision": precision, "train.micro_batch_size": 4, "train.zero_stage": 0}
    assert train_here(*arguments(dataset, run, **changes)[1:]) == "done"
    for ours, theirs in zip(read_metrics(run), read_metrics(whole), strict=True):
        assert ours.keys() == theirs.keys()  # of the first steps, loss/hmi is none of them
        losses = [name for name in ours if name.startswith("loss")]
        for name in (*losses, "gradient_norm/student", "teacher/distance"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-5), (name, ours["step"])


def test_a_damaged_sample_is_replaced_counted_and_reported(dataset, tmp_path):
    damaged = tmp_path / "shards"
    shutil.copytree(dataset, damaged)
    (shard,) = damaged.glob("fundus/*.tar")
    data = bytearray(shard.read_bytes())
    row = read_index(damaged, load_snapshot(damaged).shards[0]).slice(5, 1).to_pylist()[0]
    data[row["image_offset"] + row["image_size"] // 2] ^= 1
    shard.write_bytes(data)
    changes = {"train.micro_batch_size": 8, "train.steps": 3, "train.zero_stage": 0}
    with pytest.raises(DataError, match=f"sample {row['key']}"):
        train_here(*arguments(damaged, tmp_path / "one", **changes)[1:])
    changes["data.bad_samples"] = "skip"
    assert train_here(*arguments(damaged, tmp_path / "two", **changes)[1:]) == "done"
    events = read_json_lines(tmp_path / "two" / "events.jsonl")
    (skipped,) = [event for event in events if event["event"] == "sample_skipped"]
    assert row["key"] in skipped["sample"]
    shares = [record["data/skipped"] for record in read_metrics(tmp_path / "two")]
    assert sorted(shares) == [0, 0, 1 / 8]


@in_fp32
def test_a_used_run_folder_is_refused(uninterrupted, dataset):
    _, run = uninterrupted
    result = frepa(*arguments(dataset, run))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("frepa: error: ")]
    assert "frepa resume" in line


@in_fp32
def test_resuming_without_a_checkpoint_is_refused_by_the_ranks_too(uninterrupted, tmp_path):
    _, run = uninterrupted
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(DataError, match="no complete checkpoint"):
        train_here("--resume", str(tmp_path))


def test_a_metrics_port_in_use_ends_the_run(dataset, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = {"train.metrics.port": port, "train.micro_batch_size": 8}
        with pytest.raises(EnvironmentFault, match=r"train\.metrics\.port"):
            train_here(*arguments(dataset, tmp_path / "run", **settings)[1:])


def test_a_loss_that_is_not_finite_ends_the_run(dataset, tmp_path):
    settings = {"train.base_learning_rate": 1e30, "train.micro_batch_size": 8, "train.precision": "fp32"}
    with pytest.raises(DivergedError, match="no longer finite"):
        train_here(*arguments(dataset, tmp_path / "run", **settings)[1:])
