"""Checkpoints: written beside, verified, then made `latest` in one step; a torn one is never chosen.

A checkpoint folder holds DeepSpeed's files of each engine, `state.pt` (teachers, critic, method, place in
the data), `rank-R.pt` (random state of rank R) and `student.safetensors` (full fp32 weights, what
evaluation and export read). `manifest.json` lists size and crc32c of every file and is written last.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import SafetensorError
from safetensors.torch import save_file

from frepa_dist.runs import (
    CHECKPOINTS,
    LATEST,
    MANIFEST,
    STUDENT_WEIGHTS,
    checkpoint_name,
    list_checkpoints,
)
from frepa_dist.train.engines import EngineSubmodule, World
from frepa_dist.train.submodules import Submodules
from shards.stores.atomic import replace_text
from shards.support.errors import ConfigError, DataError, DivergedError, EnvironmentFault


def file_checksum(path: Path) -> int:
    """crc32c of a file."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            checksum.update(chunk)
    return int.from_bytes(checksum.digest(), "big")


def is_intact(folder: Path) -> bool:
    """Whether every file of a checkpoint is there with the size and checksum its manifest states."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all(
            (folder / name).stat().st_size == entry["size"]
            and file_checksum(folder / name) == entry["crc32c"]
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def newest_intact(run_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; None when the run has none at all.

    Raises:
        DataError: there are checkpoints, and each is damaged.
    """
    available = list_checkpoints(run_dir)
    for folder in reversed(available):
        if is_intact(folder):
            return folder
    if available:
        raise DataError(
            f"all {len(available)} checkpoints are damaged",
            where=run_dir / CHECKPOINTS,
            fix="restore one from a backup, or start a new run",
        )
    return None


def _full_weights(engine: EngineSubmodule) -> dict[str, torch.Tensor]:
    """Full fp32 weights of an engine's module on the CPU; all ranks must call it."""
    weights = dict(engine.fixed)
    for name, parameter in engine.module.named_parameters():
        if name not in engine.fixed:
            # None where the engine keeps no master copy (ZeRO 0 in fp32): then the weight itself is fp32
            master = safe_get_full_fp32_param(parameter)
            weights[name] = parameter.detach().float().cpu() if master is None else master.cpu()
    return {name: value.contiguous() for name, value in weights.items()}


def save_checkpoint(
    run_dir: Path, step: int, submodules: Submodules, state: Mapping[str, Any], world: World, keep: int
) -> None:
    """Write the checkpoint after `step` steps and make it the latest; all ranks must call it.

    Ranks on several nodes need `run_dir` on storage they share. A rank that fails here must end its process,
    so that the launcher ends the others: they wait for it at the next barrier.

    Raises:
        DivergedError: a weight is not finite; the checkpoint would be of no use.
        EnvironmentFault: the disk is full or read-only; earlier checkpoints stay as they were.
    """
    final = run_dir / CHECKPOINTS / checkpoint_name(step)
    partial = final.with_name(f"partial-{final.name}")
    weights = _full_weights(submodules.student)
    own = submodules.state_dict()
    _check_finite(weights, own, submodules, final)
    with _writing(final):
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        for name, engine in submodules.engines.items():
            engine.engine.save_checkpoint(str(partial), tag=name, save_latest=False)
        random_state = {"cpu": torch.get_rng_state()}
        if world.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(world.device)
        torch.save(random_state, partial / random_state_name(world.rank))
        if world.is_main:
            torch.save({**state, "submodules": own}, partial / "state.pt")
            save_file(weights, partial / STUDENT_WEIGHTS, metadata={"step": str(step)})
        dist.barrier()
        if world.is_main:
            _check_shared(partial, world)
            _commit(partial, final, keep)
        dist.barrier()


def random_state_name(rank: int) -> str:
    """File of a rank's random state in a checkpoint."""
    return f"rank-{rank}.pt"


def _check_finite(
    student: Mapping[str, torch.Tensor], own: Mapping[str, Any], submodules: Submodules, where: Path
) -> None:
    """All ranks hold the same weights here, so all of them raise or none."""
    networks = {
        "student": student,
        **{name: opponent.module.state_dict() for name, opponent in submodules.opponents.items()},
        **own["teachers"],
        **{name: plain.module.state_dict() for name, plain in submodules.plain.items()},
    }
    for name, state in networks.items():
        if not all(bool(torch.isfinite(value).all()) for value in state.values()):
            raise DivergedError(
                f"weights of {name} are no longer finite, so no checkpoint was made",
                where=where,
                fix="start a new run with a lower learning rate or loss weight; checkpoints before stay",
            )


def _check_shared(partial: Path, world: World) -> None:
    missing = [rank for rank in range(world.size) if not (partial / random_state_name(rank)).is_file()]
    if missing:
        raise EnvironmentFault(
            f"files of ranks {missing} are not there: the nodes do not share this folder",
            where=partial,
            fix="put `output` on storage that all nodes mount",
        )


@contextlib.contextmanager
def _writing(where: Path) -> Iterator[None]:
    """Turn the ways in which a disk refuses into one error; torch and safetensors have their own."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise EnvironmentFault(
            f"the checkpoint could not be written: {error}",
            where=where,
            fix="free disk space or make the folder writable, then `frepa resume` the run",
        ) from error


def _commit(partial: Path, final: Path, keep: int) -> None:
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    entries = {}
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries[path.relative_to(partial).as_posix()] = {
            "size": path.stat().st_size,
            "crc32c": file_checksum(path),
        }
    replace_text(partial / MANIFEST, json.dumps({"files": entries}, indent=1))
    shutil.rmtree(final, ignore_errors=True)  # a damaged one that the run was resumed past
    partial.rename(final)
    replace_text(final.parent / LATEST, final.name + "\n")
    for old in list_checkpoints(final.parent.parent)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, submodules: Submodules, world: World) -> dict[str, Any]:
    """Restore everything from an intact checkpoint and return its `state`; all ranks must call it.

    Raises:
        ConfigError: it was written by another number of ranks.
        DataError: DeepSpeed cannot read its part.
    """
    state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    if state["world_size"] != world.size:
        raise ConfigError(
            f"written by {state['world_size']} rank(s), resumed with {world.size}",
            where=folder,
            fix=f"resume with --num-ranks {state['world_size']}",
        )
    for name, engine in submodules.engines.items():
        loaded, _ = engine.engine.load_checkpoint(str(folder), tag=name)
        if loaded is None:  # DeepSpeed warns and returns; going on would train from random weights
            raise DataError(f"DeepSpeed found no state of '{name}'", where=folder)
    submodules.load_state_dict(state.pop("submodules"))
    path = folder / random_state_name(world.rank)
    random_state = torch.load(path, map_location="cpu", weights_only=True)
    torch.set_rng_state(random_state["cpu"])
    if "cuda" in random_state and world.device.type == "cuda":
        torch.cuda.set_rng_state(random_state["cuda"], world.device)
    dist.barrier()
    return state


def allow_checkpoint_classes() -> None:
    """Let `weights_only` loading read the classes DeepSpeed's optimizer files name, and no others."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])
