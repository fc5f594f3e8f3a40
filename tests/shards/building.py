"""What the tests of building share: a build of synthetic images with a fixed salt, views of the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from shards.builder.build import BuildConfig, BuildReport, build_dataset
from shards.dataset import load_snapshot, read_index, read_table
from tests.shards.images import write_images

SALT = "0123456789abcdef"
NAMES = [f"patient_{number:02d}.{suffix}" for number in range(35) for suffix in ("png", "jpg")]
"""Seventy images: three shards."""


def build(source: Path | str | Sequence[Path | str], root: Path | str, /, **options: object) -> BuildReport:
    sources = [source] if isinstance(source, str | Path) else source
    return build_dataset(sources, root, make_config(**options))


def make_config(**options: object) -> BuildConfig:
    return BuildConfig(**{"modality": "fundus", "size": 64, "jobs": 1, "salt": SALT, **options})


def index_rows(root: Path | str) -> list[dict]:
    snapshot = load_snapshot(root)
    return [row for shard in snapshot.shards for row in read_index(root, shard).to_pylist()]


def table_of(root: Path | str, name: str) -> list[dict]:
    return read_table(root, load_snapshot(root), name).to_pylist()


def active_rows(root: Path | str) -> list[dict]:
    """Index rows that an order would take."""
    left_out = {(row["shard"], row["row"]) for row in table_of(root, "duplicates")}
    return [
        row | {"shard": shard.path}
        for shard in load_snapshot(root).shards
        for number, row in enumerate(read_index(root, shard).to_pylist())
        if (shard.path, number) not in left_out
    ]


def known_keys(root: Path, source: str = "fundus-images") -> dict[str, dict]:
    """What the state folder knows of each key; later parts know better."""
    paths = sorted((root.parent / f"{root.name}.state").glob(f"{source}-*/keys-*.parquet"))
    return {row["key"]: row for path in paths for row in pq.read_table(path).to_pylist()}


def make_source(folder: Path) -> Path:
    return write_images(folder, NAMES)
