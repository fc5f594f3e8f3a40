from __future__ import annotations

import json
import os
import time

import pytest

from frepa_dist.heartbeats import Heartbeat, heartbeat_path
from frepa_dist.journal import append_event, write_outcome
from frepa_dist.status import describe_run
from shards.support.errors import DataError


def test_a_run_that_ended_says_how(run_dir):
    append_event(run_dir, "start", step=0, total_steps=12)
    write_outcome(run_dir, "done", 12)
    status = describe_run(run_dir)
    assert (status.state, status.step, status.total_steps, status.checkpoints) == ("done", 12, 12, [12])
    text = status.describe()
    assert "done, step 12 of 12" in text
    assert "loss 0.0833, 8.0 images/s" in text
    assert "faults" not in text
    write_outcome(run_dir, "failed", -1, code=3, error="rank 1: a damaged sample")
    assert "a damaged sample" in describe_run(run_dir).describe()


def test_a_run_that_trains_says_what_each_rank_does(run_dir):
    append_event(run_dir, "start", step=0, total_steps=120)
    append_event(run_dir, "fault", node=0, cause="rank 1 was killed", code=5, checkpoint=4)
    append_event(run_dir, "restart", node=0, number=1)
    append_event(run_dir, "sample_skipped", step=3)
    for rank in (1, 0):
        Heartbeat(heartbeat_path(run_dir / "heartbeats", rank), 0).beat(13 + rank)
    status = describe_run(run_dir)
    assert status.state == "training"
    assert [(rank.rank, rank.step) for rank in status.ranks] == [(0, 13), (1, 14)]
    text = status.describe()
    assert "min left" in text
    assert "faults       1, 1 restarts; the last: rank 1 was killed" in text
    assert "sample skipped" in text
    path = heartbeat_path(run_dir / "heartbeats", 0)
    for rank in (0, 1):
        path = heartbeat_path(run_dir / "heartbeats", rank)
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))
    assert describe_run(run_dir).state == "silent"
    assert "left" not in describe_run(run_dir).describe()


def test_a_run_whose_ranks_say_nothing_trains_while_it_logs(run_dir):
    append_event(run_dir, "start", step=0, total_steps=12)
    assert describe_run(run_dir).state == "training"
    for name in ("metrics.jsonl", "events.jsonl"):
        os.utime(run_dir / name, (0, time.time() - 3600))
    assert describe_run(run_dir).state == "killed"


def test_a_run_of_which_no_rank_is_at_work_was_killed(run_dir):
    (run_dir / "metrics.jsonl").unlink()
    assert describe_run(run_dir).state == "killed"
    Heartbeat(heartbeat_path(run_dir / "heartbeats", 0), 0).end("failed", code=5, error="lost")
    assert describe_run(run_dir).state == "killed"


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a run folder"):
        describe_run(tmp_path)


def test_the_command_prints_lines_or_json(run_dir):
    from click.testing import CliRunner

    from cluster.cli import cli

    result = CliRunner().invoke(cli, ["status", str(run_dir)])
    assert result.exit_code == 0
    assert result.output.startswith("run          ")
    told = json.loads(CliRunner().invoke(cli, ["status", str(run_dir), "--json"]).output)
    assert told["checkpoints"] == [12]
