"""A launcher and ranks that do as they are told, in place of DeepSpeed's and of training: no torch.

python scripted_ranks.py PLAN.json 0,1 --config X --supervised RUN

PLAN.json holds a list: for each start, what each rank does, as words of `act`. RUN/starts counts starts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster.launch import is_alive
from frepa_dist.heartbeats import Heartbeat, heartbeat_path, read_pulse

SECONDS = 0.02
# the launcher kills ranks that have not ended by then, though their checkpoint takes longer
PATIENCE_SECONDS, CHECKPOINT_SECONDS = 2.0, 3.0


def launch(plan: Path, numbers: str, run: Path) -> int:
    """As DeepSpeed's launcher: start the ranks, and end them when one fails."""
    count = run / "starts"
    start = int(count.read_text()) if count.exists() else 0
    count.write_text(str(start + 1))
    (run / "config.yaml").touch()
    with (run / "arguments").open("a") as file:
        file.write(" ".join(sys.argv[3:]) + "\n")
    acts = json.loads(plan.read_text())[start]
    ranks = []
    for number, words in zip(numbers.split(","), acts, strict=True):
        command = [sys.executable, __file__, "rank", number, numbers, words, str(run)]
        ranks.append(subprocess.Popen(command))

    def end(*_: object) -> None:
        for process in ranks:
            process.terminate()
        time.sleep(PATIENCE_SECONDS)
        for process in ranks:
            process.kill()
        sys.exit(1)

    signal.signal(signal.SIGTERM, end)
    while any(process.poll() is None for process in ranks):
        failed = [process.returncode for process in ranks if process.poll()]
        if failed:
            for process in ranks:
                process.terminate()
            sys.exit(failed[0])
        time.sleep(SECONDS)
    return 0


def all_alive(numbers: str, run: Path) -> bool:
    """Whether no rank has died without a last word."""
    pulses = [read_pulse(heartbeat_path(run / "heartbeats", rank)) for rank in map(int, numbers.split(","))]
    return all(pulse is not None and (pulse.is_over or is_alive(pulse.pid)) for pulse in pulses)


def act(rank: int, numbers: str, words: str, run: Path) -> int:
    """Do what is told, word by word, once all ranks are there."""
    asked: list[int] = []
    heartbeat = Heartbeat(None)
    signal.signal(signal.SIGTERM, lambda *_: (asked.append(1), heartbeat.stopping()))
    heartbeat = Heartbeat(heartbeat_path(run / "heartbeats", rank), 0.0)
    while not all(
        heartbeat_path(run / "heartbeats", other).exists() for other in map(int, numbers.split(","))
    ):
        time.sleep(SECONDS / 4)
    told = iter(words.split())
    step = 0
    for word in told:
        if word == "steps":
            for _ in range(int(next(told))):
                step += 1
                heartbeat.beat(step)
        elif word == "save":
            folder = run / "checkpoints" / f"step-{int(next(told)):08d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").write_text("{}")
        elif word == "slow":  # to save
            pass
        elif word == "outcome":
            (run / "outcome.json").write_text((run / "bad").read_text())
        elif word == "say":
            print(f"rank {rank} says hello", flush=True)
        elif word == "pid":
            (run / f"pid-{rank}").write_text(f"{os.getpid()} {os.getpgrp()}")
        elif word == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "kill-launcher":
            os.kill(os.getppid(), signal.SIGKILL)
        elif word == "ask-launcher":
            os.kill(os.getppid(), signal.SIGTERM)
        elif word == "ask-supervisor":
            os.kill(int((run / "supervisor").read_text()), signal.SIGTERM)
        elif word == "stand":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif word == "fail":
            code = int(next(told))
            heartbeat.end("failed", code=code, error=f"failure {code}")
            return code
        elif word == "lose":
            heartbeat.end("failed", code=5, error="connection lost", lost_peer=True)
            return 5
        elif word == "crash":
            raise RuntimeError("boom")
        elif word == "train":  # for ever, until asked
            while not asked:
                step += 1
                heartbeat.beat(step)
                time.sleep(SECONDS)
            time.sleep(CHECKPOINT_SECONDS if "slow" in words else 0)
            if not all_alive(numbers, run):  # the barrier behind a checkpoint fails
                heartbeat.end("failed", code=5, error="connection lost", lost_peer=True)
                return 5
            heartbeat.end("requeue")
            if rank == 0:
                (run / "outcome.json").write_text(json.dumps({"outcome": "requeue", "step": step}))
            return 75
        elif word == "pause":
            time.sleep(0.4)
        elif word == "wait":  # for nothing that comes
            time.sleep(1000)
        elif word == "done":
            heartbeat.end("done")
            return 0
        else:
            raise ValueError(word)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        sys.exit(act(int(sys.argv[2]), sys.argv[3], sys.argv[4], Path(sys.argv[5])))
    sys.exit(launch(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[sys.argv.index("--supervised") + 1])))
