from __future__ import annotations

import json
import threading
import time

import pytest

from cluster.sweep.trial import (
    check_pairing,
    describe_end,
    find_due,
    find_steps,
    last_line,
    prune,
    split_settings,
    wait_until_free,
)
from frepa_dist.journal import append_event, write_outcome
from frepa_dist.runs import checkpoint_name, list_checkpoints
from shards.stores.store import lock_folder
from shards.support.errors import ConfigError

OWN = {"name": "000", "report": 2, "step": 8}


def test_settings_go_with_their_own_checkpoint_or_their_parents():
    check_pairing(OWN, "000", None, 2)
    check_pairing(OWN, "000-x", "000", 2)


@pytest.mark.parametrize(
    ("name", "parent", "reports"),
    [("001", None, 2), ("001-x", "001", 2), ("000", None, 1), ("000-x", "000", 3)],
)
def test_settings_and_a_checkpoint_of_two_trials_are_not_trained_on(name, parent, reports):
    with pytest.raises(ConfigError, match="is of 000, report 2"):
        check_pairing(OWN, name, parent, reports)


def test_what_ray_gives_is_split_into_settings_and_the_rest():
    config = {"train.seed": 1, "sweep": "x", "name": "000", "parent": "001"}
    assert split_settings(config) == ({"train.seed": 1}, {"sweep": "x", "name": "000", "parent": "001"})


def make_checkpoints(run, *steps):
    for step in steps:
        folder = run / "checkpoints" / checkpoint_name(step)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")


def test_a_checkpoint_that_was_put_off_is_the_one_that_was_due(tmp_path):
    assert find_due(tmp_path, 4) is None
    make_checkpoints(tmp_path, 2, 5, 6)  # steps around 4 were skipped
    assert [find_due(tmp_path, step) for step in (2, 4, 6, 8)] == [2, 5, 6, None]


def test_checkpoints_go_when_they_have_been_measured_and_not_before(tmp_path):
    make_checkpoints(tmp_path, 2, 4, 5, 6, 8)
    prune(tmp_path, 4, keep=1)
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [4, 5, 6, 8]


def test_the_trainer_says_how_long_a_run_is(tmp_path):
    assert find_steps(tmp_path, 4) == []
    append_event(tmp_path, "start", step=0, total_steps=10)
    assert find_steps(tmp_path, 4) == [4, 8, 10]


def test_a_run_folder_is_waited_for(tmp_path):
    held = threading.Event()

    def hold():
        with lock_folder(tmp_path, name=".supervisor-0.lock"):
            held.set()
            time.sleep(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    begin = time.monotonic()
    wait_until_free(tmp_path)
    assert time.monotonic() - begin > 0.3
    thread.join()


def test_the_last_error_is_found_in_a_log(tmp_path):
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_text("frepa: error: no shards\nafterthought\n")
    assert last_line(log) == "no shards"
    log.write_text(json.dumps({}) + "\n\n")
    assert last_line(log) == "{}"


def test_why_a_checkpoint_is_missing_is_told(tmp_path):
    log = tmp_path / "log"
    log.write_text("frepa: error: the port is taken\n")
    assert describe_end(tmp_path, log) == "the port is taken"
    write_outcome(tmp_path, "failed", -1, code=4, error="losses are no longer finite")
    assert describe_end(tmp_path, log) == "losses are no longer finite"
    write_outcome(tmp_path, "requeue", 3)
    assert "asked to stop" in describe_end(tmp_path, log)
    write_outcome(tmp_path, "done", 4)
    append_event(tmp_path, "step_skipped", step=3)
    assert "1 steps skipped" in describe_end(tmp_path, log)
    append_event(tmp_path, "checkpoint_failed", step=4, error="weights are no longer finite")
    assert describe_end(tmp_path, log) == "weights are no longer finite"
