"""Plans as columns: order, duplicates, slices, shards, digests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.builder.growth import Outcomes, PlanContext, compare, share_left
from shards.builder.objects import UNKNOWN_IDENTITY
from shards.builder.plan import PLAN_SCHEMA, Plan
from shards.builder.plan_files import drop_parts, is_marked, load_parts, mark_part, save_part
from shards.builder.scan import SCAN_SCHEMA
from shards.builder.series_members import SeriesMembers
from shards.builder.sources import OBJECTS_SCHEMA
from shards.builder.state import Salt
from shards.support.errors import DataError

SALT = Salt(b"0123456789abcdef")
STEPS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 5), min_size=1)
"""What is there at one time: names and contents."""


class World:
    """Objects that exist, by name: content, series, place, units."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.num_scanned = 0

    def put(
        self, name: str, content: int, series: str | None = None, place: float = 0.0, units: int = 1
    ) -> None:
        self.objects[name] = {"content": content, "series": series, "place": place, "units": units}

    def listing(self) -> pa.Table:
        names = sorted(self.objects)
        columns = {
            "name": [name.encode() for name in names],
            "uri": [f"/{name}".encode() for name in names],
            "num_bytes": [100] * len(names),
            "version": [str(self.objects[name]["content"]) for name in names],
            "is_file": [True] * len(names),
            "labels": ["{}"] * len(names),
            "patient": [None] * len(names),
        }
        return pa.table(columns, schema=OBJECTS_SCHEMA)

    def scan(self, rows: pa.Table) -> pa.Table:
        found = [self.objects[name.decode()] for name in rows["name"].to_pylist()]
        self.num_scanned += len(found)
        columns = {
            "identity": [
                UNKNOWN_IDENTITY if item["content"] < 0 else item["content"].to_bytes(16, "big")
                for item in found
            ],
            "status": ["quarantined" if item["content"] < 0 else "image" for item in found],
            "reason": ["unreadable_file" if item["content"] < 0 else "" for item in found],
            "format": ["dicom"] * len(found),
            "num_units": [item["units"] for item in found],
            "stored_bytes": [1000 * item["units"] for item in found],
            "is_volume": [item["units"] > 1 for item in found],
            "series": [item["series"] for item in found],
            "place": [item["place"] for item in found],
            "patient": [None] * len(found),
            "facts": ["{}"] * len(found),
        }
        return pa.table(columns, schema=SCAN_SCHEMA)

    def grow(self, parts: Sequence[Plan] = (), **outcomes: Any) -> Plan | None:
        context = PlanContext(
            scan=self.scan, salt=SALT, modality="ct", source="a", splits=(), shard_bytes=10_000
        )
        return compare(self.listing(), parts, Outcomes(**outcomes), context).part


def names_of(plan: Plan, status: str = "image") -> list[str]:
    rows = plan.objects.to_pylist()
    return [row["name"].decode() for row in rows if row["status"] == status]


def test_a_series_is_together_where_its_first_name_is():
    world = World()
    for number, name in enumerate(("a", "c", "e", "g")):
        world.put(name, number, "s", place=-number)
    for number, name in enumerate(("b", "d", "f"), 10):
        world.put(name, number)
    plan = world.grow()
    assert names_of(plan) == ["g", "e", "c", "a", "b", "d", "f"]
    assert plan.objects["object"].to_pylist() == list(range(7))
    assert plan.objects["slice"].to_pylist() == [0, 1, 2, 3, 0, 0, 0]
    assert len(set(plan.objects["volume"].to_pylist())) == 2  # of the series, and none


def test_duplicates_are_told_in_the_order_of_the_plan():
    world = World()
    for name, content in (("a", 1), ("b", 2), ("c", 1), ("d", 2), ("e", 1)):
        world.put(name, content)
    first = world.grow()
    rows = {row["name"]: row for row in first.objects.to_pylist()}
    assert [rows[name]["duplicate_of"] for name in (b"a", b"b", b"c", b"d", b"e")] == [-1, -1, 0, 1, 0]
    world.put("0", 2)
    second = world.grow([first])
    assert (names_of(second, "duplicate"), second.objects["duplicate_of"].to_pylist()) == (["0"], [1])
    assert second.first_shard == first.end_shard == 1
    assert world.num_scanned == 6
    assert world.grow([first, second]) is None


def test_unread_objects_are_neither_equal_nor_changed():
    world = World()
    for name in ("a", "b"):
        world.put(name, -1)
    world.put("c", 5)
    first = world.grow()
    assert names_of(first, "quarantined") == ["a", "b"]
    world.put("a", -2)  # another time, still unreadable
    assert world.grow([first]) is None
    world.put("a", 7)
    second = world.grow([first])
    assert second.objects.select(["supersedes", "revision", "object"]).to_pylist() == [
        {"supersedes": 0, "revision": 1, "object": 3}
    ]


def test_units_of_shards_cover_the_plan():
    world = World()
    for number in range(9):
        world.put(f"{number}", number, units=1 + 7 * (number % 3))
    plan = world.grow()
    shards = range(plan.first_shard, plan.end_shard)
    planned = [item for shard in shards for item in plan.planned_objects(shard, SALT, "ct", "a")]
    units = [(item.number, unit) for item in planned for unit, _ in item.units]
    assert units == [(n, unit) for n in range(9) for unit in range(1 + 7 * (n % 3))]
    assert len({key for item in planned for _, key in item.units}) == len(units)
    assert plan.num_shards > 3
    assert sum(plan.num_units_of(shard) for shard in shards) == plan.num_units == len(units)
    assert plan.shards_of(np.array([8]))[-1] == plan.end_shard - 1


def test_some_units_are_tried_again():
    world = World()
    world.put("a", 1, units=9)
    world.put("b", 2)
    first = world.grow()
    assert world.grow([first], retry=True) is None
    again = world.grow([first], retry=True, quarantined={0: [2, 5]})
    (item,) = again.planned_objects(again.first_shard, SALT, "ct", "a")
    assert [unit for unit, _ in item.units] == [2, 5]
    assert item.units[0][1] == SALT.key("ct", "a", b"a", 2)
    assert (item.number, again.num_units) == (0, 2)


def test_members_of_a_series_over_parts():
    world = World()
    for number in range(4):
        world.put(f"{number}", number, "s", place=number)
    world.put("z", 99, "other")
    first = world.grow()
    for number in range(4, 6):
        world.put(f"{number}", number, "s", place=number)
    world.put("1", 50, "s", place=1)
    second = world.grow([first])
    assert names_of(second) == ["1", "4", "5"]
    assert second.objects["slice"].to_pylist() == [4, 5, 6]
    planned = second.planned_objects(second.first_shard, SALT, "ct", "a")
    ((volume, members),) = SeriesMembers([first, second]).of(planned).items()
    assert volume == planned[0].volume
    assert [item.name for item in members] == [b"0", b"2", b"3", b"1", b"4", b"5"]
    assert members[3].identity == (50).to_bytes(16, "big")


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=4))
def test_every_content_has_one_unreplaced_sample(steps: list[dict[str, int]]):
    """Whatever is added, changed and taken away: what is listed is a sample, or repeats one."""
    world, parts = World(), []
    for step in steps:
        world.objects.clear()
        for name, content in step.items():
            world.put(name, content)
        part = world.grow(parts)
        if part is not None:
            parts.append(part)
        assert world.grow(parts) is None
        latest: dict[bytes, dict] = {}
        replaced: set[int] = set()
        for row in (row for item in parts for row in item.objects.to_pylist()):
            latest[row["name"]] = row
            replaced.add(row["supersedes"])
        by_number = {row["object"]: row for row in latest.values()}
        for name, content in step.items():
            row = latest[name.encode()]
            assert row["identity"] == content.to_bytes(16, "big")
            original = row if row["status"] == "image" else by_number[row["duplicate_of"]]
            assert original["status"] == "image"
            assert original["identity"] == row["identity"]
            assert original["object"] not in replaced
    numbers = [row["object"] for item in parts for row in item.objects.to_pylist() if not row["is_retry"]]
    assert numbers == list(range(len(numbers)))


def test_a_digest_sees_what_changes_bytes_and_nothing_else():
    world = World()
    for number in range(3):
        world.put(f"{number}", number)
    plan = world.grow()
    digest = plan.digest(SALT, {"size": 64})
    table = plan.objects

    def changed(name: str, values: list) -> Plan:
        place = PLAN_SCHEMA.get_field_index(name)
        values = pa.array(values, PLAN_SCHEMA.field(name).type)
        return Plan(table.set_column(place, PLAN_SCHEMA.field(name), values), plan.first_shard, 10_000)

    assert changed("uri", [b"x"] * 3).digest(SALT, {"size": 64}) == digest
    assert changed("version", ["x"] * 3).digest(SALT, {"size": 64}) == digest
    sliced = Plan(pa.concat_tables([table.slice(0, 1), table.slice(1)]), plan.first_shard, 10_000)
    assert sliced.digest(SALT, {"size": 64}) == digest
    others = {
        plan.digest(SALT, {"size": 65}),
        plan.digest(Salt(b"f" * 16), {"size": 64}),
        Plan(table, 1, 10_000).digest(SALT, {"size": 64}),
        changed("labels", ["{}", "{}", "x"]).digest(SALT, {"size": 64}),
        changed("units", [None, None, [0]]).digest(SALT, {"size": 64}),
        changed("units", [None, None, [1]]).digest(SALT, {"size": 64}),
        changed("units", [None, [1], None]).digest(SALT, {"size": 64}),
        changed("patient", [None, "", None]).digest(SALT, {"size": 64}),
        changed("identity", [bytes(16)] * 3).digest(SALT, {"size": 64}),
        changed("name", [b"0", b"", b"12"]).digest(SALT, {"size": 64}),
        changed("name", [b"0", b"1", b"2x"]).digest(SALT, {"size": 64}),
    }
    assert len(others | {digest}) == 12


def test_parts_in_the_state_folder(tmp_path, monkeypatch):
    def killed_at_the_part(path: Path, *, missing_ok: bool, unlink=Path.unlink) -> None:
        if path.name == "part-000.parquet":
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    world = World()
    world.put("a", 1)
    first = world.grow()
    world.put("b", 2)
    second = world.grow([first])
    for number, part in enumerate((first, second)):
        save_part(tmp_path, number, part)
        mark_part(tmp_path, number, "started")
    loaded = load_parts(tmp_path)
    assert [part.digest(SALT, {}) for part in loaded] == [part.digest(SALT, {}) for part in (first, second)]
    assert [part.first_shard for part in loaded] == [0, 1]
    assert share_left(loaded[0], world.listing()) == 1
    del world.objects["a"]
    assert share_left(loaded[0], world.listing()) == 0
    drop_parts(tmp_path, 1)
    assert len(load_parts(tmp_path)) == 1
    assert is_marked(tmp_path, 0, "started")
    assert not is_marked(tmp_path, 1, "started")
    mark_part(tmp_path, 0, "published")
    monkeypatch.setattr(Path, "unlink", killed_at_the_part)
    with pytest.raises(KeyboardInterrupt):
        drop_parts(tmp_path, 0)
    assert len(load_parts(tmp_path)) == 1
    for mark in ("started", "published"):  # the part that is planned next must not inherit them
        assert not is_marked(tmp_path, 0, mark)
    (tmp_path / "part-000.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load_parts(tmp_path)
