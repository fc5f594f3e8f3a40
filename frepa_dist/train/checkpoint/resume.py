"""Going back to a checkpoint: what may differ from when it was taken, and what may not."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from frepa_dist.config import RunConfig
from frepa_dist.journal import append_event
from frepa_dist.train.checkpoint.files import TensorReader, join_state
from frepa_dist.train.checkpoint.folders import remove_newer
from frepa_dist.train.checkpoint.pieces import restore_submodules
from frepa_dist.train.engines import World
from frepa_dist.train.records import describe_environment
from frepa_dist.train.submodules import Submodules
from shards.support.errors import ConfigError, DataError

STATE = "state.json"
FORMAT = 1
# what decides no number: where things lie, how a batch is cut and networks are kept, what is written down
FREE_SETTINGS = (
    "output",
    "data.root",
    "data.remote",
    "data.cache_dir",
    "data.cache_bytes",
    "data.num_workers",
    "train.micro_batch_size",
    "train.zero_stage",
    "train.offload_optimizer",
    "train.opponent.zero_stage",
    "train.compile",
    "train.deepspeed",
    "train.guard",
    "train.log_every",
    "train.log_keys",
    "train.checkpoint_every",
    "train.checkpoint_failures",
    "train.checkpoint_copy",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.keep_best",
    "train.metrics",
)

# settings whose keys are names that a user chooses
OWN_KEYS = ("data.modality_weights", "data.hf_digests", "train.deepspeed")


def changed_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Settings that both know and that differ: dotted key -> (before, now).

    A key that one side lacks is a setting of another version; not so where keys are the user's own.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for key in sorted(before.keys() & now.keys()):
        old, new, name = before[key], now[key], f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping) and name not in OWN_KEYS:
            changed |= changed_settings(old, new, f"{name}.")
        elif old != new:
            changed[name] = old, new
    return changed


def is_free(key: str) -> bool:
    """Whether a setting may change when a run goes on."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE_SETTINGS)


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint states as JSON; tensors in it are only named.

    Raises:
        DataError: it is not one of this program.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if state["format"] == FORMAT:
            return dict(state)
        found = f"format {state['format']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = str(error)
    raise DataError(
        f"no checkpoint that this version can go on from ({found})",
        where=folder,
        fix="use the version that wrote it, or start a new run; `init` takes weights of another run",
    )


def check_same_run(stored: Mapping[str, Any], config: RunConfig, snapshot: str, where: Path) -> list[str]:
    """Make sure that a checkpoint is of the run that is to go on.

    Args:
        stored: what `read_state` gave.
        config: of the run as it goes on.
        snapshot: hash of the dataset's snapshot as it goes on.
        where: the checkpoint.

    Returns:
        The settings that differ and may, in words.

    Raises:
        ConfigError: the dataset or a setting differs that decides what is learned.
    """
    if stored["snapshot"] != snapshot:
        raise ConfigError(
            f"the checkpoint was trained on snapshot {stored['snapshot']}, not on {snapshot}",
            where=where,
            fix="name the snapshot it was trained on (`data.snapshot`), or start a new run whose `init` "
            "names this one",
        )
    changed = changed_settings(stored["config"], config.model_dump(mode="json"))
    words = {key: f"{key}: {old} -> {new}" for key, (old, new) in changed.items()}
    refused = [text for key, text in words.items() if not is_free(key)]
    if refused:
        raise ConfigError(
            f"settings have changed since the checkpoint: {'; '.join(refused)}",
            where=where,
            fix="put them back in the run's config.yaml, or start a new run with `frepa pretrain`",
        )
    return list(words.values())


def load_checkpoint(
    folder: Path, submodules: Submodules, world: World, config: RunConfig, snapshot: str
) -> dict[str, Any]:
    """Restore everything from an intact checkpoint and return its `state`; all ranks must call it.

    Any number of ranks, in any ZeRO stage, may have written it. Where the number of ranks is the same and the
    machine too, the run goes on bit for bit as if it had not stopped.

    Args:
        folder: the checkpoint; where it is of this run, newer ones are removed.
        submodules: the networks to bring there.
        world: this rank among the others.
        config: of the run as it goes on.
        snapshot: hash of the dataset's snapshot as it goes on.

    Raises:
        ConfigError: the dataset or a setting differs that decides what is learned.
        DataError: it is of another version, or tensors are missing.
    """
    stored = read_state(folder)
    allowed = check_same_run(stored, config, snapshot, folder)
    with TensorReader(folder) as reader:
        restore_submodules(submodules, reader)
        state: dict[str, Any] = join_state(stored["state"], reader)
        _restore_random_state(reader, stored, world)
    dist.barrier()  # everyone has read before rank 0 removes, and then writes
    if world.is_main:
        _report(folder, config.output, stored, allowed, world)
    return state


def _restore_random_state(reader: TensorReader, stored: Mapping[str, Any], world: World) -> None:
    """Of as many ranks each has its own; other ranks begin anew, by step and rank.

    Only dropout and drop-path draw from it: what decides which pixels are seen is keyed by sample.
    """
    if stored["world_size"] != world.size:
        torch.manual_seed((stored["step"] << 20) + world.rank)
        return

    def read(name: str) -> torch.Tensor | None:
        path = f"random/{world.rank}/{name}"
        return reader.read(path, stored["random_sizes"][name]) if path in reader else None

    cpu, cuda = read("cpu"), read("cuda")
    if cpu is not None:
        torch.set_rng_state(cpu)
    if cuda is not None and world.device.type == "cuda":
        torch.cuda.set_rng_state(cuda, world.device)


def _report(folder: Path, run_dir: Path, stored: Mapping[str, Any], allowed: list[str], world: World) -> None:
    """Write down what is not as it was, and undo what came after a checkpoint of this run."""
    removed = remove_newer(folder) if folder.parent.parent.samefile(run_dir) else []
    if removed:
        append_event(run_dir, "checkpoints_removed", back_to=folder.name, removed=removed)
    environment = changed_settings(stored["environment"], describe_environment(world))
    differing = [f"{key}: {old} -> {new}" for key, (old, new) in environment.items()]
    if allowed or differing:
        append_event(run_dir, "changed", settings=allowed, environment=differing)
    if differing:
        print(
            f"frepa: resumed on what it was not trained on so far ({'; '.join(differing)}); this is allowed, "
            "numbers may differ in their last digits",
            file=sys.stderr,
        )
