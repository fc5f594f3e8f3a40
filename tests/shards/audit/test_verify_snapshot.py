"""What an audit finds in snapshots and tables, and beside them."""

from __future__ import annotations

import pytest

from shards.dataset import load_snapshot
from shards.schema import Counts
from tests.shards.damage import (
    CT,
    FUNDUS,
    edit,
    find,
    kinds,
)
from tests.shards.whole import (
    change_index,
    change_snapshot,
    change_table,
    make_key,
    reseal,
)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda s: {"shards": [*s.shards, s.shards[-1]]}, "named twice"),
        (lambda s: {"shards": [s.shards[1], s.shards[0], *s.shards[2:]]}, "not sorted"),
        (lambda s: {"modalities": ["ct"]}, "modalities"),
        (lambda s: {"hf_digests": {"ct": s.hf_digests["ct"]}}, "no HF parameters of fundus"),
        (
            lambda s: {"shards": [s.shards[0].model_copy(update={"source": "else"}), *s.shards[1:]]},
            "is called ct/else",
        ),
    ],
)
def test_snapshot_that_contradicts_itself(root, change, what):
    change_snapshot(root, **change(load_snapshot(root)))
    report = find(root)
    assert report.counts["snapshot"] == 1
    assert what in str(report.problems)


@pytest.mark.parametrize("name", ["quarantine", "duplicates"])
def test_tables(root, name):
    path = root / load_snapshot(root).tables[name].path
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    assert kinds(root) == {"table": 1}
    path.unlink()
    report = find(root)
    assert report.counts == {"table": 1}
    assert path.name in report.problems[0].where


def test_keys_that_two_samples_have(root):
    twice = make_key("salt", 0)
    change_index(root, FUNDUS, edit(1, key=twice))
    reseal(root)
    report = find(root)
    assert report.counts == {"duplicate_key": 1}
    assert report.problems[0].key == twice
    assert CT in report.problems[0].what
    assert FUNDUS in report.problems[0].what


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c: {"samples": c.samples + 1, "units": c.units + 1}, "samples are found"),
        (lambda c: {"units": c.units + 1}, "do not add up"),
        (lambda c: {"quarantined": 0, "excluded": 2}, "quarantined are found"),
    ],
)
def test_accounting_of_a_source(root, change, what):
    snapshot = load_snapshot(root)
    counts = snapshot.builds[0].counts
    build = snapshot.builds[0].model_copy(update={"counts": counts.model_copy(update=change(counts))})
    builds = [build, *snapshot.builds[1:]]
    change_snapshot(root, builds=builds, counts=sum((b.counts for b in builds), Counts()))
    report = find(root)
    assert set(report.counts) == {"accounting"}
    assert what in str(report.problems)


def test_accounting_of_the_dataset(root):
    snapshot = load_snapshot(root)
    change_snapshot(root, counts=snapshot.counts.model_copy(update={"objects": 0}))
    assert "add up to the dataset" in find(root).problems[0].what
    change_snapshot(root, counts=snapshot.counts, builds=snapshot.builds[1:])
    assert "which no build accounts for" in str(find(root).problems)
    change_snapshot(root, builds=[*snapshot.builds, snapshot.builds[0]])
    assert "twice" in str(find(root).problems)


@pytest.mark.parametrize(
    ("table", "change", "kind", "what"),
    [
        ("duplicates", edit(0, row=1), "exclusion", "row 1"),
        ("duplicates", edit(0, row=99), "exclusion", "row 99"),
        ("duplicates", edit(0, row=None), "exclusion", "row -1"),
        ("duplicates", edit(0, shard="ct/tiny-000009.tar"), "exclusion", "which is none"),
        ("duplicates", edit(0, duplicate_of="nobody"), "accounting", "nowhere"),
        ("duplicates", edit(1, key=make_key("salt", 1)), "accounting", "in a shard"),
        ("quarantine", edit(0, key=make_key("salt", 1)), "accounting", "in a shard"),
        ("quarantine", lambda rows: rows[1:], "accounting", "0 quarantined are found"),
    ],
)
def test_tables_that_contradict_the_shards(root, table, change, kind, what):
    change_table(root, table, change)
    report = find(root)
    assert report.counts == {kind: 1}
    assert what in report.problems[0].what


def test_files_that_no_snapshot_names_are_remarks(root):
    (root / "ct" / "tiny-000002.tar").write_bytes(b"left behind")
    (root / "ct" / ".hidden").write_bytes(b"")
    change_table(
        root, "quarantine", lambda rows: [*rows[1:], rows[0]]
    )  # the older snapshot names the old one
    report = find(root)
    assert report.ok
    assert report.remark_counts == {"unnamed_file": 1}
    assert report.remarks[0].where == "ct/tiny-000002.tar"
