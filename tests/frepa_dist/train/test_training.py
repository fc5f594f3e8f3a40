"""Training through the real launcher: `frepa pretrain`, two gloo ranks, ZeRO, kill -9, resume."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cluster.nodes import Nodes
from cluster.supervise import supervise
from cluster.verdict import Patience
from frepa_dist.heartbeats import read_pulse
from frepa_dist.runs import find_checkpoint, list_checkpoints, read_json_lines, read_metrics
from frepa_dist.train.checkpoint.files import TensorReader
from shards.builder.build import BuildConfig, build_dataset
from shards.dataset import load_snapshot, read_index
from tests import commands
from tests.commands import ON_CPU

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

STEPS = 10
NUM_IMAGES = 27  # batches of 8: three an epoch, three samples left over


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        coarse = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((72, 72))
        noisy = np.asarray(coarse, dtype=np.int16) + rng.integers(-20, 20, (72, 72, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    root = tmp_path_factory.mktemp("dataset") / "shards"
    build_dataset([folder], root, BuildConfig(modality="fundus", size=72, jobs=1))
    return root


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
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


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


def trace(run: Path) -> list[tuple[float, ...]]:
    """What must not depend on an interruption: every number of every step, but for the clock's."""
    return [
        tuple(value for name, value in sorted(record.items()) if "time/" not in name and "second" not in name)
        for record in read_metrics(run)
    ]


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


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def uninterrupted(request: pytest.FixtureRequest, dataset: Path, tmp_path_factory: pytest.TempPathFactory):
    run = tmp_path_factory.mktemp(request.param) / "run"
    result = frepa(*arguments(dataset, run, **{"train.precision": request.param}))
    assert result.returncode == 0, result.stderr
    return request.param, run


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


def starts(run: Path) -> list[int]:
    return [r["step"] for r in read_json_lines(run / "events.jsonl") if r["event"] == "start"]


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


@in_fp32  # bf16 rounds sums in the order in which they are cut
def test_one_rank_with_accumulation_trains_as_two_without(uninterrupted, dataset, tmp_path):
    precision, whole = uninterrupted
    run = tmp_path / "run"
    changes = {"train.precision": precision, "train.micro_batch_size": 4, "train.zero_stage": 0}
    result = frepa(*arguments(dataset, run, **changes), num_ranks=1)
    assert result.returncode == 0, result.stderr
    for ours, theirs in zip(read_metrics(run), read_metrics(whole), strict=True):
        assert ours.keys() == theirs.keys()  # of the first steps, loss/hmi is none of them
        losses = [name for name in ours if name.startswith("loss")]
        for name in (*losses, "gradient_norm/student", "teacher/distance"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-5), (name, ours["step"])


def error_line(result: commands.Ended) -> str:
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("frepa: error: ")]
    assert lines, result.stderr
    return lines[0]


def test_a_damaged_sample_is_replaced_counted_and_reported(dataset, tmp_path):
    damaged = tmp_path / "shards"
    shutil.copytree(dataset, damaged)
    (shard,) = damaged.glob("fundus/*.tar")
    data = bytearray(shard.read_bytes())
    row = read_index(damaged, load_snapshot(damaged).shards[0]).slice(5, 1).to_pylist()[0]
    data[row["image_offset"] + row["image_size"] // 2] ^= 1
    shard.write_bytes(data)
    changes = {"train.micro_batch_size": 8, "train.steps": 3, "train.zero_stage": 0}
    result = frepa(*arguments(damaged, tmp_path / "one", **changes), num_ranks=1)
    assert result.returncode == 3
    assert f"sample {row['key']}" in error_line(result)
    changes["data.bad_samples"] = "skip"
    result = frepa(*arguments(damaged, tmp_path / "two", **changes), num_ranks=1)
    assert result.returncode == 0, result.stderr
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
    assert "frepa resume" in error_line(result)


@in_fp32
def test_resuming_without_a_checkpoint_is_refused_by_the_ranks_too(uninterrupted, tmp_path):
    _, run = uninterrupted
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    code = supervise(["--resume", str(tmp_path)], tmp_path, Nodes((1,)), Patience(max_restarts=0))
    assert code == 3
    assert "no complete checkpoint" in (tmp_path / "outcome.json").read_text()


def shared_memory() -> set[Path]:
    return set(Path("/dev/shm").glob("deepspeed_*"))  # noqa: S108


def test_a_stopped_command_leaves_no_rank_and_no_memory_behind(dataset, tmp_path):
    before = shared_memory()
    run = tmp_path / "run"
    parts = arguments(dataset, run, **{"train.micro_batch_size": 8, "train.steps": 10000})
    with quiet_start([sys.executable, "-m", "cluster.cli", *parts, "--num-ranks", "1"]) as process:
        wait_for_step(process, run, 1)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        assert shared_memory() > before  # while it trains: what is looked for is there
        process.terminate()
        assert process.wait(timeout=60) == 75
        _, alive = psutil.wait_procs(family, timeout=40)
    assert not alive
    assert shared_memory() <= before
    said = json.loads((run / "outcome.json").read_text())
    assert said["outcome"] == "requeue"
    assert find_checkpoint(run).name == f"step-{said['step']:08d}"


def test_a_metrics_port_in_use_ends_the_run_with_code_5(dataset, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = {"train.metrics_port": port, "train.micro_batch_size": 8}
        result = frepa(*arguments(dataset, tmp_path / "run", **settings), num_ranks=1)
    assert result.returncode == 5
    assert "train.metrics_port" in error_line(result)


def test_a_loss_that_is_not_finite_ends_the_run_with_code_4(dataset, tmp_path):
    settings = {"train.base_learning_rate": 1e30, "train.micro_batch_size": 8, "train.precision": "fp32"}
    result = frepa(*arguments(dataset, tmp_path / "run", **settings), num_ranks=1)
    assert result.returncode == 4, result.stderr
    assert "no longer finite" in error_line(result)
