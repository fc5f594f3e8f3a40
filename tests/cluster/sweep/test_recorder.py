from __future__ import annotations

import json
import os
from types import SimpleNamespace

from cluster.sweep.journal import read_journal
from cluster.sweep.layout import RAY, STATES, Layout
from cluster.sweep.recorder import Recorder, list_states, restore_state
from frepa_dist.journal import append_event

NAMES = ("experiment_state-1.json", "basic-variant-state-1.json")


def ray_trial(root, number=0):
    return SimpleNamespace(
        trial_id=f"trial_{number:05d}",
        config={"name": f"{number:03d}", "sweep": str(root), "a.b": 1},
        local_experiment_path=str(root / "staging"),
        local_path=str(root / "staging" / f"{number}"),
    )


def test_rays_state_is_kept_whole_or_not_at_all(tmp_path):
    staging, recorder = tmp_path / "staging", Recorder(tmp_path)
    staging.mkdir()
    trial = ray_trial(tmp_path)
    for moment in range(4):
        for name in NAMES:
            (staging / name).write_text(f"{moment}")
        recorder.on_trial_start(0, [trial], trial)
        recorder.on_step_end(0, [trial])
        recorder.on_step_end(0, [trial])  # nothing new
    assert len(list_states(tmp_path)) == 2
    (tmp_path / STATES / "partial-00000009").mkdir()  # killed while it copied
    (tmp_path / RAY).mkdir()
    (tmp_path / RAY / NAMES[0]).write_text("tor")  # Ray was killed while it did
    (tmp_path / RAY / "experiment_state-2.json").write_text("half of a later session")
    assert restore_state(tmp_path)
    assert sorted(path.name for path in (tmp_path / RAY).iterdir()) == sorted(NAMES)
    assert {(tmp_path / RAY / name).read_text() for name in NAMES} == {"3"}


def test_what_ray_saved_before_something_happened_is_not_taken_for_what_it_saved_after(tmp_path):
    staging, recorder, trial = tmp_path / "staging", Recorder(tmp_path), ray_trial(tmp_path)
    staging.mkdir()

    def save(text):
        for name in NAMES:
            (staging / name).write_text(text)
            os.utime(staging / name, (int(text), int(text)))

    save("1")
    recorder.on_step_end(0, [trial])
    save("2")
    recorder.on_step_end(0, [trial])  # nothing has happened since
    assert len(list_states(tmp_path)) == 1
    recorder.on_trial_start(0, [trial], trial)
    recorder.on_step_end(0, [trial])  # it has, and is not saved yet
    assert len(list_states(tmp_path)) == 1
    save("3")
    recorder.on_step_end(0, [trial])
    assert (list_states(tmp_path)[-1] / NAMES[0]).read_text() == "3"


def test_where_nothing_was_saved_there_is_nothing_to_restore(tmp_path):
    assert not restore_state(tmp_path)


def test_a_failure_is_told_once_with_its_cause_and_the_death_of_an_actor_as_such(tmp_path):
    recorder, trial = Recorder(tmp_path), ray_trial(tmp_path)
    run = Layout(tmp_path).run("000")
    run.mkdir(parents=True)
    append_event(run, "trial_failed", cause="rank 0: no more memory")
    recorder.on_trial_recover(0, [], trial)
    recorder.on_trial_recover(0, [], trial)  # nobody wrote down why
    error = tmp_path / "staging" / "0" / "error.txt"
    error.parent.mkdir(parents=True)
    error.write_text("Traceback\nImportError: no module named frepa\n\n")
    recorder.on_trial_recover(0, [], trial)  # but for Ray
    append_event(run, "trial_failed", cause="rank 1: no more memory")
    recorder.on_trial_error(0, [], trial)
    (record,) = read_journal(Layout(tmp_path).journal)
    assert record.failures == [
        "rank 0: no more memory",
        "its Ray actor, or the node that it was on, died",
        "its Ray actor, or the node that it was on, died: ImportError: no module named frepa",
        "rank 1: no more memory",
    ]
    assert record.state == "failed"
    assert record.values == {"a.b": 1}
    json.dumps(record.failures)
