"""Whole sweeps with real Ray and real training, at the size of a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from cluster.sweep.journal import read_journal
from cluster.sweep.layout import Layout, load_sweep
from cluster.sweep.points import lookup
from frepa_dist.config import RunConfig
from frepa_dist.runs import ENVIRONMENT, load_run_config, read_json_lines
from shards.builder.build import BuildConfig, build_dataset
from shards.support.settings import load_settings
from tests import commands
from tests.commands import ON_CPU

pytestmark = [pytest.mark.distributed, pytest.mark.ray, pytest.mark.timeout(900)]

SOAK = int(os.environ.get("FREPA_SOAK_REPEATS", "20"))
WEIGHT, RATE = "method.hmi.weight", "train.base_learning_rate"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(12):
        coarse = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((72, 72))
        noisy = np.asarray(coarse, dtype=np.int16) + rng.integers(-20, 20, (72, 72, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def dataset(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dataset") / "shards"
    build_dataset([images], root, BuildConfig(modality="fundus", size=72, jobs=1))
    return root


def write_sweep(path: Path, images: Path, dataset: Path, **over: object) -> Path:
    """A sweep over the learning rate, in which every trial takes 4 steps and reports twice."""
    sweep = {
        "base": "demo/mae",
        "set": {
            "data.root": str(dataset),
            "method": {"model": {"size": "tiny", "image_size": 64}, "norm_pix_loss": False},
            "train.global_batch_size": 4,
            "train.micro_batch_size": 2,
            "train.steps": 4,
            "train.log_every": 1,
            "train.checkpoint_every": 2,
            "train.precision": "fp32",
            "train.zero_stage": 0,
        },
        "space": {RATE: {"loguniform": [1e-4, 1e-1]}},
        "metric": {"kind": "high_band", "images": str(images), "num": 4},
        "scheduler": {"kind": "asha", "reduction": 2},
        "num_trials": 3,
        "max_concurrent": 1,  # so that the order in which reports come, and ASHA's choices, are the same
        "max_failures": 0,
        "resources": {"cpus_per_worker": 0.5},
        "output": str(path.parent / path.stem),
    }
    path.write_text(json.dumps({**sweep, **over}))  # JSON is YAML
    return path


def leftover(root: Path) -> list[psutil.Process]:
    """Processes of trials of a sweep."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid != os.getpid() and any(str(root) in part for part in process.info["cmdline"] or [])
    ]


def outcome(root: Path) -> list[tuple[object, ...]]:
    """All that was found out, and decided, in a sweep."""
    return [
        (trial.name, trial.state, tuple((report.step, report.value) for report in trial.reports))
        for trial in sorted(read_journal(Layout(root).journal), key=lambda trial: trial.name)
    ]


@pytest.fixture(scope="module")
def swept(
    images: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, commands.Ended]:
    config = write_sweep(tmp_path_factory.mktemp("sweep") / "three.yaml", images, dataset)
    return config.parent / "three", commands.frepa("sweep", config)


def test_a_sweep_ends_well_and_shows_its_table(swept):
    root, ended = swept
    assert ended.returncode == 0, ended.stderr
    assert "high_band" in ended.stdout
    assert str(root / "best.yaml") in ended.stdout
    for name in ("table.csv", "table.json", "report.html"):
        assert (root / name).is_file()
    assert "3 waiting" not in ended.stderr.splitlines()[-1]


def test_each_trial_is_a_run_of_its_own_that_trained_with_its_values(swept):
    root, _ = swept
    trials = read_journal(Layout(root).journal)
    assert len(trials) == 3
    rates = set()
    for trial in trials:
        run = Layout(root).run(trial.name)
        resolved = yaml.safe_load((run / "config.yaml").read_text())
        assert lookup(resolved, RATE) == trial.values[RATE]
        peak = max(record["lr"] for record in read_json_lines(run / "metrics.jsonl"))
        assert peak == pytest.approx(trial.values[RATE] * 4 / 256)  # it reached the optimizer
        assert json.loads((run / ENVIRONMENT).read_text())["threads"] == 1, "of half a core"
        rates.add(trial.values[RATE])
    assert len(rates) == 3


def test_asha_ends_who_is_behind_and_the_best_is_who_came_to_the_end(swept):
    root, _ = swept
    first, *others = sorted(read_journal(Layout(root).journal), key=lambda trial: trial.name)
    assert first.state == "done"
    for trial in others:  # half of those that came as far go on
        before = [other.reports[0].value for other in (first, *others) if other.name < trial.name]
        assert (trial.state == "stopped") == (trial.reports[0].value > np.median(before))
    best = load_settings(RunConfig, root / "best.yaml")
    done = {t.value: t for t in (first, *others) if t.state == "done"}
    assert best.train.base_learning_rate == done[min(done)].values[RATE]
    assert best.output == root / "best"
    assert best.data.snapshot == load_run_config(Layout(root).run("000")).data.snapshot


def test_a_report_is_the_metric_of_its_checkpoint(swept):
    from cluster.sweep.measure import measure

    root, _ = swept
    (trial, *_) = [t for t in read_journal(Layout(root).journal) if t.state == "done"]
    value, _ = measure(Layout(root).run(trial.name), 4, load_sweep(root).metric)
    assert value == pytest.approx(trial.reports[-1].value, rel=1e-6)


def test_no_process_of_a_trial_is_left(swept):
    root, _ = swept
    wait_until_gone(root, 5)  # they have ended, and may be on their way out


def test_a_folder_that_holds_a_sweep_is_not_begun_anew(swept):
    root, _ = swept
    ended = commands.frepa("sweep", root.parent / "three.yaml")
    assert ended.returncode == 2
    assert f"frepa sweep --resume {root}" in ended.stderr
    changed = commands.frepa("sweep", root.parent / "three.yaml", "--or-resume", "--set", "seed=5")
    assert changed.returncode == 2
    assert "seed differ" in changed.stderr


def start(config: Path, *parts: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cluster.cli", "sweep", *parts, *([str(config)] if not parts else [])]
    log = config.with_suffix(".log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **ON_CPU})


def wait_until_gone(root: Path, seconds: float) -> float:
    begin = time.monotonic()
    while leftover(root):
        assert time.monotonic() - begin < seconds, [p.cmdline() for p in leftover(root)]
        time.sleep(0.2)
    return time.monotonic() - begin


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_a_driver_that_is_killed_at_random_resumes_to_the_same_best(images, dataset, tmp_path, capsys):
    trials, kills, moments = 12, min(SOAK, 3), np.random.default_rng(0)
    sizes = {"num_trials": trials}
    whole = write_sweep(tmp_path / "whole.yaml", images, dataset, **sizes)
    assert commands.frepa("sweep", whole).returncode == 0
    killed = write_sweep(tmp_path / "killed.yaml", images, dataset, **sizes)
    root, gone, reports_before = tmp_path / "killed", [], 0
    process = start(killed)
    for kill in range(kills):
        wanted = int(moments.integers(trials * kill // kills, trials * (kill + 1) // kills)) + 1
        while sum(len(t.reports) for t in read_journal(Layout(root).journal)) < wanted:
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(moments.uniform(0, 8))
        process.send_signal(signal.SIGKILL)
        process.wait()
        reports_before = sum(len(t.reports) for t in read_journal(Layout(root).journal))
        gone.append(wait_until_gone(root, 300))
        process = start(killed, "--resume", str(root))
    assert process.wait(timeout=2 * 3600) == 0
    assert outcome(root) == outcome(tmp_path / "whole")
    for name in {path.stem for path in Path(root, "trials").glob("*.yaml")}:
        steps = [r["step"] for r in read_json_lines(root / "trials" / name / "metrics.jsonl")]
        assert steps == sorted(set(steps)), "a trial was trained twice on one folder"
    ours, theirs = ((folder / "best.yaml").read_text() for folder in (root, tmp_path / "whole"))
    assert ours.replace(str(root), "") == theirs.replace(str(tmp_path / "whole"), "")
    with capsys.disabled():
        told = ", ".join(f"{seconds:.1f}" for seconds in gone)
        print(f"\n{kills} kills, the last after {reports_before} reports; processes gone after {told} s")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_driver_that_is_asked_to_stop_ends_in_order_and_says_how_to_go_on(images, dataset, tmp_path):
    config = write_sweep(tmp_path / "asked.yaml", images, dataset)
    root = tmp_path / "asked"
    process = start(config)
    while not read_journal(Layout(root).journal):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=600) == 75
    assert f"frepa sweep --resume {root}" in config.with_suffix(".log").read_text()
    wait_until_gone(root, 300)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_two_trials_of_two_workers_each_run_at_once(images, dataset, tmp_path):
    config = write_sweep(
        tmp_path / "wide.yaml",
        images,
        dataset,
        num_trials=2,
        max_concurrent=2,
        scheduler={"kind": "none"},
        resources={"workers": 2, "cpus_per_worker": 0.5},
    )
    ended = commands.frepa("sweep", config)
    assert ended.returncode == 0, ended.stderr
    root = tmp_path / "wide"
    starts = {}
    for name in ("000", "001"):
        run = Layout(root).run(name)
        assert json.loads((run / "environment.json").read_text())["world_size"] == 2
        events = read_json_lines(run / "events.jsonl")
        starts[name] = [events[0]["time"], events[-1]["time"]]
    assert max(first for first, _ in starts.values()) < min(last for _, last in starts.values())
    assert not leftover(root)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_several_nodes_are_bundles_of_one_placement_group(images, dataset, tmp_path):
    """Two supervisors on one machine stand for two nodes: nothing here is a second one."""
    config = write_sweep(
        tmp_path / "nodes.yaml",
        images,
        dataset,
        num_trials=1,
        scheduler={"kind": "none"},
        resources={"workers": 2, "nodes": 2, "cpus_per_worker": 0.5},
    )
    ended = commands.frepa("sweep", config)
    assert ended.returncode == 0, ended.stderr
    run = Layout(tmp_path / "nodes").run("000")
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert (run / "logs" / "launcher-1.log").is_file()
    assert not leftover(tmp_path / "nodes")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_trial_that_fails_is_tried_again_told_and_passed_over(images, dataset, tmp_path):
    config = write_sweep(
        tmp_path / "failing.yaml",
        images,
        dataset,
        scheduler={"kind": "none"},
        space={RATE: {"grid": [1e-3, 1e30]}},  # the second diverges
        num_trials=1,
        max_failures=1,
    )
    ended = commands.frepa("sweep", config, "--set", "set.train.guard.patience=1")
    root = tmp_path / "failing"
    assert ended.returncode == 5
    assert "1 of 2 trials failed (001: " in ended.stderr
    assert "no longer finite" in ended.stderr
    good, bad = sorted(read_journal(Layout(root).journal), key=lambda trial: trial.name)
    assert (good.state, bad.state, len(bad.failures)) == ("done", "failed", 2)
    assert "no longer finite" in (root / "table.csv").read_text()
    assert load_settings(RunConfig, root / "best.yaml").train.base_learning_rate == 1e-3
    assert not leftover(root)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_pbt_gives_the_worst_the_checkpoint_and_the_settings_of_the_best(images, dataset, tmp_path):
    config = write_sweep(
        tmp_path / "pbt.yaml",
        images,
        dataset,
        space={RATE: {"loguniform": [1e-4, 1e-1]}, "method.mask_ratio": {"uniform": [0.5, 0.9]}},
        scheduler={"kind": "pbt", "quantile": 0.5, "interval_reports": 1},
        num_trials=2,
        max_concurrent=2,
        max_failures=1,
    )
    # long enough for the later of the two to report while the earlier one still trains
    ended = commands.frepa("sweep", config, "--set", "set.train.steps=40")
    assert ended.returncode == 0, ended.stderr
    root = tmp_path / "pbt"
    entries = [e for e in read_json_lines(root / "journal.jsonl") if e["event"] == "trial" and e["parent"]]
    assert entries, "nobody went on from anybody"
    for entry in entries:
        run = Layout(root).run(entry["name"])
        forked = read_json_lines(run / "events.jsonl")[0]
        assert forked["event"] == "forked"
        assert forked["run"] == str(Layout(root).run(entry["parent"]))
        for key, (before, now) in forked["changed"].items():
            if key in entry["values"]:
                assert (
                    lookup(yaml.safe_load((run / "config.yaml").read_text()), key)
                    == now
                    == entry["values"][key]
                )
                parent = yaml.safe_load((Path(forked["run"]) / "config.yaml").read_text())
                assert lookup(parent, key) == before
        metrics = read_json_lines(run / "metrics.jsonl")
        if metrics:  # its first step is the one behind its parent's checkpoint
            assert metrics[0]["step"] == forked["step"] + 1
    assert not leftover(root)
