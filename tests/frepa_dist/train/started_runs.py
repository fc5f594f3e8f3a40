"""Runs of a few steps on two gloo ranks: how they are started, awaited and compared."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frepa_dist.runs import read_json_lines, read_metrics
from frepa_dist.train.__main__ import Start, parse_arguments
from frepa_dist.train.checkpoint.files import TensorReader
from frepa_dist.train.stop import Control
from tests import commands
from tests.commands import ON_CPU
from tests.one_rank import one_rank

STEPS = 10


def arguments(dataset: Path, run: Path, **settings: object) -> list[str]:
    chosen = {
        "output": run,
        "data.root": dataset,
        "method.model.image_size": 64,
        "method.hmi.warmup_fraction": 0.0,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.steps": STEPS,
        "train.log_every": 1,
        "train.checkpoint_every": 4,
        **settings,
    }
    sets = [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]
    return ["pretrain", "--config", "demo/retmae", *sets]


def frepa(*parts: str, num_ranks: int = 2) -> commands.Ended:
    return commands.frepa(*parts, "--num-ranks", num_ranks, "--max-restarts", 0)


def train_here(*parts: str) -> str:
    """Train on one rank in the test's own process: as `frepa_dist.train PARTS`, in a tenth of the time.

    Returns:
        How it ended.

    Raises:
        FrepaError: as a rank does before it makes an exit code of it.
    """
    with one_rank() as world:
        return Start(parse_arguments(list(parts)), Control()).run(world)


def quiet_start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **ON_CPU}
    )


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(record["step"] >= step for record in read_metrics(run)):
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def trace(run: Path) -> list[tuple[float, ...]]:
    """What must not depend on an interruption: every number of every step, but for the clock's."""
    return [
        tuple(value for name, value in sorted(record.items()) if "time/" not in name and "second" not in name)
        for record in read_metrics(run)
    ]


def starts(run: Path) -> list[int]:
    return [r["step"] for r in read_json_lines(run / "events.jsonl") if r["event"] == "start"]


def assert_same_checkpoint(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / "student.safetensors"), load_file(other / "student.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with TensorReader(one) as reader, TensorReader(other) as again:
        assert reader.names() == again.names()
        for kind in ("student/exp_avg/", "teacher/ema/", "teacher_critic/master/", "random/1/cpu"):
            assert reader.names(kind), kind
        for name in reader.names():
            numel = reader.numel(name)
            assert torch.equal(reader.read(name, numel), again.read(name, numel)), name


in_fp32 = pytest.mark.parametrize("uninterrupted", ["fp32"], indirect=True)
in_bf16 = pytest.mark.parametrize("uninterrupted", ["bf16"], indirect=True)
