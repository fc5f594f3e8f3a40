"""Training from a real S3 server, with a second copy of checkpoints there: an outage, a lost run folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest

from frepa_dist.runs import list_checkpoints, read_json_lines, read_metrics
from tests.commands import ON_CPU, frepa
from tests.frepa_dist.train.started_runs import trace
from tests.s3.proxy import ALWAYS

STEPS = 60

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def arguments(root, run, *more: str) -> list[str]:
    chosen = {
        "output": run,
        "data.root": root,
        "data.remote": "range",
        "data.num_workers": 1,
        "method.model.image_size": 64,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 4,
        "train.precision": "fp32",
        "train.zero_stage": 0,
        "train.steps": STEPS,
        "train.log_every": 1,
        "train.checkpoint_every": 20,
    }
    sets = [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]
    return ["pretrain", "--config", "demo/mae", *sets, *more, "--num-ranks", "1"]


def train(root, run, *more: str) -> None:
    done = frepa(*arguments(root, run, *more))
    assert done.returncode == 0, done.stderr


@pytest.mark.soak  # boto3's pauses grow with those of the store
@pytest.mark.parametrize("seconds", [2, 120])
def test_an_outage_is_waited_for_and_a_lost_folder_comes_back(small_dataset, s3, faults, tmp_path, seconds):
    root, run, whole = s3.put_tree(small_dataset, "data/"), tmp_path / "run", tmp_path / "whole"
    copy = ("--set", f"train.checkpoint_copy={s3.uri}/copy")
    command = [sys.executable, "-m", "cluster.cli", *arguments(root, run, *copy)]
    with subprocess.Popen(command, env={**os.environ, **ON_CPU}, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not read_metrics(run):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        faults.add("reset", attempts=ALWAYS)
        time.sleep(seconds)
        assert any(seen.fault == "reset" for seen in faults.seen)
        before = read_metrics(run)[-1]["step"]
        assert before < STEPS, "it did not need the store"
        faults.clear()
        assert process.wait(timeout=400) == 0
    events = read_json_lines(run / "events.jsonl")
    told = [event for event in events if event["event"] in ("fault", "copy_failed")]
    print(f"{seconds} s: stood at step {before}; {told}")
    shown, names = trace(run), [folder.name for folder in list_checkpoints(run)]
    if seconds > 60:
        train(small_dataset, whole)
        assert shown == trace(whole)
    shutil.rmtree(run)
    train(root, run, *copy, "--or-resume")
    assert trace(run) == shown
    assert [folder.name for folder in list_checkpoints(run)] == names[-1:]
