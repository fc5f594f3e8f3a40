from __future__ import annotations

from cluster.sweep.journal import Journal, digest, read_decisions, read_journal
from tests.cluster.sweep.making import failure, report, trial


def test_a_trial_that_is_tried_again_is_written_down_once(tmp_path):
    path = tmp_path / "journal.jsonl"
    for _ in range(2):  # and by another driver too
        journal = Journal(path)
        for entry in (trial(0, {"a": 1}), report(0, 1, 0.5), report(0, 2, 0.4, last=True)):
            assert journal.write(**entry) is (_ == 0)
    (record,) = read_journal(path)
    assert [r.value for r in record.reports] == [0.5, 0.4]
    assert record.state == "done"


def test_states_follow_what_happened():
    entries = [trial(n) for n in range(5)]
    entries += [report(0, 1, 1.0), report(1, 1, 1.0, stopped=True), report(2, 1, 1.0, last=True)]
    entries += [failure(3, "no disk", final=False), failure(3, "no disk", final=True, at=2.0)]
    entries += [failure(4, "passing", final=False), report(4, 1, 2.0)]
    records = digest(entries)
    assert [record.state for record in records] == ["running", "stopped", "done", "failed", "running"]
    assert records[3].failures == ["no disk", "no disk"]
    assert records[3].value is None


def test_each_failure_counts_and_none_twice(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.write(**failure(0, "a", final=False, at=1.0))
    assert not journal.write(**failure(0, "a", final=True, at=1.0))
    assert journal.write(**failure(0, "died", final=False, at=None))
    assert journal.write(**failure(0, "died", final=True, at=None))


def test_under_pbt_a_trial_goes_back_to_where_its_parent_was():
    entries = [trial(0, {"a": 1}), report(0, 1, 1.0), report(0, 2, 0.9), report(0, 3, 0.8)]
    entries += [trial(0, {"a": 2}, parent="001", name="001-x"), report(0, 3, 0.5, name="001-x")]
    (record,) = digest(entries)
    assert (record.name, record.values, record.parents) == ("001-x", {"a": 2}, ["001"])
    assert [r.name for r in record.reports] == ["000", "000", "001-x"]


def test_decisions_are_read_back(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for entry in (trial(0), report(0, 1, 0.5), report(0, 2, 0.7, stopped=True)):
        journal.write(**entry)
    assert read_decisions(tmp_path / "journal.jsonl") == {
        ("trial_00000", 1): (0.5, False),
        ("trial_00000", 2): (0.7, True),
    }
