"""`frepa watch`: what it shows of a run, and that it goes along with one from beginning to end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from rich.console import Console

from cluster.cli import cli
from cluster.live import RunReader, duration, frame, seconds_left, shown_names, sparkline, trend
from frepa_dist.heartbeats import Heartbeat, heartbeat_path
from frepa_dist.journal import append_event, append_line, write_outcome
from frepa_dist.runs import METRICS


def record(step, **more):
    return {"step": step, "epoch": 0, "samples": 4 * step, "loss": 1 / step, "lr": 1e-3} | {
        "samples_per_second": 8.0,
        "time/total": 0.5,
        "time/data": 0.1,
        "guard/skipped": 0.0,
        **more,
    }


def begin(run, total=100):
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text("output: here\n")
    append_event(run, "start", step=0, total_steps=total)


def shown(shot, height=60):
    console = Console(width=110, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(frame(shot, height))
    return console.export_text()


def test_a_run_that_trains(tmp_path):
    run = tmp_path / "run"
    begin(run)
    for step in range(1, 41):
        append_line(run / METRICS, record(step, **({"mi/estimate": 0.5} if step > 20 else {})))
    append_event(run, "step_skipped", step=7, not_finite=["student/loss"])
    beats = [Heartbeat(heartbeat_path(run / "heartbeats", rank), 0) for rank in range(2)]
    beats[0].beat(42)
    beats[1].beat(41)
    path = heartbeat_path(run / "heartbeats", 1)
    os.utime(path, (time.time() - 40, time.time() - 40))
    text = shown(RunReader(run).read())
    assert "training  step 42 of 100 (42.0%)" in text, "heartbeats know more than the log"
    assert "29 s left" in text
    assert "8.0 images/s" in text
    assert "no checkpoint yet" in text
    assert re.search(r"loss +0\.025 +↓ 28\.\d%", text)
    assert re.search(r"mi/estimate +0\.5 +=", text)
    assert "guard/skipped" not in text
    assert re.search(r"data +█{4} +20%", text)
    assert re.search(r"1 +training +41 +40 s ago", text)
    assert "step skipped  step 7, not finite student/loss" in text


def test_a_low_terminal_shows_what_matters_most(tmp_path):
    run = tmp_path / "run"
    begin(run)
    phases = {f"time/{name}": 0.05 for name in "abcdefgh"}
    append_line(run / METRICS, record(1, **phases, **{f"extra/{number}": number + 1 for number in range(30)}))
    for rank in range(64):
        Heartbeat(heartbeat_path(run / "heartbeats", rank), 0).beat(5)
    silent = heartbeat_path(run / "heartbeats", 33)
    os.utime(silent, (time.time() - 500, time.time() - 500))
    write_outcome(run, "failed", 5, code=5, error="lost " * 99)
    for height in (24, 30, 45):
        text = shown(RunReader(run).read(), height)
        assert len(text.splitlines()) <= height
    assert re.search(r"33 +training +5 +8 min ago", text), "who is silent is shown first"
    assert "and 53 that spoke later" in text
    assert "in metrics.jsonl" in text


def test_going_back_and_starting_again_are_followed(tmp_path):
    run = tmp_path / "run"
    reader = RunReader(run)
    assert reader.read().status is None
    begin(run)
    assert "nothing is logged yet" in shown(reader.read())
    for step in range(1, 9):
        append_line(run / METRICS, record(step))
    assert len(reader.read().records) == 8
    kept = (run / METRICS).read_text().splitlines(keepends=True)[:4]
    (run / "new").write_text("".join(kept))
    (run / "new").replace(run / METRICS)
    append_event(run, "went_back", step=8, to_step=4)
    shot = reader.read()
    assert [line["step"] for line in shot.records] == [1, 2, 3, 4]
    assert "went back  step 8, to step 4" in shown(shot)
    append_line(run / METRICS, record(5))
    assert [line["step"] for line in reader.read().records] == [1, 2, 3, 4, 5]


def test_it_is_over_when_nobody_can_start_it_again(tmp_path):
    run = tmp_path / "run"
    begin(run)
    reader = RunReader(run)
    assert not reader.read().is_over
    write_outcome(run, "failed", 5, code=5, error="rank 1 was killed")
    shot = reader.read()
    assert not shot.is_over, "a supervisor may be about to start it again"
    assert "rank 1 was killed" in shown(shot)
    os.utime(run / "outcome.json", (time.time() - 60, time.time() - 60))
    assert reader.read().is_over
    (run / "outcome.json").unlink()
    assert not reader.read().is_over
    write_outcome(run, "done", 100)
    assert reader.read().is_over


def test_the_command_goes_along_with_a_run_without_torch(tmp_path):
    run = tmp_path / "run"
    code = (
        "import sys, cluster.cli\n"
        "try: cluster.cli.main()\n"
        "finally: print('HEAVY', sorted({'torch', 'numpy', 'ray'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "watch", str(run), "--every", "0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(0.7)
        assert process.poll() is None, "it waits for the run"
        begin(run, total=3)
        append_line(run / METRICS, record(3))
        time.sleep(0.3)
        assert process.poll() is None
        write_outcome(run, "done", 3)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "done  step 3 of 3 (100.0%)" in out
    assert "HEAVY []" in out


def test_once_prints_a_frame(tmp_path):
    told = CliRunner().invoke(cli, ["watch", str(tmp_path / "later"), "--once"])
    assert told.exit_code == 0
    assert "waiting for a run to begin" in told.output


def test_small_things():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([2.0] * 5, 3) == "▄▄▄"
    assert sparkline([float("nan")], 3) == ""
    assert trend([4.0] * 6 + [2.0] * 2) == "↓ 50.0%"
    assert trend([0.0] * 6 + [1.0] * 2) == "↑"
    assert trend([1.0, 2.0]) == ""
    assert seconds_left([{"time/total": 2.0}], 10) == 20
    assert seconds_left([], 10) is None
    assert seconds_left([{"time/total": 2.0}], -1) is None, "how long it is, is not known"
    assert [duration(s) for s in (5, 300, 3 * 3600 + 120, 200_000)] == [
        "5 s",
        "5 min",
        "3 h 2 min",
        "2.3 days",
    ]
    names = shown_names([record(1, **{"mi/skipped": 0.0, "guard/spikes": 1.0, "loss/rec": 1.0})])
    assert names == ["loss", "loss/rec", "guard/spikes", "lr"]


@pytest.mark.parametrize("broken", ['{"step": 1}', '{"step": 1, "loss": null}'])
def test_odd_lines_do_no_harm(tmp_path, broken):
    run = tmp_path / "run"
    begin(run)
    (run / METRICS).write_text(json.dumps(record(1)) + "\n" + broken + "\n")
    shown(RunReader(run).read())
