"""Faults of training on two gloo ranks: kills, hangs, signals; what comes after is as if there were none."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from frepa_dist.heartbeats import read_pulse
from frepa_dist.runs import find_checkpoint, list_checkpoints, read_json_lines
from tests.frepa_dist.train.started_runs import (
    STEPS,
    arguments,
    assert_same_checkpoint,
    frepa,
    in_bf16,
    in_fp32,
    quiet_start,
    starts,
    trace,
    wait_for_step,
    wait_until,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]


def kill_in_the_middle(parts: list[str], run: Path, at_step: int, delay_seconds: float = 0.0) -> None:
    """Start a run and kill -9 launcher and ranks `delay_seconds` after `at_step` is in the metrics."""
    command = [sys.executable, "-m", "cluster.cli", *parts, "--num-ranks", "2"]
    with quiet_start(command) as process:
        wait_for_step(process, run, at_step)
        # checkpoints are written while training goes on
        name = "step-00000004" if delay_seconds else "step-00000008"
        wait_until(lambda: any(path.name == name for path in list_checkpoints(run)))
        time.sleep(delay_seconds)
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=20)
    assert delay_seconds or not (run / "outcome.json").exists(), "the run ended before it was killed"


@in_bf16  # in fp32 below
def test_kill_and_resume_equal_the_uninterrupted_run(uninterrupted, dataset, tmp_path):
    precision, whole = uninterrupted
    run = tmp_path / "run"
    kill_in_the_middle(arguments(dataset, run, **{"train.precision": precision}), run, at_step=9)
    newest = find_checkpoint(run, 8) / "student.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])  # a damaged checkpoint is passed over
    result = frepa("resume", str(run))
    assert result.returncode == 0, result.stderr
    assert starts(run) == [0, 4]
    assert trace(run) == trace(whole)
    assert_same_checkpoint(find_checkpoint(run), find_checkpoint(whole))


@pytest.mark.soak
@pytest.mark.timeout(100 * int(os.environ.get("FREPA_SOAK_REPEATS", "20")))
def test_kills_at_random_moments(uninterrupted, dataset, tmp_path):
    precision, whole = uninterrupted
    moments = np.random.default_rng(0)
    for repeat in range(int(os.environ.get("FREPA_SOAK_REPEATS", "20"))):
        run = tmp_path / f"run{repeat}"
        at_step = int(moments.integers(5, STEPS))  # by then the checkpoint of step 4 is whole
        kill_in_the_middle(
            arguments(dataset, run, **{"train.precision": precision}), run, at_step, moments.uniform(0, 0.3)
        )
        result = frepa("resume", str(run))
        assert result.returncode == 0, result.stderr
        assert trace(run) == trace(whole)
        assert_same_checkpoint(find_checkpoint(run), find_checkpoint(whole))


def find_processes(supervisor: int, run: Path) -> dict[str, list[psutil.Process]]:
    """What a fault can strike, by name."""
    family = psutil.Process(supervisor).children(recursive=True)
    pulses = [read_pulse(run / "heartbeats" / f"rank-{rank}.json") for rank in (0, 1)]
    ranks = [psutil.Process(pulse.pid) for pulse in pulses if pulse is not None]
    (launcher,) = [process for process in family if "deepspeed.launcher.launch" in process.cmdline()]
    servers = [
        child
        for rank in ranks
        for child in rank.children()
        if any("forkserver" in part for part in child.cmdline())
    ]
    workers = [worker for server in servers for worker in server.children()]
    return {"launcher": [launcher], "rank0": ranks[:1], "rank1": ranks[1:], "workers": workers, "all": family}


def strike(supervisor: int, run: Path, fault: str, seed: int = 0) -> None:
    found = find_processes(supervisor, run)
    if fault == "hang":
        found["rank1"][0].suspend()
    elif fault == "supervisor":
        psutil.Process(supervisor).kill()
    elif fault == "asked":
        asked = [psutil.Process(supervisor), *found["launcher"], *found["rank0"], *found["rank1"]]
        chosen = random.Random(seed)
        chosen.choice(asked).send_signal(chosen.choice((signal.SIGTERM, signal.SIGUSR1)))
    elif fault == "memory":  # as much as it has, and no more
        rank = found["rank0"][0]
        rank.rlimit(psutil.RLIMIT_AS, (rank.memory_info().vms,) * 2)
    elif fault == "worker":
        random.Random(seed).choice(found["workers"]).kill()
    else:
        for process in found[fault]:
            process.kill()


def causes(run: Path) -> list[str]:
    return [r["cause"] for r in read_json_lines(run / "events.jsonl") if r["event"] == "fault"]


@in_fp32
def test_a_killed_rank_brings_a_restart_and_a_signal_a_checkpoint(uninterrupted, dataset, tmp_path):
    precision, whole = uninterrupted
    run = tmp_path / "run"
    parts = arguments(dataset, run, **{"train.precision": precision})
    with quiet_start([sys.executable, "-m", "cluster.cli", *parts, "--num-ranks", "2"]) as process:
        wait_for_step(process, run, 5)
        strike(process.pid, run, "rank1")
        deadline = time.monotonic() + 120
        while len(starts(run)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (rank,) = find_processes(process.pid, run)["rank1"]
        rank.send_signal(signal.SIGUSR1)  # one rank alone hears it, while it starts or in its first step
        assert process.wait(timeout=120) == 75
    (cause,) = causes(run)
    assert cause.startswith("rank 1 was killed at about step")
    said = json.loads((run / "outcome.json").read_text())
    assert said["outcome"] == "requeue"
    assert starts(run)[1] < said["step"] < STEPS
    assert find_checkpoint(run).name == f"step-{said['step']:08d}"
    result = frepa("resume", str(run))
    assert result.returncode == 0, result.stderr
    assert starts(run) == [0, starts(run)[1], said["step"]]
    assert trace(run) == trace(whole)
    assert_same_checkpoint(find_checkpoint(run), find_checkpoint(whole))


FAULTS = {
    "rank0": "rank 0 was killed",
    "rank1": "rank 1 was killed",
    "launcher": "the launcher was killed",
    "worker": "a loader process died",
    "all": "ranks 0, 1 were killed",
    "hang": "rank 1 hung",
    "memory": "rank 0",
    "asked": "",
    "supervisor": "",
}


@pytest.mark.soak
@pytest.mark.timeout(200 * int(os.environ.get("FREPA_SOAK_REPEATS", "20")))
@in_fp32
def test_faults_at_random_under_supervision(uninterrupted, dataset, tmp_path):
    precision, whole = uninterrupted
    moments = np.random.default_rng(1)
    for repeat in range(int(os.environ.get("FREPA_SOAK_REPEATS", "20"))):
        run = tmp_path / f"run{repeat}"
        fault = sorted(FAULTS)[repeat % len(FAULTS)]
        at_step, delay = int(moments.integers(1, 6)), moments.uniform(0, 0.2)  # well before the end
        parts = arguments(dataset, run, **{"train.precision": precision, "data.num_workers": 1})
        parts += ["--hang-seconds", "30"]
        with quiet_start([sys.executable, "-m", "cluster.cli", *parts, "--num-ranks", "2"]) as process:
            wait_for_step(process, run, at_step)
            time.sleep(delay)
            family = psutil.Process(process.pid).children(recursive=True)
            strike(process.pid, run, fault, repeat)
            code = {"supervisor": -signal.SIGKILL, "asked": 75}.get(fault, 0)
            assert process.wait(timeout=180) == code
        if fault == "supervisor":  # its ranks notice, and save
            _, alive = psutil.wait_procs(family, timeout=60)
            assert not alive
            assert json.loads((run / "outcome.json").read_text())["outcome"] in ("requeue", "done")
        if code:
            assert not causes(run)
            assert frepa("resume", str(run)).returncode == 0
        print(f"{fault} {delay:.2f} s after step {at_step}: {causes(run)}")
        assert all(FAULTS[fault] in cause for cause in causes(run))
        assert trace(run) == trace(whole)
        assert_same_checkpoint(find_checkpoint(run), find_checkpoint(whole))


def shared_memory(port: str) -> list[Path]:
    """What the ranks that meet on a port hold; others on this machine have files of their own."""
    return list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))  # noqa: S108


def test_a_stopped_command_leaves_no_rank_and_no_memory_behind(dataset, tmp_path):
    run = tmp_path / "run"
    parts = arguments(dataset, run, **{"train.micro_batch_size": 8, "train.steps": 10000})
    with quiet_start([sys.executable, "-m", "cluster.cli", *parts, "--num-ranks", "1"]) as process:
        wait_for_step(process, run, 1)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        (port,) = {
            part.removeprefix("--master_port=")
            for member in family
            for part in member.cmdline()
            if part.startswith("--master_port=")
        }
        assert shared_memory(port)  # while it trains: what is looked for is there
        process.terminate()
        assert process.wait(timeout=60) == 75
        _, alive = psutil.wait_procs(family, timeout=40)
    assert not alive
    assert not shared_memory(port)
    said = json.loads((run / "outcome.json").read_text())
    assert said["outcome"] == "requeue"
    assert find_checkpoint(run).name == f"step-{said['step']:08d}"
