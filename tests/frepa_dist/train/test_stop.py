from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from frepa_dist.heartbeats import Heartbeat, read_pulse
from frepa_dist.train.stop import Control

SCRIPT = Path(__file__).with_name("stop_ranks.py")


@pytest.fixture(scope="module")
def stops(tmp_path_factory):
    """Steps after which each of two ranks stopped, by case."""
    folder = tmp_path_factory.mktemp("stop")
    ranks = [subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(folder)]) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_ranks_stop_after_the_same_step_whoever_is_asked(stops):
    assert stops[0] == stops[1]


@pytest.mark.parametrize(
    ("case", "first", "last"),
    [
        ("signal to 0 before any step", 2, 2),
        ("SIGUSR1 to 1", 8, 8),
        ("both at other steps", 4, 4),
        ("while it waits", 6, 7),
        ("closed", 3, 3),
        ("none", -1, -1),
    ],
)
def test_a_request_is_followed_after_the_next_step(stops, case, first, last):
    assert first <= stops[0][case] <= last


class Alone:
    size = 1


def test_a_rank_alone_stops_after_the_step_in_which_it_was_asked():
    control = Control()
    control.join(Alone())
    before = signal.getsignal(signal.SIGTERM)
    with control.listening():
        assert not control.after_step(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert control.after_step(2)
        assert control.agreed
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_heartbeat_tells_of_steps_requests_and_the_end(tmp_path):
    path = tmp_path / "heartbeats" / "rank-0.json"
    heartbeat = Heartbeat(path, interval_seconds=1000)
    control = Control(heartbeat)
    assert read_pulse(path).state == "starting"
    control.after_step(1)
    heard = read_pulse(path)
    assert (heard.state, heard.step, heard.pid) == ("training", 1, os.getpid())
    control.after_step(2)
    assert read_pulse(path) == heard  # not at every step
    control.ask()
    assert (read_pulse(path).state, read_pulse(path).step) == ("stopping", 2)
    control.after_step(3)
    assert read_pulse(path).state == "stopping"
    heartbeat.end("failed", code=3, error="é\n" * 3000)
    heard = read_pulse(path)
    assert (heard.step, heard.code, heard.is_over) == (3, 3, True)
    assert heard.error.startswith("é\né")


def test_a_heartbeat_needs_no_new_room_on_the_disk(tmp_path):
    path = tmp_path / "rank-0.json"
    heartbeat = Heartbeat(path, interval_seconds=0)
    before = path.stat()
    for step in range(1, 10_000, 1000):
        heartbeat.beat(step)
    heartbeat.end("failed", code=5, error="x" * 10_000)
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_blocks) == (before.st_ino, before.st_size, before.st_blocks)


def test_a_torn_heartbeat_is_no_news(tmp_path):
    path = tmp_path / "rank-0.json"
    path.write_text('{"pid": 1, "cou')
    assert read_pulse(path) is None
    assert read_pulse(tmp_path / "none") is None
