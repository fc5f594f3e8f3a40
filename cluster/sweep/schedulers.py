"""Ray Tune's searchers and schedulers, made of a sweep's config, and what they need to outlive their driver.

Ray saves what its searchers know, and nothing of its schedulers: after `Tuner.restore`, ASHA would compare
nobody with those that came before. Here it remembers by the journal: each report that is in it has its
decision, and its place in the rungs.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from cluster.sweep.config import SweepConfig
from cluster.sweep.distributions import Distribution
from cluster.sweep.journal import read_decisions
from cluster.sweep.layout import Layout
from cluster.sweep.points import draw_points
from cluster.sweep.trial import NAME_KEY, PARENT_KEY, SWEEP_KEY
from shards.support.errors import EnvironmentFault

VALUE = "value"
TIME = "training_iteration"  # Ray counts reports by this name


def to_domain(distribution: Distribution) -> Any:
    """Ray's form of a distribution."""
    if distribution.values:
        return tune.choice(list(distribution.values))
    if distribution.randint is not None:
        return tune.randint(*distribution.randint)
    if distribution.loguniform is not None:
        return tune.loguniform(*distribution.loguniform)
    assert distribution.uniform is not None
    return tune.uniform(*distribution.uniform)


def param_space(sweep: SweepConfig) -> dict[str, Any]:
    """What Ray is told of the space: flat, with the keys of `--set`, and where the sweep is."""
    space = {key: to_domain(distribution) for key, distribution in sweep.space.items()}
    space[SWEEP_KEY] = str(sweep.output)
    if sweep.search != "optuna":
        space[NAME_KEY] = tune.choice(point_names(sweep))  # comes with each point
    return space


def point_names(sweep: SweepConfig) -> list[str]:
    """Names of planned trials: their numbers."""
    return [f"{number:03d}" for number in range(sweep.num_planned)]


class PlannedPoints(BasicVariantGenerator):  # type: ignore[misc]
    """Gives the points that were drawn, under names that count them."""

    def __init__(self, sweep: SweepConfig) -> None:
        points = [
            {**point, NAME_KEY: name}
            for point, name in zip(draw_points(sweep), point_names(sweep), strict=True)
        ]
        super().__init__(points_to_evaluate=points, max_concurrent=sweep.max_concurrent or 0)
        self._uuid_prefix = "trial_"  # a lost trial comes back under its name, and finds its folder


def create_search(sweep: SweepConfig) -> SearchAlgorithm | Searcher:
    """Who says what is tried."""
    if sweep.search != "optuna":
        return PlannedPoints(sweep)
    try:
        import optuna
    except ImportError as error:
        raise EnvironmentFault(
            "Optuna is not installed", where="search", fix="pip install 'frepa[tune]'"
        ) from error
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # as many random trials as Optuna's default, but not all of a short sweep
    startup = min(10, max(2, sweep.num_trials // 3))
    search = OptunaSearch(
        metric=VALUE,
        mode=sweep.metric.direction,
        sampler=optuna.samplers.TPESampler(seed=sweep.seed, n_startup_trials=startup),
    )
    if sweep.max_concurrent is None:
        return search
    return ConcurrencyLimiter(search, max_concurrent=sweep.max_concurrent)


class RememberingAsha(ASHAScheduler):  # type: ignore[misc]
    """ASHA that knows after a restart what it had seen and decided, and decides once on a report.

    Args:
        journal: of the sweep.
        options: of Ray's scheduler.
    """

    def __init__(self, journal: Path, **options: Any) -> None:
        super().__init__(time_attr=TIME, **options)
        self._journal = journal
        self._decided: dict[tuple[str, int], str] | None = None

    def remember(self) -> dict[tuple[str, int], str]:
        """Read the journal once, and put what was reported into the rungs."""
        if self._decided is None:
            self._decided = {}
            for (trial, number), (value, stopped) in read_decisions(self._journal).items():
                self._decided[trial, number] = TrialScheduler.STOP if stopped else TrialScheduler.CONTINUE
                self._brackets[0].on_result(_Named(trial), number, self._metric_op * value)
        return self._decided

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """See Ray's."""
        decided = self.remember()
        key = trial.trial_id, result[TIME]
        if key not in decided:
            decided[key] = super().on_trial_result(controller, trial, result)
        return decided[key]

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """See Ray's."""
        self.remember()
        super().on_trial_complete(controller, trial, result)


class _Named:
    """All that a rung of ASHA wants to know of a trial."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


class Explorer:
    """PBT's second half: gives changed settings a name of their own, and says whose checkpoint they are for.

    Args:
        space: where values may lie: Ray multiplies them without a look at that.
    """

    def __init__(self, space: Mapping[str, Distribution]) -> None:
        self._space = dict(space)

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        """Complete settings that Ray has copied from a good trial, and changed."""
        clipped = {key: distribution.clip(config[key]) for key, distribution in self._space.items()}
        first = config[NAME_KEY].partition("-")[0]
        name = f"{first}-{uuid.UUID(int=random.getrandbits(128)).hex[:8]}"
        return {**config, **clipped, PARENT_KEY: config[NAME_KEY], NAME_KEY: name}


def create_scheduler(sweep: SweepConfig, num_reports: int) -> TrialScheduler:
    """Who says which trials go on.

    Args:
        sweep: the sweep.
        num_reports: how many a trial makes that comes to its end.
    """
    chosen = sweep.scheduler
    if chosen.kind == "asha":
        return RememberingAsha(
            Layout(sweep.output).journal,
            max_t=max(num_reports, chosen.grace_reports),
            grace_period=chosen.grace_reports,
            reduction_factor=chosen.reduction,
        )
    if chosen.kind == "pbt":
        changing = {key: d for key, d in sweep.space.items() if d.grid is None}
        return PopulationBasedTraining(
            time_attr=TIME,
            perturbation_interval=chosen.interval_reports,
            hyperparam_mutations={
                key: list(d.values) if d.values else to_domain(d) for key, d in changing.items()
            },
            quantile_fraction=chosen.quantile,
            resample_probability=chosen.resample,
            custom_explore_fn=Explorer(changing),
            log_config=False,
        )
    return FIFOScheduler()


def seed_everything(seed: int) -> None:
    """Seed what Ray draws from by itself: PBT's choices."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
