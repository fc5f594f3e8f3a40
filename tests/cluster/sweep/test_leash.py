"""A process ends when its starter does."""

from __future__ import annotations

import subprocess
import sys
import time

from cluster.sweep.leash import Leashed

SLEEPER = (
    "import time; from cluster.sweep.leash import watch; watch(0); print('up', flush=True); time.sleep(60)"
)


def test_a_process_is_asked_to_stop_when_its_starter_is_gone():
    # the starter holds the leash, says who is on it, and is killed
    starter = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {SLEEPER!r}], stdin=subprocess.PIPE)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        process.kill()
        begin = time.monotonic()
        assert process.stdout.read() == b""  # the child held it open too
        assert time.monotonic() - begin < 20


def test_a_command_on_a_leash_runs_and_tells_its_status(tmp_path):
    log = tmp_path / "log"
    command = Leashed(["sweep"], log)
    deadline = time.monotonic() + 60
    while command.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert command.poll() == 2
    assert "name a sweep config" in log.read_text()


def test_ending_it_asks_first_and_then_insists(tmp_path, monkeypatch):
    stubborn = (
        "import signal, time, sys\n"
        "asked = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: asked.append(1))\n"
        "signal.signal(signal.SIGINT, lambda *_: asked and sys.exit(75))\n"
        "print('up', flush=True)\n"
        "time.sleep(60)"
    )
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", stubborn], **options)
    )
    log = tmp_path / "log"
    command = Leashed([], log)
    while "up" not in log.read_text():
        time.sleep(0.02)
    command.end()
    assert command.poll() == 75  # by SIGINT, not by SIGKILL
