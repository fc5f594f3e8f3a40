"""Run a sweep: check it, hand it to Ray Tune, and make tables of what comes back; or go on with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ray
from ray import tune

from cluster.sweep.around_ray import hearing_sigterm, keep_fitting, ray_variables
from cluster.sweep.config import SweepConfig
from cluster.sweep.exports import serve_sweep
from cluster.sweep.journal import read_journal
from cluster.sweep.layout import LOCK, RAY, SWEEP, TRIALS, Layout, load_sweep
from cluster.sweep.live import follow
from cluster.sweep.measure import check_metric
from cluster.sweep.points import BASE, check_sweep, report_steps
from cluster.sweep.recorder import Recorder, restore_state
from cluster.sweep.results import write_results
from cluster.sweep.schedulers import VALUE, create_scheduler, create_search, param_space, seed_everything
from cluster.sweep.table import count_states, find_best
from cluster.sweep.trial import Trial, wait_until_free
from shards.stores.atomic import replace_text, writing_to
from shards.stores.store import lock_folder
from shards.support.errors import REQUEUE_CODE, ConfigError, EnvironmentFault
from shards.support.settings import dump_yaml, read_config
from shards.workers.pool import available_cores
from shards.workers.ray_session import ray_session

METRICS = "metrics"  # where live metrics are served changes no trial


def run_sweep(
    sweep: SweepConfig,
    *,
    address: str | None = None,
    resume: bool = False,
    retry_failed: bool = False,
) -> int:
    """Run a sweep to its end; return 0, or 75 when it was asked to stop.

    Args:
        sweep: what to do.
        address: of a Ray cluster whose nodes all see the sweep's folder; None starts Ray on this machine.
        resume: go on with the sweep that is in the folder.
        retry_failed: when going on, try trials again that had failed for good.

    Raises:
        ConfigError: something in it would fail later, or the folder holds a sweep already.
        EnvironmentFault: trials failed; or another driver is at work there; or Ray is not to be had.
    """
    sweep = locate(sweep)
    root = sweep.output
    if not resume and (root / SWEEP).exists():
        raise ConfigError(
            "this folder holds a sweep already",
            where=root,
            fix=f"`frepa sweep --resume {root}` to go on with it, or another output",
        )
    first = check_sweep(sweep)
    check_metric(sweep.metric)
    steps = first.train.steps or count_epochs(first, sweep.resources.workers)
    num_reports = len(report_steps(steps, first.train.checkpoint_every))
    with lock_folder(root, name=LOCK), ray_variables(), serve_sweep(sweep) as publish:
        if not resume:
            with writing_to(root):
                (root / TRIALS).mkdir(exist_ok=True)
            replace_text(root / BASE, dump_yaml(read_config(sweep.base)))
            replace_text(root / SWEEP, dump_yaml(sweep.model_dump(mode="json", exclude_none=True)))
        seed_everything(sweep.seed)

        def fit(restored: bool) -> None:
            # inside, for a session of Ray takes SIGTERM for itself
            with ray_session(address, num_cpus=available_cores()), hearing_sigterm():
                check_room(sweep, is_local=address is None)
                create_tuner(sweep, num_reports, resume=restored, retry_failed=retry_failed).fit()

        with follow(sweep, num_reports, publish):
            keep_fitting(fit, lambda: count_reports(sweep), resume)
        wait_for_trials(Layout(root))
    return conclude(sweep)


def wait_for_trials(layout: Layout) -> None:
    """Wait for the processes of all trials to end: Ray does not, where it ends the last ones.

    Raises:
        EnvironmentFault: some have not after minutes.
    """
    for trial in read_journal(layout.journal):
        if layout.run(trial.name).is_dir():
            wait_until_free(layout.run(trial.name))


def count_reports(sweep: SweepConfig) -> int:
    """Reports of all trials so far."""
    return sum(len(trial.reports) for trial in read_journal(Layout(sweep.output).journal))


def locate(sweep: SweepConfig) -> SweepConfig:
    """The same with paths that mean the same from every folder."""
    base = Path(sweep.base)
    metric = sweep.metric
    update: dict[str, Any] = {}
    if Path(metric.images).exists():
        update["images"] = str(Path(metric.images).resolve())
    if metric.labels is not None:
        update["labels"] = metric.labels.resolve()
    data = sweep.set
    for key in ("data.root",):
        if isinstance(data.get(key), str) and Path(data[key]).exists():
            data = {**data, key: str(Path(data[key]).resolve())}
    metrics = sweep.metrics
    return sweep.model_copy(
        update={
            "metrics": metrics.model_copy(update={"targets": metrics.targets and metrics.targets.resolve()}),
            "base": str(base.resolve()) if base.is_file() else sweep.base,
            "metric": metric.model_copy(update=update),
            "output": sweep.output.resolve(),
            "set": data,
        }
    )


def count_epochs(config: Any, workers: int) -> int:
    """Optimizer steps of a run whose length is given in epochs."""
    from cluster.doctor import count_steps

    return count_steps(config, workers)[1]


def create_tuner(sweep: SweepConfig, num_reports: int, *, resume: bool, retry_failed: bool) -> tune.Tuner:
    """Ray's tuner, new or as it was.

    Raises:
        EnvironmentFault: there is a folder of Ray's, and nothing whole in it.
    """
    root = sweep.output
    if resume and restore_state(root):
        return tune.Tuner.restore(
            str(root / RAY), trainable=Trial, resume_unfinished=True, resume_errored=retry_failed
        )
    # killed before anything was saved, it begins anew: trials find what they had done in their folders
    return tune.Tuner(
        Trial,
        param_space=param_space(sweep),
        tune_config=tune.TuneConfig(
            metric=VALUE,
            mode=sweep.metric.direction,
            search_alg=create_search(sweep),
            scheduler=create_scheduler(sweep, num_reports),
            num_samples=sweep.num_planned,
            reuse_actors=False,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=RAY,
            storage_path=str(root),
            failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            callbacks=[Recorder(root)],
            verbose=0,
        ),
    )


def check_room(sweep: SweepConfig, *, is_local: bool) -> None:
    """Make sure that a trial can ever start: Ray would wait without a word.

    Raises:
        ConfigError: this machine has less than one trial asks for.
    """
    if not is_local:  # a cluster may grow
        return
    have = ray.cluster_resources()
    for name in ("CPU", "GPU"):
        wanted = sum(bundle.get(name, 0) for bundle in sweep.resources.bundles())
        if wanted > have.get(name, 0):
            raise ConfigError(
                f"a trial asks for {wanted:g} {name}s, this machine has {have.get(name, 0):g}",
                where="resources",
                fix="fewer workers, a fraction of a CPU for each, or a cluster (--address)",
            )


def conclude(sweep: SweepConfig) -> int:
    """Write and print the results; the exit code.

    Raises:
        EnvironmentFault: trials failed.
    """
    trials = read_journal(Layout(sweep.output).journal)
    text = write_results(sweep, trials)
    print(text, flush=True)
    states = count_states(trials, sweep.num_planned)
    if states["waiting"] or states["running"]:
        print(f"frepa: stopped; `frepa sweep --resume {sweep.output}` goes on", flush=True)
        return REQUEUE_CODE
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed:
        causes = "; ".join(f"{trial.name}: {trial.failures[-1]}" for trial in failed[:3])
        others = "" if find_best(sweep, trials) is None else "; the others are in the table"
        raise EnvironmentFault(
            f"{len(failed)} of {len(trials)} trials failed ({causes}){others}",
            where=sweep.output,
            fix=f"see their logs in {sweep.output / TRIALS}; "
            f"`frepa sweep --resume {sweep.output} --retry-failed` tries them again",
        )
    return 0


def same_sweep(sweep: SweepConfig) -> bool:
    """Whether the folder holds this sweep.

    Raises:
        ConfigError: it holds another one.
    """
    root = sweep.output
    if not (root / SWEEP).is_file():
        return False
    given, stored = (json.loads(s.model_dump_json()) for s in (locate(sweep), load_sweep(root)))
    differing = sorted(key for key in given if given[key] != stored[key] and key != METRICS)
    if differing:
        raise ConfigError(
            f"this folder holds another sweep: {', '.join(differing)} differ",
            where=root,
            fix=f"`frepa sweep --resume {root}` to go on with it as it was, or another output",
        )
    return True
