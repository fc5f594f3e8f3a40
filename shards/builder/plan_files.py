"""The parts of a source's plan in the private state folder.

STATE/MODALITY-SOURCE-SETTINGS/part-000.parquet    a part of the plan
STATE/MODALITY-SOURCE-SETTINGS/part-000.published  it is in a dataset: it must not change any more
STATE/MODALITY-SOURCE-SETTINGS/keys-000.parquet    which key is which unit of which object
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from shards.builder.plan import PLAN_SCHEMA, Plan
from shards.builder.state import read_private, table_facts, write_private
from shards.schema import canonical_json
from shards.stores.atomic import replace_file

Mark = Literal["started", "published"]


def plan_folder(state: Path, modality: str, source: str, settings: Mapping[str, Any]) -> Path:
    """Where the plan of a source lies; other settings make another plan."""
    digest = hashlib.sha256(canonical_json(dict(settings))).hexdigest()[:8]
    return state / f"{modality}-{source}-{digest}"


def load_parts(folder: Path) -> list[Plan]:
    """Read the parts of a plan, in their order.

    Raises:
        DataError: one is damaged.
    """
    parts: list[Plan] = []
    while (path := _part(folder, len(parts))).exists():
        table = read_private(path, PLAN_SCHEMA)
        facts = table_facts(table)
        plain = table.replace_schema_metadata(None)
        parts.append(Plan(plain, int(facts["first_shard"]), int(facts["shard_bytes"])))
    return parts


def save_part(folder: Path, number: int, part: Plan) -> None:
    """Write a part."""
    facts = {"first_shard": str(part.first_shard), "shard_bytes": str(part.shard_bytes)}
    write_private(_part(folder, number), part.objects.replace_schema_metadata(facts))


def drop_parts(folder: Path, start: int) -> None:
    """Delete the parts from a number on, the last one first; marks first, so that none meets another part."""
    numbers = [int(path.stem.removeprefix("part-")) for path in folder.glob("part-*.parquet")]
    for number in sorted((number for number in numbers if number >= start), reverse=True):
        part = _part(folder, number)
        marks = [part.with_suffix(f".{mark}") for mark in get_args(Mark)]
        for path in (*marks, keys_path(folder, number), part):
            path.unlink(missing_ok=True)


def is_marked(folder: Path, number: int, mark: Mark) -> bool:
    """Whether a part was marked."""
    return _part(folder, number).with_suffix(f".{mark}").exists()


def mark_part(folder: Path, number: int, mark: Mark) -> None:
    """Mark a part."""
    if not is_marked(folder, number, mark):
        with replace_file(_part(folder, number).with_suffix(f".{mark}"), mode=0o600):
            pass


def keys_path(folder: Path, number: int) -> Path:
    """Where the table of a part's keys lies."""
    return folder / f"keys-{number:03d}.parquet"


def refresh_parts(folder: Path, before: Sequence[Plan], after: Sequence[Plan]) -> None:
    """Write the parts that have other rows now."""
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        if not old.objects.equals(new.objects):
            save_part(folder, number, new)


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:03d}.parquet"
