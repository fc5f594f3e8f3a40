"""A second place for checkpoints: what is there, what comes back, and a place that fails."""

from __future__ import annotations

import json
import shutil

import pytest

from frepa_dist.runs import CONFIG, METRICS, list_checkpoints, read_json_lines
from frepa_dist.train.checkpoint.copies import (
    Copies,
    check_place_is_free,
    fetch_config,
    fetch_newest,
    find_newest,
    mirror,
)
from frepa_dist.train.checkpoint.folders import is_intact
from shards.stores.store import LocalStore, open_store
from shards.support.errors import ConfigError, DataError, EnvironmentFault
from tests.frepa_dist.train.checkpoint.test_folders import create, flip, steps


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def place(request, tmp_path):
    """Where copies go."""
    return (
        str(tmp_path / "copies") if request.param == "folder" else f"{request.getfixturevalue('s3').uri}/a/b"
    )


def make_run(folder, *numbers):
    for number in numbers:
        create(folder, number)
    (folder / CONFIG).write_text("output: x\n")
    (folder / METRICS).write_text('{"step": 1}\n')
    return folder


def present(place):
    """Checkpoints of which anything is in a place."""
    return sorted({stored.path.split("/")[1] for stored in open_store(place).list("checkpoints/")})


def test_a_lost_run_comes_back_from_its_copies(tmp_path, place):
    run = make_run(tmp_path / "run", 2, 4)
    copies = Copies(place, run)
    copies.send()
    copies.finish()
    create(run, 6)
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    copies.send()
    copies.finish()
    assert present(place) == ["step-00000004", "step-00000006"], "what the run keeps is kept"
    before = {path.name: path.read_bytes() for path in list_checkpoints(run)[-1].iterdir()}
    shutil.rmtree(run)
    assert fetch_config(place) == b"output: x\n"
    found = find_newest(run, place)
    assert found is not None
    assert {path.name: path.read_bytes() for path in found.iterdir()} == before
    assert steps(run) == [6]
    assert (run / METRICS).read_text() == '{"step": 1}\n'


def test_a_checkpoint_of_the_run_folder_comes_first(tmp_path):
    run = make_run(tmp_path / "run", 2, 4)
    mirror(run, LocalStore(tmp_path / "copies"))
    for step in (2, 4):
        assert find_newest(run, tmp_path / "copies") == run / "checkpoints" / "step-00000004"
        flip(run / "checkpoints" / f"step-0000000{step}")
    assert is_intact(found := find_newest(run, tmp_path / "copies")), "both were damaged"
    assert found.name == "step-00000004"


def test_a_damaged_copy_is_passed_over(tmp_path):
    run, place = make_run(tmp_path / "run", 2, 4), tmp_path / "copies"
    mirror(run, LocalStore(place))
    shutil.rmtree(run / "checkpoints")
    flip(place / "checkpoints" / "step-00000004")
    assert fetch_newest(place, run).name == "step-00000002"
    flip(place / "checkpoints" / "step-00000002")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(DataError, match="all copies"):
        find_newest(run, place)
    assert not any((run / "checkpoints").iterdir())


def test_without_copies_the_run_s_own_damage_is_told(tmp_path):
    run = make_run(tmp_path / "run", 2)
    flip(run / "checkpoints" / "step-00000002")
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
    copies = Copies(tmp_path / "copies", run)
    copies.send()
    copies.finish()
    assert "disk full" in capsys.readouterr().err
    (event,) = read_json_lines(run / "events.jsonl")
    assert event["event"] == "copy_failed"
    check_place_is_free(tmp_path / "copies")  # nothing whole is there
    monkeypatch.undo()
    copies.send()
    copies.finish()
    assert present(tmp_path / "copies") == ["step-00000002"]
    assert find_newest(tmp_path / "other", tmp_path / "copies") is not None
    with pytest.raises(ConfigError, match="already"):
        check_place_is_free(tmp_path / "copies")


def test_what_is_removed_while_it_is_copied_is_cleared_away_later(tmp_path, monkeypatch):
    run, place = make_run(tmp_path / "run", 2, 4), tmp_path / "copies"
    writing = LocalStore.writing

    def remove(store, path):
        if path.endswith("step-00000004/state.json"):
            shutil.rmtree(run / "checkpoints" / "step-00000004")
        return writing(store, path)

    monkeypatch.setattr(LocalStore, "writing", remove)
    mirror(run, LocalStore(place))
    assert json.loads((place / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    monkeypatch.undo()
    assert fetch_newest(place, tmp_path / "other").name == "step-00000002"
    mirror(run, LocalStore(place))
    assert present(place) == ["step-00000002"]
