"""What a sweep is: a run config, keys of it that vary, how they are searched, and how trials are judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cluster.sweep.distributions import Distribution, flatten_space
from shards.support.errors import ConfigError
from shards.support.settings import Settings, apply_overrides, find_config, parse_yaml, validate
from shards.support.telemetry import MetricsConfig

MetricKind = Literal["probe", "knn", "high_band", "hf_recall"]
Mode = Literal["max", "min"]
MODES: dict[MetricKind, Mode] = {"probe": "max", "knn": "max", "high_band": "min", "hf_recall": "max"}
LOSSES_DO_NOT_COMPARE = (
    "a training loss says nothing between trials: with other weights, or more of an image hidden, it is "
    "another quantity, so the smallest is not the best encoder's"
)


class MetricConfig(Settings):
    """What trials are compared by, measured at each checkpoint on the same images; never a training loss.

    Attributes:
        kind: `probe`: AUROC of logistic regression on frozen features, and `knn`: of the nearest neighbors'
            votes, both cross-validated inside the training part of a labeled set, so that its test part is
            left for the winner; `high_band`: error of reconstructed detail; `hf_recall`: share of the hidden
            high-frequency tokens that the reconstruction has as such, too.
        mode: which values are better; it follows from the kind.
        images: folder of labeled images, or of images (a dataset of shards) to reconstruct.
        labels, label_column, classes: as of `frepa evaluate probe`.
        modality: of image files to reconstruct; of a dataset, the only one to use.
        num: most images; of a labeled set drawn class by class, None takes all; 64 to reconstruct.
        neighbors: of `knn`.
        mask_ratio: what share of the patches masked autoencoders have hidden from them when they reconstruct;
            one for all trials, whatever they train with.
        seed: of the choice of images, of the folds, and of what is hidden.
        device: where the encoder runs, such as `cpu`; None takes the trial's GPU if it has one.
    """

    kind: MetricKind
    mode: Mode | None = None
    images: str
    labels: Path | None = None
    label_column: str = "label"
    classes: tuple[str, ...] | None = None
    modality: str | None = None
    num: int | None = Field(None, ge=4)
    neighbors: int = Field(20, ge=1)
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    device: str | None = None

    @field_validator("kind", mode="before")
    @classmethod
    def _refuse_losses(cls, kind: Any) -> Any:
        if isinstance(kind, str) and kind not in MODES and ("loss" in kind or kind.startswith("mi")):
            raise ValueError(f"{LOSSES_DO_NOT_COMPARE}; allowed: {', '.join(MODES)}")
        return kind

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mode not in (None, MODES[self.kind]):
            raise ValueError(f"of '{self.kind}' the better values are the {MODES[self.kind]}imal ones")
        return self

    @property
    def direction(self) -> Mode:
        """Which values are better."""
        return MODES[self.kind]

    @property
    def reconstructs(self) -> bool:
        """Whether images are reconstructed; else they are embedded."""
        return self.kind in ("high_band", "hf_recall")


class ResourcesConfig(Settings):
    """What one trial is given.

    Attributes:
        workers: ranks, over all of its nodes.
        nodes: machines; each has a supervisor, and they need to share the folder of the sweep.
        cpus_per_worker, gpus_per_worker: fractions let trials share; of a GPU only where a node has one
            worker, since NCCL refuses two ranks on one GPU.
    """

    workers: int = Field(1, ge=1)
    nodes: int = Field(1, ge=1)
    cpus_per_worker: float = Field(1.0, ge=0)
    gpus_per_worker: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.workers % self.nodes:
            raise ValueError(f"{self.workers} workers do not divide among {self.nodes} nodes")
        if self.gpus_per_worker % 1 and (self.workers > self.nodes or self.gpus_per_worker > 1):
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g}: a part of a GPU is for one worker on a node, "
                "since NCCL refuses two ranks on one GPU"
            )
        if not self.cpus_per_worker and not self.gpus_per_worker:
            raise ValueError("a worker of no CPU and no GPU: all trials would start at once")
        return self

    @property
    def workers_per_node(self) -> int:
        """Ranks on each node."""
        return self.workers // self.nodes

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a trial's ranks: a thread for each whole core, since trials share a machine."""
        return {"OMP_NUM_THREADS": str(max(1, int(self.cpus_per_worker)))}

    def bundles(self) -> list[dict[str, float]]:
        """What Ray is asked to set aside, node by node."""
        per_node = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
        bundle = {name: amount * self.workers_per_node for name, amount in per_node.items() if amount}
        return [dict(bundle) for _ in range(self.nodes)]


class SchedulerConfig(Settings):
    """Who goes on at a report, that is, when a checkpoint has been measured.

    Attributes:
        kind: `none` lets all trials finish. `asha` (Li et al., MLSys 2020) ends those that are not among the
            best 1 / reduction of all that came as far, after `grace_reports`, and each `reduction` times as
            many. `pbt` (Jaderberg et al., 2017) gives the worst, every `interval_reports`, the checkpoint and
            the changed settings of one of the best.
        grace_reports, reduction: of ASHA.
        interval_reports, quantile, resample: of PBT: how often; which share gives and takes; how often a
            value is drawn anew instead of changed by a fifth.
    """

    kind: Literal["none", "asha", "pbt"] = "none"
    grace_reports: int = Field(1, ge=1)
    reduction: float = Field(3, gt=1)
    interval_reports: int = Field(1, ge=1)
    quantile: float = Field(0.25, gt=0, le=0.5)
    resample: float = Field(0.25, ge=0, le=1)


class SweepConfig(Settings):
    """A sweep.

    Attributes:
        base: run config that all trials start from: a file, or the name of a shipped one.
        set: what is different in all trials; dotted keys or groups of settings.
        space: dotted key of the run config -> distribution.
        metric: what trials are compared by.
        search: `random` and `grid` draw all trials beforehand; `optuna` lets the tree-structured Parzen
            estimator (TPE) learn from the trials that have ended.
        scheduler: who goes on.
        num_trials: draws; each is crossed with all values of the keys of kind `grid`, if there are any.
        max_concurrent: trials at a time; None: as many as there is room for.
        max_failures: how often a trial that failed is tried again.
        resources: of a trial.
        output: folder of the sweep.
        seed: of the draws.
        metrics: where the driver serves live metrics; trials do as `set.train.metrics` says.
    """

    base: str
    set: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Distribution] = Field(min_length=1)
    metric: MetricConfig
    search: Literal["random", "grid", "optuna"] = "random"
    scheduler: SchedulerConfig = SchedulerConfig()
    num_trials: int = Field(1, ge=1)
    max_concurrent: int | None = Field(None, ge=1)
    max_failures: int = Field(1, ge=0)
    resources: ResourcesConfig = ResourcesConfig()
    output: Path
    seed: int = Field(0, ge=0)
    metrics: MetricsConfig = MetricsConfig()

    @field_validator("space", mode="before")
    @classmethod
    def _flatten(cls, space: Any) -> Any:
        return flatten_space(space) if isinstance(space, Mapping) else space

    @model_validator(mode="after")
    def _check(self) -> Self:
        crossed = [key for key, distribution in self.space.items() if distribution.grid is not None]
        drawn = sorted(set(self.space) - set(crossed))
        if self.search == "grid" and (drawn or self.num_trials > 1):
            raise ValueError(
                f"search 'grid' tries every value of lists once, and {', '.join(drawn) or 'num_trials'} is "
                "not for it: take search 'random' to cross draws with lists"
            )
        if self.search == "optuna" and crossed:
            raise ValueError(f"search 'optuna' chooses values by itself: make {', '.join(crossed)} a choice")
        if self.scheduler.kind == "pbt":
            if self.search == "optuna":
                raise ValueError("scheduler 'pbt' changes settings by itself: take search 'random'")
            if not drawn:
                raise ValueError("scheduler 'pbt' has nothing to change: all keys are lists of kind 'grid'")
            if self.num_planned < 2:
                raise ValueError("scheduler 'pbt' needs a population: num_trials of 2 or more")
        return self

    @property
    def num_planned(self) -> int:
        """Trials in all."""
        lists = (len(d.grid) for d in self.space.values() if d.grid is not None)
        return self.num_trials * math.prod(lists)


def read_sweep(name: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep config; its `base` is a run config, found beside it or by name, and nothing it inherits.

    Args:
        name: a file, or the name of a shipped one.
        overrides: `dotted.key=value`.

    Raises:
        ConfigError: with every problem named.
    """
    path = find_config(name)
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), where=path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=path) from error
    if not isinstance(data, dict):
        raise ConfigError("a sweep config is a mapping of keys to values", where=path)
    data = apply_overrides(data, overrides)
    beside = path.parent / str(data.get("base"))
    if beside.is_file():
        data["base"] = str(beside.resolve())
    return validate(SweepConfig, data, where=name)
