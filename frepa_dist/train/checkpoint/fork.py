"""A new run that goes on from another one's checkpoint under other settings, and says so.

`frepa resume` lets no setting change that decides what is learned: a run is one trajectory under one config.
A fork is another run, in a folder of its own: its first checkpoint is the other's, restated under the new
config, and its event log begins with where it comes from and what has changed. From then on it is a run like
any other, as strict on resume.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from frepa_dist.config import RunConfig
from frepa_dist.journal import append_event
from frepa_dist.runs import CHECKPOINTS, CONFIG, MANIFEST, check_unused, find_checkpoint, load_run_config
from frepa_dist.train.checkpoint.files import write_bytes
from frepa_dist.train.checkpoint.folders import PARTIAL, damage, read_manifest, step_of
from frepa_dist.train.checkpoint.resume import STATE, changed_settings, is_free, read_state
from shards.stores.atomic import replace_text, sync_folder, writing_to
from shards.support.errors import ConfigError, DataError
from shards.support.settings import dump_yaml

# another network, other samples or another schedule: a checkpoint means nothing there
FIXED_SETTINGS = (
    "data",
    "method.name",
    "method.model",
    "method.aux.model",
    "method.aux.weights",
    "train.global_batch_size",
    "train.epochs",
    "train.steps",
    "train.precision",
    "train.seed",
)


def is_forkable(key: str) -> bool:
    """Whether a fork may have another value of a setting."""
    fixed = any(key == name or key.startswith(f"{name}.") for name in FIXED_SETTINGS)
    return is_free(key) or not fixed


def check_changes(changed: dict[str, tuple[Any, Any]], where: Path) -> None:
    """Make sure that a checkpoint can be gone on with under changed settings.

    Args:
        changed: dotted key -> (before, now).
        where: the checkpoint.

    Raises:
        ConfigError: one decides the network, the samples or the schedule, or turns a term on or off.
    """
    refused = [
        f"{key}: {old} -> {new}"
        for key, (old, new) in changed.items()
        if not is_forkable(key) or (not is_free(key) and (old is None or new is None))
    ]
    if refused:
        raise ConfigError(
            f"a fork cannot change {'; '.join(refused)}",
            where=where,
            allowed="other numbers: weights of losses, learning rates, mask ratio, momentum and the like",
            fix="start a new run; `init` takes weights of another one",
        )


def fork_run(source: Path, step: int, target: Path, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Begin a run at a checkpoint of another one, under another config.

    Killed at any moment it leaves a folder without config.yaml, which is begun anew.

    Args:
        source: the run to fork.
        step: which checkpoint of it.
        target: folder of the new run, unused.
        config: of the new run; its snapshot and places are taken from the source.

    Returns:
        The settings that changed: dotted key -> (before, now).

    Raises:
        ConfigError: a setting may not change, or the folder is used.
        DataError: the source has no such checkpoint, or it is damaged.
    """
    if not (target / CONFIG).exists():
        shutil.rmtree(target / CHECKPOINTS, ignore_errors=True)
    check_unused(target)
    folder = find_checkpoint(source, step)
    problem = damage(folder)
    if problem is not None:
        raise DataError(f"the checkpoint is damaged: {problem}", where=folder)
    old = load_run_config(source)
    data = config.data.model_copy(
        update={key: getattr(old.data, key) for key in ("root", "snapshot", "cache_dir")}
    )
    config = config.model_copy(update={"output": target.resolve(), "data": data})
    state, new = read_state(folder), config.model_dump(mode="json")
    changed = changed_settings(state["config"], new)
    check_changes(changed, folder)
    with writing_to(target):
        _copy_checkpoint(folder, target / CHECKPOINTS / folder.name, {**state, "config": new})
    told = {key: list(pair) for key, pair in changed.items() if key != "output"}
    append_event(target, "forked", run=str(source.resolve()), step=step_of(folder), changed=told)
    replace_text(target / CONFIG, dump_yaml(new))  # last: with it, it is a run
    return changed


def _copy_checkpoint(folder: Path, target: Path, state: dict[str, Any]) -> None:
    """Copy a checkpoint with another state.json; what is the same bytes is linked where the disk lets it."""
    partial = target.with_name(f"{PARTIAL}{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    manifest = read_manifest(folder)
    for name in manifest["files"]:
        if name != STATE:
            try:
                os.link(folder / name, partial / name)
            except OSError:  # another file system, or one without links
                shutil.copyfile(folder / name, partial / name)
    written = write_bytes(partial / STATE, [json.dumps(state, indent=1).encode()])
    manifest["files"][STATE] = {"size": written.size, "crc32c": written.crc32c}
    replace_text(partial / MANIFEST, json.dumps(manifest, indent=1))
    partial.rename(target)
    sync_folder(target.parent)
