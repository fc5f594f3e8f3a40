"""Which checkpoints a run has, which of them are whole, and which are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frepa_dist.runs import CHECKPOINTS, MANIFEST, list_checkpoints
from frepa_dist.train.checkpoint.files import file_checksum
from shards.stores.atomic import remove_temporaries
from shards.support.errors import DataError

PARTIAL = "partial-"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's name states."""
    return int(folder.name.removeprefix("step-"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint states of itself; empty where that cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None where each has the size and checksum that was written."""
    files = read_manifest(folder).get("files")
    if not isinstance(files, dict) or not files:
        return f"{MANIFEST} cannot be read"
    for name, entry in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes, {entry['size']} were written"
            if file_checksum(path) != entry["crc32c"]:
                return f"{name} has other bytes than were written"
        except (OSError, KeyError, TypeError) as error:
            return f"{name}: {error}"
    return None


def is_intact(folder: Path) -> bool:
    """Whether every file of a checkpoint is there with the size and checksum its manifest states."""
    return damage(folder) is None


def newest_good(run_dir: Path) -> Path | None:
    """The newest checkpoint that is whole and not doubtful, else the newest that is whole.

    Raises:
        DataError: as `newest_intact`.
    """
    good = [folder for folder in list_checkpoints(run_dir) if not read_manifest(folder).get("doubtful")]
    return next((folder for folder in reversed(good) if is_intact(folder)), None) or newest_intact(run_dir)


def newest_intact(run_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; None when the run has none at all.

    The file `latest` has no say: it may be missing or point nowhere.

    Raises:
        DataError: there are checkpoints, and each is damaged.
    """
    found = []
    for folder in reversed(list_checkpoints(run_dir)):
        problem = damage(folder)
        if problem is None:
            return folder
        found.append(f"{folder.name}: {problem}")
    if found:
        raise DataError(
            f"all {len(found)} checkpoints are damaged ({'; '.join(found)})",
            where=run_dir / CHECKPOINTS,
            fix="restore one from a backup, or start a new run",
        )
    return None


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; killed in between, it is no longer listed."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_newer(folder: Path) -> list[str]:
    """Remove checkpoints newer than the one a run goes back to, and say which.

    They are damaged, or of steps that are being undone: a later start must not choose them.
    """
    newer = [other for other in list_checkpoints(folder.parent.parent) if other.name > folder.name]
    for other in newer:
        remove_checkpoint(other)
    return [other.name for other in newer]


def remove_remains(run_dir: Path) -> None:
    """Remove what writes and removals that were killed have left; nothing may be being written."""
    checkpoints = run_dir / CHECKPOINTS
    unlisted = {path for path in checkpoints.glob("step-*") if not (path / MANIFEST).exists()}
    for path in {*checkpoints.glob(f"{PARTIAL}*"), *unlisted}:
        shutil.rmtree(path, ignore_errors=True)
    remove_temporaries(checkpoints)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept.

    Attributes:
        last: how many of the newest.
        every: those of steps that are multiples of this as well; None: of no others.
        metric: the best by this logged metric as well; None: not.
        largest: whether the best has the largest value, not the smallest.
    """

    last: int
    every: int | None = None
    metric: str | None = None
    largest: bool = False

    def kept(self, values: Mapping[int, float | None]) -> set[int]:
        """Choose steps to keep.

        Args:
            values: the metric by step, None where it was not known.
        """
        steps = sorted(values)
        chosen = set(steps[-self.last :])
        if self.every is not None:
            chosen |= {step for step in steps if step % self.every == 0}
        known = {step: value for step, value in values.items() if value is not None}
        if self.metric is not None and known:
            sign = -1 if self.largest else 1
            # of equal ones the newest
            chosen.add(min(known, key=lambda step: (sign * known[step], -step)))
        return chosen

    def apply(self, run_dir: Path) -> None:
        """Remove what is not kept."""
        folders = list_checkpoints(run_dir)
        kept = self.kept({step_of(folder): self._value(folder) for folder in folders})
        good = [step_of(folder) for folder in folders if not read_manifest(folder).get("doubtful")]
        kept |= set(good[-1:])  # to go back to
        remove_all([folder for folder in folders if step_of(folder) not in kept])

    def _value(self, folder: Path) -> float | None:
        if self.metric is None:
            return None
        value = read_manifest(folder).get("metrics", {}).get(self.metric)
        return float(value) if isinstance(value, int | float) else None


def remove_all(folders: Sequence[Path]) -> None:
    """Remove checkpoints."""
    for folder in folders:
        remove_checkpoint(folder)
