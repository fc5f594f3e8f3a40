"""The run folder: what lies where, and how others read it (evaluation, export, report).

RUN/config.yaml          the resolved configuration, with the snapshot it is pinned to
RUN/environment.json     versions of what computed it
RUN/metrics.jsonl        a JSON line per logged step
RUN/events.jsonl         a JSON line per start, checkpoint, skipped sample or step, fault, restart
RUN/keys/rank-R.jsonl    with `train.log_keys`: a JSON line per step, the keys of the samples it was given
RUN/outcome.json         how the last start ended; it alone decides (launchers' exit codes cannot be trusted)
RUN/logs/rank-R.log      what rank R printed, of all supervised starts; launcher-N.log of node N's launcher
RUN/heartbeats/          what each rank last said of itself, where a supervisor listens
RUN/checkpoints/latest   name of the newest complete checkpoint
RUN/checkpoints/step-*/  a checkpoint; student.safetensors in it holds the student's fp32 weights
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.support.errors import ConfigError, DataError
from shards.support.settings import load_settings

if TYPE_CHECKING:
    from torch import nn

    from frepa_dist.config import RunConfig

CONFIG, METRICS, EVENTS, OUTCOME = "config.yaml", "metrics.jsonl", "events.jsonl", "outcome.json"
ENVIRONMENT, CHECKPOINTS, LATEST, LOCK = "environment.json", "checkpoints", "latest", ".lock"
KEYS = "keys"
LOGS, HEARTBEATS = "logs", "heartbeats"
STUDENT_WEIGHTS, MANIFEST = "student.safetensors", "manifest.json"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in (run_dir / CHECKPOINTS).glob(f"step-*/{MANIFEST}"))


def find_checkpoint(run_dir: Path, step: int | None = None) -> Path:
    """The checkpoint of a step, or the newest.

    Raises:
        DataError: the run has none, or not that one; `where` names the run.
    """
    available = list_checkpoints(run_dir)
    if not available:
        raise DataError(
            "no complete checkpoint in this run",
            where=run_dir,
            fix="let the run reach `train.checkpoint_every`, or start it again with `frepa pretrain`",
        )
    if step is None:
        return available[-1]
    wanted = run_dir / CHECKPOINTS / checkpoint_name(step)
    if wanted not in available:
        names = ", ".join(str(int(path.name.removeprefix("step-"))) for path in available)
        raise DataError(f"no checkpoint of step {step}", where=run_dir, allowed=f"steps {names}")
    return wanted


def check_unused(run_dir: Path) -> None:
    """Make sure that no run lies in a folder.

    Raises:
        ConfigError: one does.
    """
    if (run_dir / CONFIG).exists() or (run_dir / CHECKPOINTS).exists():
        raise ConfigError(
            "this folder holds a run already",
            where=run_dir,
            fix=f"`frepa resume {run_dir}`, or another output",
        )


def check_run_folder(run_dir: Path) -> None:
    """Make sure that a folder is a run's.

    Raises:
        DataError: it is not.
    """
    if not (run_dir / CONFIG).is_file():
        raise DataError(
            "not a run folder: it has no config.yaml", where=run_dir, fix="name the `output` of a run"
        )


def load_run_config(run_dir: Path) -> RunConfig:
    """The resolved configuration of a run; it imports torch.

    Raises:
        DataError: the folder is no run.
    """
    from frepa_dist.config import RunConfig

    check_run_folder(run_dir)
    return load_settings(RunConfig, run_dir / CONFIG)


def load_student(run_dir: Path, step: int | None = None) -> tuple[nn.Module, RunConfig, int]:
    """The student with the weights of a checkpoint (fp32, CPU, eval mode), its config and step.

    It is a `frepa_dist.methods.base.Student`.

    Raises:
        DataError: no such run or checkpoint, or its weights do not fit the config.
    """
    from safetensors.torch import load_file

    from frepa_dist.methods.registry import METHODS

    config = load_run_config(run_dir)
    folder = find_checkpoint(run_dir, step)
    model = METHODS[config.method.name].create_student(config.method)
    try:
        model.load_state_dict(load_file(folder / STUDENT_WEIGHTS))
    except Exception as error:  # safetensors raises its own error class, torch a RuntimeError
        raise DataError(f"cannot be loaded: {error}", where=folder / STUDENT_WEIGHTS) from error
    return model.eval(), config, int(folder.name.removeprefix("step-"))


def build_student(config: RunConfig) -> nn.Module:
    """The student as training starts it, with the same weights (fp32, CPU, eval mode).

    Raises:
        DataError: the weights that `init` names are missing or do not fit.
    """
    import torch

    from frepa_dist.methods.registry import create_method

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return create_method(config.method).submodules()["student"].build().eval()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; lines torn by a crash are left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The logged steps of a run, in order."""
    return read_json_lines(run_dir / METRICS)
