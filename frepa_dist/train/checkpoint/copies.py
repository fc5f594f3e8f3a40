"""Second copies of checkpoints, in S3 or another folder, for when the run folder's disk is lost.

PLACE/config.yaml, metrics.jsonl       the run's, as of the last copy
PLACE/checkpoints/step-*/              checkpoints; manifest.json comes last and goes first
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from threading import Condition, Thread

from frepa_dist.journal import append_event
from frepa_dist.runs import CHECKPOINTS, CONFIG, MANIFEST, METRICS, list_checkpoints
from frepa_dist.train.checkpoint.folders import (
    PARTIAL,
    Retention,
    damage,
    newest_intact,
    remove_checkpoint,
)
from shards.stores.atomic import writing_to
from shards.stores.parts import read_parts
from shards.stores.store import MissingFile, Store, open_store
from shards.support.errors import ConfigError, DataError, EnvironmentFault, FrepaError

_PIECE_BYTES = 8 << 20


class Copies:
    """Keeps the checkpoints of a run in a second place as well; one process of a run makes it.

    A thread copies, and training waits for it at the very end only. What cannot be copied is said, and tried
    again with the next checkpoint.

    Args:
        place: a folder, or `s3://bucket/prefix`; of this run alone.
        run_dir: the run folder.
        retention: which copies stay, by the steps of both places.
    """

    def __init__(self, place: str | Path, run_dir: Path, retention: Retention) -> None:
        self._store, self._run_dir, self._retention = open_store(place), run_dir, retention
        self._changed = Condition()
        self._is_due = self._is_at_work = False
        Thread(target=self._work, name="copies", daemon=True).start()

    def send(self) -> None:
        """Bring the copies to what the run folder holds, soon."""
        with self._changed:
            self._is_due = True
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait until nothing is left to copy, or it has failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_due and not self._is_at_work)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._is_at_work = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._is_due)
                self._is_due, self._is_at_work = False, True
            try:
                mirror(self._run_dir, self._store, self._retention)
            except Exception as error:  # a copy is a second one: training is not ended for it
                message = str(error) if isinstance(error, FrepaError) else f"{type(error).__name__}: {error}"
                print(f"frepa: checkpoints are not copied: {message}", file=sys.stderr, flush=True)
                with contextlib.suppress(OSError):
                    append_event(self._run_dir, "copy_failed", error=message)


def mirror(run_dir: Path, store: Store, retention: Retention) -> None:
    """Copy the checkpoints that a run has and a store lacks, the newest first; remove those not to be kept.

    Nothing whole is removed before the newest is there.

    Raises:
        EnvironmentFault: the store cannot be reached or written, or a checkpoint went before it was copied.
    """
    folders = {folder.name: folder for folder in list_checkpoints(run_dir)}
    if not folders:  # a folder that is gone is no reason to remove copies
        return
    for name in (CONFIG, METRICS):
        if (run_dir / name).is_file():
            _send(run_dir / name, store, name)
    there = _names(store)[0]
    for name, folder in sorted(folders.items(), reverse=True):
        try:
            if name not in there or store.read(_manifest(name)) != (folder / MANIFEST).read_bytes():
                _send_checkpoint(folder, store)
        except FileNotFoundError as error:
            if name == max(folders):
                raise EnvironmentFault(
                    f"{name} went before it was copied: copies are slower than checkpoints come",
                    where=store.uri,
                    fix="make checkpoints less often, or keep more of them",
                ) from error
    _remove_others(store, retention, max(folders))


def _send_checkpoint(folder: Path, store: Store) -> None:
    store.delete(_manifest(folder.name))  # what lies there, of a run that went back, is no longer whole
    files = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
    for path in [*files, folder / MANIFEST]:
        _send(path, store, f"{CHECKPOINTS}/{folder.name}/{path.name}")


def _remove_others(store: Store, retention: Retention, newest: str) -> None:
    """Remove what is not to be kept: also what the run has gone back behind, and what is not whole."""
    complete, present = _names(store)
    if newest not in complete:
        return
    values = {}
    for name in complete:
        if name <= newest:
            metrics = json.loads(store.read(_manifest(name))).get("metrics", {})
            values[_step(name)] = metrics.get(retention.metric)
    kept = retention.kept(values)
    for name in present:
        if name not in complete or _step(name) not in kept:
            store.delete(_manifest(name))
            for stored in list(store.list(f"{CHECKPOINTS}/{name}/")):
                store.delete(stored.path)


def _manifest(name: str) -> str:
    return f"{CHECKPOINTS}/{name}/{MANIFEST}"


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def check_place_is_free(place: str | Path) -> None:
    """Make sure that no other run has its copies in a place.

    Raises:
        ConfigError: one has.
        EnvironmentFault: the place cannot be reached.
    """
    if _names(open_store(place))[0]:
        raise ConfigError(
            "this place holds the checkpoints of a run already",
            where=f"train.checkpoint_copy: {place}",
            fix="name another, or `frepa pretrain --or-resume` to go on with that run",
        )


def fetch_config(place: str | Path) -> bytes | None:
    """The config of the run whose copies lie in a place; None where there is none with a checkpoint."""
    store = open_store(place)
    try:
        return store.read(CONFIG) if _names(store)[0] else None
    except MissingFile:
        return None


def find_newest(run_dir: Path, place: str | Path | None) -> Path | None:
    """The newest whole checkpoint of a run; where the folder lost it, its copy, brought there.

    Args:
        run_dir: the run folder.
        place: where copies are; None: nowhere.

    Raises:
        DataError: there are checkpoints, and each is damaged.
        EnvironmentFault: there is none, and the place cannot be reached, or the folder written.
    """
    listed = list_checkpoints(run_dir)
    found, damaged = None, None
    try:
        found = newest_intact(run_dir)
    except DataError as error:
        damaged = error
    if place is None or (found is not None and found == listed[-1]):
        copied = None
    else:
        try:
            copied = fetch_newest(place, run_dir, found.name if found else "")
        except FrepaError:
            if found is None:
                raise
            copied = None  # an older one does
    found = copied or found
    if found is None and damaged is not None:
        raise damaged
    return found


def fetch_newest(place: str | Path, run_dir: Path, newer_than: str = "") -> Path | None:
    """Bring the newest whole copy back into a run folder; None where there is none.

    Args:
        place: where copies are.
        run_dir: the run folder.
        newer_than: name of a checkpoint; copies that are not newer do not count.

    Raises:
        DataError: there are copies, and each is damaged.
        EnvironmentFault: the place cannot be reached, or the folder written.
    """
    store = open_store(place)
    problems = []
    for name in sorted(_names(store)[0], reverse=True):
        if name <= newer_than:
            break
        final = run_dir / CHECKPOINTS / name
        partial = final.with_name(f"{PARTIAL}{name}")
        with writing_to(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        for stored in list(store.list(f"{CHECKPOINTS}/{name}/")):
            _receive(store, stored.path, stored.num_bytes, partial / stored.path.rpartition("/")[2])
        problem = damage(partial)
        if problem is None:
            with writing_to(final):
                remove_checkpoint(final)
                partial.rename(final)
            if not (run_dir / METRICS).exists() and store.num_bytes(METRICS):
                (run_dir / METRICS).write_bytes(store.read(METRICS))
            return final
        shutil.rmtree(partial, ignore_errors=True)
        problems.append(f"{name}: {problem}")
    if problems:
        raise DataError(f"all copies of checkpoints are damaged ({'; '.join(problems)})", where=place)
    return None


def _names(store: Store) -> tuple[set[str], set[str]]:
    """Checkpoints that are whole in a store, and all of which something is there."""
    paths = [stored.path.split("/") for stored in store.list(f"{CHECKPOINTS}/")]
    present = {parts[1] for parts in paths if len(parts) == 3}
    return {parts[1] for parts in paths if parts[2:] == [MANIFEST]}, present


def _send(path: Path, store: Store, name: str) -> None:
    with path.open("rb") as source, store.writing(name) as target:
        shutil.copyfileobj(source, target, _PIECE_BYTES)


def _receive(store: Store, name: str, num_bytes: int, path: Path) -> None:
    with writing_to(path), path.open("wb") as file:
        for part in read_parts(lambda start, size: store.read_range(name, start, size), num_bytes):
            file.write(part)
        if file.tell() != num_bytes:
            raise EnvironmentFault(f"{file.tell()} of {num_bytes} bytes came", where=store.where(name))
