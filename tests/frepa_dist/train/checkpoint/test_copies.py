"""A second place for checkpoints: what is there, what comes back, and a place that fails."""

from __future__ import annotations

import shutil

import pytest

from frepa_dist.runs import CONFIG, METRICS, read_json_lines
from frepa_dist.train.checkpoint import copies as copies_module
from frepa_dist.train.checkpoint.copies import (
    Copies,
    check_place_is_free,
    fetch_config,
    fetch_newest,
    find_newest,
)
from frepa_dist.train.checkpoint.folders import Retention, is_intact
from shards.stores.store import LocalStore, open_store
from shards.support.errors import ConfigError, DataError, EnvironmentFault
from tests.frepa_dist.train.checkpoint.test_folders import create, flip, steps

KEEP = Retention(last=2)


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def place(request, tmp_path):
    """Where copies go."""
    if request.param == "folder":
        return str(tmp_path / "copies")
    return f"{request.getfixturevalue('s3').uri}/a/b"


def make_run(folder, *numbers):
    folder.mkdir()
    for number in numbers:
        create(folder, number)
    (folder / CONFIG).write_text("output: x\n")
    (folder / METRICS).write_text('{"step": 1}\n')
    return folder


def path_of(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def present(place):
    """Steps of which anything is in a place."""
    return sorted({int(stored.path.split("/")[1][5:]) for stored in open_store(place).list("checkpoints/")})


def send(run, place, retention=KEEP):
    copies = Copies(place, run, retention)
    copies.send()
    copies.finish()


def test_a_lost_run_comes_back_from_its_copies(tmp_path, place):
    run = make_run(tmp_path / "run", 2, 4)
    send(run, place)
    create(run, 6)
    shutil.rmtree(path_of(run, 2))
    send(run, place)
    assert present(place) == [4, 6], "what the run keeps is kept"
    before = {path.name: path.read_bytes() for path in path_of(run, 6).iterdir()}
    shutil.rmtree(run)
    send(run, place)
    assert present(place) == [4, 6], "a folder that is gone is no reason to remove copies"
    assert fetch_config(place) == b"output: x\n"
    found = find_newest(run, place)
    assert found is not None
    assert {path.name: path.read_bytes() for path in found.iterdir()} == before
    assert steps(run) == [6]
    assert (run / METRICS).read_text() == '{"step": 1}\n'


def test_copies_are_kept_as_checkpoints_are_also_after_the_run_came_back(tmp_path):
    keep = Retention(last=2, every=10, metric="loss/rec")
    run, place = make_run(tmp_path / "run"), tmp_path / "copies"
    for step, value in ((10, 5.0), (12, 1.0), (14, 3.0), (16, 4.0)):
        create(run, step, value)
        keep.apply(run)
        send(run, place, keep)
    assert present(place) == [10, 12, 14, 16] == steps(run)
    shutil.rmtree(run / "checkpoints")
    assert find_newest(run, place) == path_of(run, 16)
    create(run, 18, 9.0)
    send(run, place, keep)
    assert present(place) == [10, 12, 16, 18]


def test_what_a_run_went_back_behind_is_removed_and_what_it_made_anew_replaced(tmp_path):
    run, place = make_run(tmp_path / "run", 2, 4, 6), tmp_path / "copies"
    send(run, place, Retention(last=5))
    for step in (4, 6):
        shutil.rmtree(path_of(run, step))
    create(run, 4)
    (path_of(run, 4) / "manifest.json").write_text((path_of(run, 4) / "manifest.json").read_text() + " ")
    send(run, place, Retention(last=5))
    assert present(place) == [2, 4]
    assert (path_of(place, 4) / "manifest.json").read_bytes().endswith(b" ")


def test_a_checkpoint_of_the_run_folder_comes_first_unless_a_newer_one_is_lost(tmp_path, monkeypatch):
    run, place = make_run(tmp_path / "run", 2, 4), tmp_path / "copies"
    send(run, place)
    monkeypatch.setattr(copies_module, "fetch_newest", None)  # it is not asked
    assert find_newest(run, place) == path_of(run, 4)
    monkeypatch.undo()
    flip(path_of(run, 4))
    assert find_newest(run, place) == path_of(run, 4)
    assert is_intact(path_of(run, 4))
    flip(path_of(run, 4))
    flip(path_of(place, 4))
    assert find_newest(run, place) == path_of(run, 2), "a damaged copy is of no use"
    shutil.rmtree(place)
    place.write_text("no folder any more")
    assert find_newest(run, place) == path_of(run, 2), "nor is a place that fails"


def test_a_damaged_copy_is_passed_over(tmp_path):
    run, place = make_run(tmp_path / "run", 2, 4), tmp_path / "copies"
    send(run, place)
    shutil.rmtree(run / "checkpoints")
    flip(path_of(place, 4))
    assert fetch_newest(place, run).name == "step-00000002"
    flip(path_of(place, 2))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(DataError, match="all copies"):
        find_newest(run, place)
    assert not any((run / "checkpoints").iterdir())


def test_without_copies_the_run_s_own_damage_is_told(tmp_path):
    run = make_run(tmp_path / "run", 2)
    flip(path_of(run, 2))
    with pytest.raises(DataError, match="all 1 checkpoints are damaged"):
        find_newest(run, tmp_path / "copies")
    shutil.rmtree(run / "checkpoints")
    assert find_newest(run, tmp_path / "copies") is None
    assert find_newest(run, None) is None


def test_a_place_that_fails_is_told_and_tried_again(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run", 2)
    writing = LocalStore.writing

    def fail(store, path):
        if path.endswith("state.json"):
            raise EnvironmentFault("cannot be written: disk full", where=path)
        return writing(store, path)

    monkeypatch.setattr(LocalStore, "writing", fail)
    send(run, tmp_path / "copies")
    assert "disk full" in capsys.readouterr().err
    (event,) = read_json_lines(run / "events.jsonl")
    assert event["event"] == "copy_failed"
    check_place_is_free(tmp_path / "copies")  # nothing whole is there
    monkeypatch.undo()
    send(run, tmp_path / "copies")
    assert present(tmp_path / "copies") == [2]
    assert find_newest(tmp_path / "other", tmp_path / "copies") is not None
    with pytest.raises(ConfigError, match="already"):
        check_place_is_free(tmp_path / "copies")


def test_what_goes_before_it_is_copied_is_told_and_leaves_the_copies_before(tmp_path, monkeypatch, capsys):
    run, place = make_run(tmp_path / "run", 2), tmp_path / "copies"
    send(run, place)
    create(run, 4)
    shutil.rmtree(path_of(run, 2))
    writing = LocalStore.writing

    def remove(store, path):
        if path.endswith("step-00000004/state.json"):
            shutil.rmtree(path_of(run, 4))
            create(run, 6)
        return writing(store, path)

    monkeypatch.setattr(LocalStore, "writing", remove)
    send(run, place)
    assert "slower than checkpoints come" in capsys.readouterr().err
    assert fetch_newest(place, tmp_path / "other").name == "step-00000002"
    monkeypatch.undo()
    send(run, place, Retention(last=1))
    assert present(place) == [6]
