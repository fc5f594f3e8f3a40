"""Two nodes: two network namespaces, a supervisor and a launcher in each, gloo over a virtual cable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from frepa_dist.runs import read_json_lines, read_metrics

SCRIPT = Path(__file__).with_name("two_nodes.py")
ENTER = ("unshare", "--user", "--map-root-user", "--net")
STEPS = 9


def can_connect() -> bool:
    if not all(shutil.which(program) for program in ("ip", "unshare", "nsenter")):
        return False
    made = [*ENTER, "ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1"]
    return subprocess.run(made, capture_output=True, check=False).returncode == 0


def command(dataset: Path, run: Path) -> list[str]:
    chosen = {
        "output": run,
        "data.root": dataset,
        "data.num_workers": 0,
        "method.model.image_size": 64,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 2,
        "train.precision": "fp32",
        "train.steps": STEPS,
        "train.log_every": 1,
        "train.checkpoint_every": 3,
    }
    sets = [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]
    start = [sys.executable, "-m", "cluster.cli", "pretrain", "--config", "demo/retmae", *sets]
    return [*start, "--num-ranks", "1", "--hang-seconds", "60"]


def steps_of(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["gradient_norm/student"]) for line in read_metrics(run)]


@pytest.mark.soak
@pytest.mark.distributed
@pytest.mark.timeout(1500)
def test_a_cut_cable_is_told_on_both_nodes_and_training_comes_back(small_dataset, tmp_path):
    if not can_connect():
        pytest.skip("needs network namespaces and the programs ip, unshare and nsenter")
    run, whole = tmp_path / "run", tmp_path / "whole"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [*ENTER, sys.executable, str(SCRIPT), str(run), *command(small_dataset, run)],
        capture_output=True, text=True, timeout=1200, check=False, env=environment,
    )  # fmt: skip
    print(result.stderr)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [0, 0]
    faults = [event for event in read_json_lines(run / "events.jsonl") if event["event"] == "fault"]
    for fault in faults:
        print(fault)
    assert {fault["node"] for fault in faults} == {0, 1}
    assert all("hung" in fault["cause"] or "connection" in fault["cause"] for fault in faults)
    # on one node without a fault, the numbers are the same, but for how many threads share a sum
    alone = [*command(small_dataset, whole), "--num-ranks", "2"]
    assert subprocess.run(alone, check=False, env=environment, timeout=300).returncode == 0
    ours, theirs = np.array(steps_of(run)), np.array(steps_of(whole))
    assert ours[:, 0].tolist() == list(range(1, STEPS + 1))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
