"""From a sweep to the configs of its trials: pure, so that what is wrong is found before it starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.sweep.config import SweepConfig
from shards.read.draws import sample_rng
from shards.support.errors import ConfigError
from shards.support.settings import merge, read_config, validate

if TYPE_CHECKING:
    from frepa_dist.config import RunConfig

Values = dict[str, Any]
"""Dotted key -> value."""

# the sweep decides these for every trial, or counts on their being equal
OWNED = (
    "output",
    "train.steps",
    "train.epochs",
    "train.checkpoint_every",
    "train.checkpoint_copy",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.keep_best",
    "train.metrics_port",
)
# what an error of reconstruction depends on beside the encoder's worth
DECIDES_RECONSTRUCTION = (
    "method.name",
    "method.norm_pix_loss",
    "method.target_low_pass_cycles",
    "method.model.image_size",
    "method.model.patch_size",
)
SEED = "train.seed"
BASE = "base.yaml"
"""The run config as it was when the sweep began, in its folder: trials of tomorrow get the same."""


def expand(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of settings from dotted keys; groups may also be given as such."""
    result: dict[str, Any] = {}
    for key, value in dotted.items():
        nested: Any = expand(value) if isinstance(value, Mapping) else value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        result = merge(result, nested)
    return result


def lookup(settings: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key.

    Raises:
        KeyError: there is none.
    """
    node: Any = settings
    for part in key.split("."):
        if not isinstance(node, Mapping):
            raise KeyError(key)
        node = node[part]
    return node


def resolve(sweep: SweepConfig, values: Mapping[str, Any], output: Path) -> RunConfig:
    """The run config of a trial, as a user would write it.

    Raises:
        ConfigError: a key is unknown, or a value not allowed, or it does not arrive where it should.
    """
    from frepa_dist.config import RunConfig

    kept = sweep.output / BASE
    base = read_config(kept if kept.is_file() else sweep.base)
    data = merge(merge(base, expand(sweep.set)), expand(values))
    data["output"] = str(output)
    told = ", ".join(f"{key}={value}" for key, value in values.items())
    config = validate(RunConfig, data, where=f"{sweep.base} with {told}")
    check_holds(config.model_dump(mode="json"), values, where=sweep.base)
    return config


def trial_config(config: RunConfig) -> RunConfig:
    """The same with what makes it a trial: every report's checkpoint stays until it has been measured."""
    train = config.train.model_copy(
        update={
            "keep_every": config.train.checkpoint_every,
            "keep_best": None,
            "checkpoint_copy": None,
            "metrics_port": None,
        }
    )
    return config.model_copy(update={"train": train})


def check_holds(settings: Mapping[str, Any], values: Mapping[str, Any], where: object) -> None:
    """Make sure that resolved settings have the values that were sampled: else all trials would be alike.

    Raises:
        ConfigError: one does not.
    """
    wrong = []
    for key, value in values.items():
        try:
            found = lookup(settings, key)
        except KeyError:
            found = "nothing"
        if found != (list(value) if isinstance(value, tuple) else value):
            wrong.append(f"{key} is {found}, {value} was sampled")
    if wrong:
        raise ConfigError(
            f"sampled values do not reach the trainer: {'; '.join(wrong)}",
            where=where,
            fix="name keys of the run config, with values as it would show them",
        )


def draw_points(sweep: SweepConfig) -> list[Values]:
    """The settings of all trials of a search that plans them beforehand.

    Every value depends on the seed, the number of the draw and its key alone: more trials extend fewer.
    """
    grids = {key: d.grid for key, d in sweep.space.items() if d.grid is not None}
    points = []
    for number in range(sweep.num_trials):
        drawn = {
            key: distribution.draw(sample_rng(sweep.seed, 0, number, f"sweep, {key}").random())
            for key, distribution in sweep.space.items()
            if key not in grids
        }
        for crossed in itertools.product(*grids.values()):
            chosen = drawn | dict(zip(grids, crossed, strict=True))
            points.append({key: chosen[key] for key in sweep.space})
    return points


def extreme_points(sweep: SweepConfig) -> Iterator[Values]:
    """Points between which all others lie: each key at each of its ends, the others at their first."""
    first = {key: distribution.ends()[0] for key, distribution in sweep.space.items()}
    yield first
    yield {key: distribution.ends()[-1] for key, distribution in sweep.space.items()}
    for key, distribution in sweep.space.items():
        for end in distribution.ends()[1:]:
            yield first | {key: end}


def check_sweep(sweep: SweepConfig) -> RunConfig:
    """Find what would fail hours later: unknown keys, values out of bounds, what cannot be compared.

    Returns:
        The run config of a point of the space.

    Raises:
        ConfigError: naming the key.
    """
    for key in sweep.space:
        if key in OWNED:
            raise ConfigError(
                "the sweep decides it for all trials", where=f"space, {key}", fix="leave it out"
            )
        if sweep.metric.reconstructs and key in DECIDES_RECONSTRUCTION:
            raise ConfigError(
                f"the metric '{sweep.metric.kind}' of trials that differ in it cannot be compared",
                where=f"space, {key}",
                fix="take the metric `probe`, or a sweep for each value",
            )
        if sweep.scheduler.kind == "pbt" and sweep.space[key].grid is None and not can_fork(key):
            raise ConfigError(
                "a run cannot go on with another value of it, as scheduler 'pbt' would have it do",
                where=f"space, {key}",
                allowed="weights of losses, learning rates and the like; or kind `grid`",
            )
    planned = [] if sweep.search == "optuna" else draw_points(sweep)
    configs = [resolve(sweep, values, sweep.output) for values in (*extreme_points(sweep), *planned)]
    for config in configs:
        if sweep.metric.kind == "hf_recall" and getattr(config.method, "norm_pix_loss", False):
            raise ConfigError(
                "patches that are predicted normalized are drawn with the true spread, which tells the ranks",
                where="metric, hf_recall",
                fix="set method.norm_pix_loss=false, or take the metric `high_band`",
            )
        world, train = sweep.resources.workers, config.train
        if train.global_batch_size % (world * train.micro_batch_size):
            raise ConfigError(
                f"{train.global_batch_size} samples are not {world} workers x {train.micro_batch_size} x a "
                "whole number",
                where="train.global_batch_size",
                fix="correct it, train.micro_batch_size or resources.workers",
            )
    return configs[0]


def can_fork(key: str) -> bool:
    """Whether a run can go on from a checkpoint with another value of a key."""
    from frepa_dist.train.checkpoint.fork import is_forkable

    return is_forkable(key)


def report_steps(total_steps: int, checkpoint_every: int) -> list[int]:
    """Steps whose checkpoints are measured: every scheduled one, and the last."""
    return [*range(checkpoint_every, total_steps, checkpoint_every), total_steps]
