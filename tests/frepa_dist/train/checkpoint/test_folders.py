"""Which checkpoints are whole, which are chosen, which stay."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frepa_dist.runs import LATEST, MANIFEST, checkpoint_name, find_checkpoint, list_checkpoints
from frepa_dist.train.checkpoint import is_intact, newest_good, newest_intact
from frepa_dist.train.checkpoint.files import write_bytes
from frepa_dist.train.checkpoint.folders import Retention, damage, remove_newer, remove_remains
from shards.support.errors import DataError


def create(run, step, metric=None, **more):
    folder = run / "checkpoints" / checkpoint_name(step)
    folder.mkdir(parents=True)
    files = [
        write_bytes(folder / name, [random.Random(step).randbytes(1000)])
        for name in ("rank-00000.safetensors", "student.safetensors", "state.json")
    ]
    manifest = {
        "metrics": {} if metric is None else {"loss/rec": metric},
        "files": {file.name: {"size": file.size, "crc32c": file.crc32c} for file in files},
        **more,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def steps(run):
    return [int(folder.name[5:]) for folder in list_checkpoints(run)]


def flip(folder):
    data = bytearray((folder / "rank-00000.safetensors").read_bytes())
    data[500] ^= 1
    (folder / "rank-00000.safetensors").write_bytes(data)


def truncate(folder):
    (folder / "student.safetensors").write_bytes((folder / "student.safetensors").read_bytes()[:-1])


def lose(folder):
    (folder / "rank-00000.safetensors").unlink()


def tear(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:50])


def empty(folder):
    (folder / MANIFEST).write_text("{}")


def misname(folder):
    (folder / MANIFEST).write_text('{"files": {"state.json": 5}}')


@pytest.mark.parametrize("harm", [flip, truncate, lose, tear, empty, misname])
def test_a_damaged_one_is_passed_over_and_named(tmp_path, harm):
    older, newer = create(tmp_path, 4), create(tmp_path, 8)
    assert is_intact(newer)
    harm(newer)
    assert not is_intact(newer)
    assert newest_intact(tmp_path) == older
    harm(older)
    with pytest.raises(DataError, match=r"all 2 checkpoints are damaged .step-00000008: ") as caught:
        newest_intact(tmp_path)
    assert str(damage(older)) in str(caught.value)


def test_latest_may_be_missing_or_point_nowhere(tmp_path):
    assert newest_intact(tmp_path) is None
    folder = create(tmp_path, 4)
    for text in (None, "step-00000009\n", "../../elsewhere\n", ""):
        if text is not None:
            (tmp_path / "checkpoints" / LATEST).write_text(text)
        assert newest_intact(tmp_path) == folder
        assert find_checkpoint(tmp_path) == folder


def test_going_back_removes_what_is_newer(tmp_path):
    folders = [create(tmp_path, step) for step in (2, 4, 6)]
    flip(folders[2])
    assert remove_newer(folders[0]) == ["step-00000004", "step-00000006"]
    assert steps(tmp_path) == [2]


def test_remains_of_a_kill_are_removed(tmp_path):
    create(tmp_path, 2)
    (create(tmp_path, 4) / MANIFEST).unlink()  # killed while it was removed
    (tmp_path / "checkpoints" / "partial-step-00000006").mkdir()
    remove_remains(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_removal_that_is_killed_leaves_nothing_listed(tmp_path, monkeypatch):
    for step in (2, 4):
        create(tmp_path, step)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("frepa_dist.train.checkpoint.folders.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        Retention(last=1).apply(tmp_path)
    assert steps(tmp_path) == [4]


def test_the_last_every_nth_and_the_best_are_kept(tmp_path):
    for step, metric in {10: 0.5, 20: 0.1, 30: 0.4, 40: None, 50: 0.3, 60: 0.2}.items():
        create(tmp_path, step, metric)
    Retention(last=1, every=50, metric="loss/rec").apply(tmp_path)
    assert steps(tmp_path) == [20, 50, 60]
    Retention(last=1, metric="loss/rec", largest=True).apply(tmp_path)
    assert steps(tmp_path) == [50, 60]


@given(
    st.dictionaries(st.integers(1, 60), st.none() | st.floats(-2, 2)),
    st.integers(1, 4),
    st.none() | st.integers(1, 9),
    st.booleans(),
)
def test_what_is_kept(values, last, every, largest):
    kept = Retention(last, every, "m", largest).kept(values)
    assert kept <= values.keys()
    assert set(sorted(values)[-last:]) <= kept
    known = [value for value in values.values() if value is not None]
    if known:
        best = max(known) if largest else min(known)
        assert best in [values[step] for step in kept]
    others = [
        step for step in kept if step not in sorted(values)[-last:] and not (every and step % every == 0)
    ]
    assert len(others) <= 1


def test_a_run_goes_back_behind_what_may_be_why_steps_were_skipped(tmp_path):
    good = create(tmp_path, 2)
    doubtful = [create(tmp_path, step, doubtful=True) for step in (4, 6)]
    assert newest_intact(tmp_path) == doubtful[1]
    assert newest_good(tmp_path) == good
    Retention(last=1).apply(tmp_path)
    assert steps(tmp_path) == [2, 6]
    flip(good)
    assert newest_good(tmp_path) == doubtful[1], "better than none"
