"""The report of a run that goes on: written when there is something new, and a last time at the end."""

from __future__ import annotations

import os
import threading
import time

from cluster import cli
from frepa_dist.evaluate.report_live import keep_report
from frepa_dist.journal import append_line, write_outcome
from shards.support.errors import DataError
from tests.commands import frepa


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_goes_along_with_a_run(tmp_path, capsys):
    run, written = tmp_path / "run", []

    def write(refresh):
        written.append(refresh)
        if len(written) == 2:
            raise DataError("a checkpoint goes just now")

    keeper = threading.Thread(target=keep_report, args=(run, write, 0.05))
    keeper.start()
    time.sleep(0.15)
    assert not written, "it waits for the run to begin"
    run.mkdir()
    (run / "config.yaml").write_text("")
    wait_for(lambda: len(written) == 1)
    time.sleep(0.2)
    assert len(written) == 1, "nothing is new"
    append_line(run / "metrics.jsonl", {"step": 1})
    wait_for(lambda: len(written) == 3)  # the second failed, and is tried again
    assert "a checkpoint goes just now" in capsys.readouterr().err
    write_outcome(run, "failed", 1)
    wait_for(lambda: len(written) == 4)
    time.sleep(0.2)
    assert keeper.is_alive(), "it may be started again"
    write_outcome(run, "done", 2)
    keeper.join(10)
    assert not keeper.is_alive()
    assert written[-1] is None
    assert set(written[:-1]) == {0.05}


def test_who_stops_it_gets_a_last_page(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    written = []
    assert keep_report(tmp_path, written.append, 60, lambda: bool(written)) == 2
    assert written == [60, None]


def test_the_command_gives_way_to_training(run_dir, monkeypatch):
    nice = []
    monkeypatch.setattr(os, "nice", nice.append)
    write_outcome(run_dir, "done", 12)
    assert cli.os is os
    ended = frepa("report", run_dir, "--every", 5)
    assert ended.returncode == 0, ended.stderr
    assert nice == [19]
    assert 'http-equiv="refresh"' not in (run_dir / "report.html").read_text()
