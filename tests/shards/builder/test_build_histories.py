"""Random histories of two sources of one dataset: nothing is ever lost or counted twice."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

import shards.builder.prepare
import shards.builder.writer
from shards.builder.canonical import pixel_hash, resize_to_canonical
from shards.dataset import has_dataset, load_snapshot
from shards.formats.common import Unreadable
from shards.support.errors import DataError
from tests.shards.building import active_rows, build, index_rows, table_of
from tests.shards.images import draw, encode

CONTENTS = {
    (seed, level): encode(draw(seed, 70, 70, 1), compress_level=level)
    for seed in range(5)
    for level in (1, 2)
}
HASHES = {seed: pixel_hash(resize_to_canonical(draw(seed, 70, 70, 1), 64)) for seed in range(5)}
FILES = [f"{number}.png" for number in range(7)]


def change(folder: Path, rng: random.Random) -> None:
    """Write, overwrite or delete a file."""
    path = folder / rng.choice(FILES)
    if rng.random() < 0.25:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(CONTENTS[rng.choice(list(CONTENTS))])


def build_disturbed(folder: Path, root: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build; sometimes a file changes after the plan was made, sometimes a decoder refuses one."""
    refused = f"0/{rng.choice(FILES)}".encode() if rng.random() < 0.3 else b""
    is_disturbed = rng.random() < 0.3

    def make_sample(decoded, window, blob, item, unit, spec, make=shards.builder.writer.make_sample):
        if item.name == refused:
            raise Unreadable("damaged")
        return make(decoded, window, blob, item, unit, spec)

    def save_part(*args: object, save=shards.builder.prepare.save_part) -> None:
        save(*args)
        if is_disturbed:
            change(folder, rng)

    with monkeypatch.context() as patch:
        patch.setattr(shards.builder.writer, "make_sample", make_sample)
        patch.setattr(shards.builder.prepare, "save_part", save_part)
        try_build(folder, root, retry_quarantined=rng.random() < 0.4)


def try_build(folder: Path, root: Path, **options: object) -> None:
    try:
        build(folder, root, source=folder.name, **options)
    except DataError as error:
        if "no image can be used" not in str(error):
            raise


def check(root: Path) -> None:
    """No unit is there twice, and the accounting is that of the tables."""
    if not has_dataset(root):
        return
    active, rows = active_rows(root), index_rows(root)
    assert max(Counter(row["pixel_hash"] for row in active).values(), default=0) <= 1
    assert len({row["key"] for row in rows}) == len(rows)
    quarantine, duplicates = table_of(root, "quarantine"), table_of(root, "duplicates")
    units = Counter((row["source"], row["object"], row["unit"]) for row in quarantine + duplicates)
    assert max(units.values(), default=0) <= 1
    counts = load_snapshot(root).counts
    assert counts.is_closed
    assert (counts.samples, counts.duplicates) == (len(active), len(duplicates))
    assert counts.quarantined + counts.excluded == len(quarantine)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_or_counted_twice(tmp_path, monkeypatch, seed):
    rng, root = random.Random(seed), tmp_path / "root"
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        (folder / "notes.txt").write_bytes(b"never empty")
    for _ in range(6):
        folder = rng.choice(folders)
        for _ in range(rng.randint(1, 6)):
            change(folder, rng)
        build_disturbed(folder, root, rng, monkeypatch)
        check(root)
    for _ in range(2):  # what changed during the last build, and what it repeated
        for folder in folders:
            try_build(folder, root, retry_quarantined=True)
            check(root)
    found = {row["pixel_hash"] for row in active_rows(root)}
    there = {path.read_bytes() for folder in folders for path in folder.glob("*.png")}
    assert {HASHES[seed] for (seed, _), data in CONTENTS.items() if data in there} <= found
