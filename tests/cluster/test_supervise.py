"""The supervisor with real processes that follow a script in place of training (scripted_ranks.py)."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.launch import group_members, is_alive
from cluster.nodes import Nodes
from cluster.supervise import supervise
from cluster.verdict import Patience
from frepa_dist.heartbeats import blank
from frepa_dist.runs import read_json_lines
from shards.stores.store import lock_folder
from shards.support.errors import EnvironmentFault

SCRIPT = Path(__file__).with_name("scripted_ranks.py")
QUICK = Patience(
    max_restarts=2,
    hang_seconds=2.5,
    start_seconds=20,
    backoff_seconds=0.01,
    grace_seconds=1,
    poll_seconds=0.02,
)


def run_plan(
    run: Path,
    *starts: tuple[str, ...],
    patience: Patience = QUICK,
    slots: tuple[int, ...] = (),
    node_rank: int = 0,
) -> int:
    """Supervise starts in each of which each rank does as it is told."""
    run.mkdir(exist_ok=True)
    (run / "supervisor").write_text(str(os.getpid()))
    plan = run / "plan.json"
    plan.write_text(json.dumps(starts))

    def command(arguments, nodes, _):
        return [sys.executable, str(SCRIPT), str(plan), ",".join(map(str, nodes.local_ranks)), *arguments]

    nodes = Nodes(slots or (len(starts[0]),), node_rank, master_port=29400 if slots else None)
    return supervise(["--config", "x"], run, nodes, patience, command)


def events(run: Path, name: str) -> list[dict]:
    return [event for event in read_json_lines(run / "events.jsonl") if event["event"] == name]


def causes(run: Path) -> list[str]:
    return [event["cause"] for event in events(run, "fault")]


def outcome(run: Path) -> dict:
    return json.loads((run / "outcome.json").read_text())


def test_a_run_without_faults_is_started_once(tmp_path):
    assert run_plan(tmp_path, ("steps 3 done", "steps 3 done")) == 0
    assert (tmp_path / "starts").read_text() == "1"
    assert not (tmp_path / "events.jsonl").exists()


@pytest.mark.parametrize(
    ("acts", "cause"),
    [
        (("steps 3 train", "steps 3 kill"), "rank 1 was killed at about step 3 (SIGKILL"),
        (("steps 2 kill", "steps 3 train"), "rank 0 was killed at about step 2 (SIGKILL"),
        (("steps 3 kill", "steps 3 kill"), "ranks 0, 1 were killed at about step 3"),
        (("steps 3 lose", "steps 3 kill"), "rank 1 was killed at about step 3"),
        (("steps 3 lose", "steps 3 fail 5"), "rank 1: failure 5"),
        (("steps 3 stand", "steps 4 train"), "rank 0 hung at about step"),
        (("steps 3 kill-launcher train", "steps 3 train"), "the launcher was killed by SIGKILL"),
        (("steps 3 train", "crash"), "rank 1 ended before the first step with status 1; see"),
    ],
    ids=["rank", "rank0", "all", "peer", "failure", "stopped", "launcher", "crash"],
)
def test_after_a_fault_all_ranks_start_again_and_the_cause_is_told(tmp_path, capfd, acts, cause):
    assert run_plan(tmp_path, acts, ("steps 9 done", "steps 9 done")) == 0
    (told,) = causes(tmp_path)
    assert told.startswith(cause)
    first, second = (tmp_path / "arguments").read_text().splitlines()
    assert first.startswith("--config x --supervised")
    assert second.startswith(f"--resume {tmp_path} --or-begin")
    assert f"frepa: {told}; restart 1 of 2 in" in capfd.readouterr().err


def test_a_stopped_rank_is_named_as_such_and_nothing_of_it_is_left(tmp_path):
    start = time.monotonic()
    assert run_plan(tmp_path, ("steps 3 train", "pid steps 3 stand"), ("done", "done")) == 0
    assert "rank 1 hung" in causes(tmp_path)[0]
    assert "stopped by a signal" in causes(tmp_path)[0]
    assert not is_alive(int((tmp_path / "pid-1").read_text().split()[0]))
    assert time.monotonic() - start < 30


def test_a_clock_that_is_set_back_ends_nothing_and_hides_nothing(tmp_path, monkeypatch):
    real, beginning = time.time, time.time()
    monkeypatch.setattr(time, "time", lambda: beginning - 1e5 * (real() - beginning))
    assert run_plan(tmp_path, ("steps 3 train", "steps 3 stand"), ("steps 9 done", "steps 9 done")) == 0
    (cause,) = causes(tmp_path)
    assert "rank 1 hung" in cause


def test_a_start_may_take_longer_than_a_step_but_not_for_ever(tmp_path):
    patience = replace(QUICK, hang_seconds=0.2, start_seconds=4)
    begin = time.monotonic()
    assert run_plan(tmp_path, ("stand",), ("steps 1 stand",), ("done",), patience=patience) == 0
    first, second = causes(tmp_path)
    assert "rank 0 hung before the first step" in first
    assert "rank 0 hung at about step 1" in second
    assert time.monotonic() - begin > 4


@pytest.mark.parametrize("code", [2, 3, 4])
def test_errors_that_will_not_pass_are_not_tried_again(tmp_path, capfd, code):
    assert run_plan(tmp_path, ("steps 1 lose", f"steps 1 fail {code}")) == code
    assert outcome(tmp_path) == {
        "outcome": "failed",
        "step": -1,
        "code": code,
        "error": f"rank 1: failure {code}",
    }
    assert capfd.readouterr().err.count("frepa: error: ") == 1


def test_restarts_without_progress_are_counted_and_progress_gives_them_back(tmp_path, capfd):
    fail = "steps 1 fail 5"
    starts = [(fail,), (fail,), (f"save 4 {fail}",), (fail,), (fail,)]
    assert run_plan(tmp_path, *starts) == 5
    assert (tmp_path / "starts").read_text() == "5"
    assert [event["number"] for event in events(tmp_path, "restart")] == [1, 2, 1, 2]
    assert "given up after 2 restarts without progress" in capfd.readouterr().err
    assert outcome(tmp_path)["step"] == 4


def test_the_same_bug_twice_in_one_place_is_not_tried_a_third_time(tmp_path):
    assert run_plan(tmp_path, ("fail 1",), ("fail 1",)) == 1


@pytest.mark.parametrize("whom", ["ask-supervisor", "ask-launcher"])
def test_whoever_is_asked_to_stop_lets_ranks_save_for_as_long_as_they_need(tmp_path, whom):
    patient = replace(QUICK, hang_seconds=30)
    assert run_plan(tmp_path, (f"steps 3 {whom} slow train", "steps 3 slow train"), patience=patient) == 75
    assert outcome(tmp_path)["outcome"] == "requeue"
    assert not causes(tmp_path)


def test_a_rank_that_hangs_while_it_should_stop_is_ended_and_the_run_requeued(tmp_path):
    assert run_plan(tmp_path, ("save 2 steps 3 ask-supervisor wait", "steps 3 stand")) == 75
    assert outcome(tmp_path) == {"outcome": "requeue", "step": 2}
    assert "hung" in causes(tmp_path)[0]


def test_asked_while_it_waits_for_the_next_start_it_ends_at_once(tmp_path):
    patient = Patience(max_restarts=2, backoff_seconds=600, grace_seconds=0.2, poll_seconds=0.02)

    def ask() -> None:
        wait_until(lambda: bool(events(tmp_path, "restart")))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    assert run_plan(tmp_path, ("kill",), patience=patient) == 75
    thread.join()


def test_asked_twice_from_the_keyboard_it_does_not_wait_for_the_checkpoint(tmp_path):
    def ask() -> None:
        for _ in range(2):
            wait_until((tmp_path / "pid-0").exists)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    thread = threading.Thread(target=ask)
    thread.start()
    assert run_plan(tmp_path, ("steps 1 pid wait",), patience=replace(QUICK, hang_seconds=100)) == 75
    thread.join()
    assert outcome(tmp_path)["outcome"] == "requeue"
    assert not is_alive(int((tmp_path / "pid-0").read_text().split()[0]))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ranks_that_never_start_are_told_by_what_was_printed_last(tmp_path):
    # a plan without ranks: the launcher itself fails
    assert run_plan(tmp_path, ("done",), patience=Patience(0, poll_seconds=0.02, grace_seconds=0.1)) == 0
    (tmp_path / "starts").write_text("7")
    assert run_plan(tmp_path, ("done",), patience=Patience(0, poll_seconds=0.02, grace_seconds=0.1)) == 1
    assert causes(tmp_path)[-1] == "rank 0 did not start: IndexError: list index out of range"


def test_the_first_rank_is_heard_on_the_terminal_and_the_others_in_their_logs(tmp_path, capfd):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "rank-0.log").write_text("of an earlier start\n")
    assert run_plan(tmp_path, ("say done", "say done")) == 0
    assert "earlier" not in capfd.readouterr().err
    assert "rank 1 says hello" in (logs / "launcher-0.log").read_text()


def test_on_several_nodes_the_cause_is_told_where_it_was_seen(tmp_path):
    lose, bad = ("steps 1 lose",), {"outcome": "failed", "step": 1, "code": 3, "error": "a damaged sample"}
    (tmp_path / "outcome.json").write_text(json.dumps(bad))
    # what an earlier job left is not the cause; this one gives up by its own budget, and tells the others
    assert run_plan(tmp_path, lose, lose, lose, slots=(1, 1)) == 5
    assert outcome(tmp_path)["given_up"]
    (tmp_path / "bad").write_text(json.dumps(bad))
    assert run_plan(tmp_path, *[lose] * 3, ("steps 1 outcome lose",), slots=(1, 1)) == 3
    assert causes(tmp_path)[-1] == "a damaged sample"


def test_a_node_ends_when_node_0_has_given_up(tmp_path):
    given_up = {"outcome": "failed", "step": 1, "code": 5, "error": "no disk", "given_up": True}
    lose, hear = ("steps 1 lose",), ("steps 1 outcome lose",)
    (tmp_path / "outcome.json").write_text(json.dumps(given_up))  # that of an earlier job says nothing
    (tmp_path / "bad").write_text(json.dumps(given_up))
    assert run_plan(tmp_path, lose, hear, slots=(1, 1), node_rank=1) == 5
    assert causes(tmp_path) == ["rank 1: connection lost", "node 0 has given up: no disk"]
    assert outcome(tmp_path) == given_up


@pytest.mark.parametrize(("ending", "code"), [("done", 0), ("requeue", 75)])
def test_a_rank_that_goes_after_all_have_agreed_on_the_end_starts_nothing(tmp_path, ending, code):
    (tmp_path / "bad").write_text(json.dumps({"outcome": ending, "step": 9}))
    assert run_plan(tmp_path, ("steps 9 outcome kill",), slots=(1, 1), node_rank=1) == code
    assert not causes(tmp_path)


def test_a_disk_that_fails_at_a_restart_is_a_fault_like_others(tmp_path, monkeypatch):
    number = itertools.count()

    def fail(path):
        if next(number) == 1:  # the second start
            raise OSError("Stale file handle")
        blank(path)

    monkeypatch.setattr("cluster.supervise.blank", fail)
    assert run_plan(tmp_path, ("steps 1 kill",), ("done",)) == 0
    assert causes(tmp_path)[1:] == [
        f"{tmp_path}: cannot be written: Stale file handle; to mend it: "
        "free disk space or choose another destination, then run the same command again"
    ]


def test_ranks_that_have_nothing_to_save_are_not_waited_for(tmp_path):
    patient = replace(QUICK, hang_seconds=1000, start_seconds=1000)
    begin = time.monotonic()
    assert run_plan(tmp_path, ("save 2 ask-supervisor wait", "wait"), patience=patient) == 75
    assert time.monotonic() - begin < 30
    assert outcome(tmp_path) == {"outcome": "requeue", "step": 2}


def test_ranks_that_do_not_stop_in_time_are_ended(tmp_path):
    patient = replace(QUICK, hang_seconds=1000, start_seconds=1000, stop_seconds=0.3)
    assert run_plan(tmp_path, ("save 2 steps 3 ask-supervisor wait", "steps 3 wait"), patience=patient) == 75
    assert outcome(tmp_path) == {"outcome": "requeue", "step": 2}


def test_a_second_supervisor_is_refused(tmp_path):
    with lock_folder(tmp_path, name=".supervisor-0.lock"), pytest.raises(EnvironmentFault, match="another"):
        run_plan(tmp_path, ("done",))


def test_no_process_is_left(tmp_path):
    assert run_plan(tmp_path, ("pid train", "pid kill"), ("done", "done")) == 0
    for rank in (0, 1):
        pid, group = map(int, (tmp_path / f"pid-{rank}").read_text().split())
        assert not is_alive(pid)
        assert not group_members(group)
