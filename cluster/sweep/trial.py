"""A trial: the same trainer under the same supervision as `frepa pretrain`, as an actor that Ray Tune drives.

A report is the metric at one scheduled checkpoint. Training does not wait for it. What was measured is kept
in the run folder, so that a trial that is started again, by itself or with the whole sweep, reports what it
had reported, and goes on from its newest checkpoint. Each start is a fresh group of processes: an engine
cannot serve another trial.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
from ray import tune

from cluster.launch import free_port
from cluster.sweep.config import ResourcesConfig, SweepConfig
from cluster.sweep.layout import Layout, load_sweep
from cluster.sweep.leash import Leashed
from cluster.sweep.measure import measure
from cluster.sweep.points import check_holds, report_steps, resolve, trial_config
from frepa_dist.journal import append_event, append_line, read_outcome
from frepa_dist.runs import CONFIG, EVENTS, LOCK, MANIFEST, list_checkpoints, read_json_lines
from shards.stores.atomic import replace_text
from shards.stores.store import lock_folder
from shards.support.errors import ConfigError, EnvironmentFault, FrepaError
from shards.support.settings import dump_yaml, read_config

# keys of a trial's settings that are no settings of the run
SWEEP_KEY, NAME_KEY, PARENT_KEY = "sweep", "name", "parent"
POINTER = "pointer.json"
POLL_SECONDS = 0.2
# ranks of an earlier start may still be saving: that ends by itself (`frepa_dist.train.ORPHAN_SECONDS`)
RELEASE_SECONDS = 660.0


def split_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What Ray gives a trial: settings of the run, and what the sweep says about it."""
    about = {key: config[key] for key in (SWEEP_KEY, NAME_KEY, PARENT_KEY) if key in config}
    return {key: value for key, value in config.items() if key not in about}, about


class FurtherNode:
    """The supervisor of a node of a trial that is not its first."""

    def __init__(self) -> None:
        self._command: Leashed | None = None

    def start(self, arguments: list[str], log: str, environment: dict[str, str]) -> None:
        """Start `frepa` on a leash that this actor holds."""
        self._command = Leashed(arguments, Path(log), **environment)

    def end(self) -> None:
        """End it at once."""
        if self._command is not None:
            self._command.end()


class Trial(tune.Trainable):  # type: ignore[misc]
    """See the module's text; Ray calls all methods."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """A bundle for each node; this actor is in the first."""
        resources = load_sweep(Path(config[SWEEP_KEY])).resources
        return tune.PlacementGroupFactory(resources.bundles(), strategy="SPREAD")

    def setup(self, config: dict[str, Any]) -> None:
        """Make ready; nothing is started before a report is wanted that is not there."""
        self._values, about = split_settings(config)
        self._sweep: SweepConfig = load_sweep(Path(about[SWEEP_KEY]))
        self._layout = Layout(Path(about[SWEEP_KEY]))
        self._name = str(about.get(NAME_KEY) or self.trial_id)
        self._parent: str | None = about.get(PARENT_KEY)
        self._run = self._layout.run(self._name)
        self._config = trial_config(resolve(self._sweep, self._values, self._run))
        self._run.mkdir(parents=True, exist_ok=True)
        self._command: Leashed | None = None
        self._others: list[Any] = []
        self._steps: list[int] = []

    def step(self) -> dict[str, Any]:
        """Wait for the next scheduled checkpoint, and report what it is worth."""
        try:
            number = self.iteration
            report = self._find_report(number) or self._make_report(number)
            return {**report, "done": report["last"]}
        except Exception as error:
            shown = str(error) if isinstance(error, FrepaError) else f"{type(error).__name__}: {error}"
            append_event(self._run, "trial_failed", cause=shown)  # the driver tells it
            raise

    def _find_report(self, number: int) -> dict[str, Any] | None:
        reports = {entry["report"]: entry for entry in read_json_lines(self._layout.reports(self._name))}
        return reports.get(number + 1)

    def _make_report(self, number: int) -> dict[str, Any]:
        if self._command is None and not self._is_done():
            self._start()
        step = self._wait_for_checkpoint(number)
        # what the trainer resolved, not what it was told
        check_holds(read_config(self._run / CONFIG), self._values, where=self._run / CONFIG)
        value, details = measure(self._run, step, self._sweep.metric)
        if not math.isfinite(value):
            raise EnvironmentFault(f"the metric at step {step} is {value}", where=self._run)
        report = {
            "report": number + 1,
            "step": step,
            "value": value,
            "details": details,
            "name": self._name,
            "last": number == len(self._steps) - 1,
        }
        append_line(self._layout.reports(self._name), report)
        if self._sweep.scheduler.kind != "pbt":  # where others may go on from any of them
            prune(self._run, step, self._config.train.keep_checkpoints)
        return report

    def _is_done(self) -> bool:
        said = read_outcome(self._run)
        return said is not None and said["outcome"] == "done"

    def _start(self) -> None:
        """Start the trainer on all nodes, once nothing of an earlier start is left."""
        wait_until_free(self._run)
        replace_text(self._layout.config(self._name), dump_yaml(self._config.model_dump(mode="json")))
        resources = self._sweep.resources
        arguments = ["pretrain", "--or-resume", "--config", str(self._layout.config(self._name))]
        arguments += ["--num-ranks", str(resources.workers_per_node), "--num-nodes", str(resources.nodes)]
        if resources.nodes > 1:
            arguments += ["--master-addr", ray.util.get_node_ip_address()]
            arguments += ["--master-port", str(free_port()), "--node-rank"]
            self._others = start_further_nodes(arguments, self._layout, self._name, resources)
            arguments.append("0")
        self._command = Leashed(arguments, self._layout.log(self._name), **resources.environment)

    def _wait_for_checkpoint(self, number: int) -> int:
        """The step of a report, once its checkpoint is whole."""
        while True:
            status = None if self._command is None else self._command.poll()
            if not self._steps:
                self._steps = find_steps(self._run, self._config.train.checkpoint_every)
            if self._steps and (found := find_due(self._run, self._steps[number])) is not None:
                return found
            if status is not None or (self._command is None and self._is_done()):
                cause = describe_end(self._run, self._layout.log(self._name))
                raise EnvironmentFault(f"no checkpoint for report {number + 1}: {cause}", where=self._name)
            time.sleep(POLL_SECONDS)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Name the checkpoint that was reported last: it stays where it is, in the run folder."""
        report = self._find_report(self.iteration - 1)
        step = None if report is None else report["step"]
        pointer = {"name": self._name, "report": self.iteration, "step": step, "values": self._values}
        (Path(checkpoint_dir) / POINTER).write_text(json.dumps(pointer), encoding="utf-8")

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from a checkpoint that was named: this run's own, or, under PBT, its parent's.

        Raises:
            ConfigError: it is of neither: settings and checkpoint do not belong together (ray #28196).
        """
        pointer = json.loads((Path(str(checkpoint)) / POINTER).read_text(encoding="utf-8"))
        check_pairing(pointer, self._name, self._parent, self.iteration)
        if pointer["name"] != self._name and not (self._run / CONFIG).is_file():
            from frepa_dist.train.checkpoint.fork import fork_run

            parent = self._layout.run(pointer["name"])
            fork_run(parent, pointer["step"], self._run, self._config)

    def cleanup(self) -> None:
        """End all processes of the trial."""
        waiting = [other.end.remote() for other in self._others]
        if self._command is not None:
            self._command.end()
        if waiting:
            ray.wait(waiting, num_returns=len(waiting), timeout=60)


def start_further_nodes(
    arguments: list[str], layout: Layout, name: str, resources: ResourcesConfig
) -> list[Any]:
    """Start supervisors in the placement group's other bundles; arguments end with the option of the rank."""
    group = ray.util.get_current_placement_group()
    others = []
    for node in range(1, resources.nodes):
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=node
        )
        bundle = group.bundle_specs[node]
        remote = ray.remote(  # all of the bundle, so that Ray shows it the GPUs
            scheduling_strategy=strategy, num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0)
        )(FurtherNode)
        actor = remote.remote()
        log = str(layout.log(name, node))
        ray.get(actor.start.remote([*arguments, str(node)], log, resources.environment))
        others.append(actor)
    return others


def check_pairing(pointer: Mapping[str, Any], name: str, parent: str | None, reports: int) -> None:
    """Make sure that a checkpoint belongs to the settings a trial was given.

    Args:
        pointer: what the trial that saved it says of it.
        name: of the run that is to go on.
        parent: of the run that these settings were made from, None where they are a trial's first.
        reports: how many Ray believes were made.

    Raises:
        ConfigError: it does not.
    """
    if pointer["name"] not in (name, parent) or pointer["report"] != reports:
        raise ConfigError(
            f"the settings of {name} were made from {parent or 'no other run'} for report {reports}; the "
            f"checkpoint is of {pointer['name']}, report {pointer['report']}",
            where=name,
            fix="this is a fault of the sweep, not of its config: the trial is not trained on",
        )


def find_steps(run: Path, checkpoint_every: int) -> list[int]:
    """Steps of all reports, once the trainer has said how long the run is; empty before."""
    starts = [event for event in read_json_lines(run / EVENTS) if event["event"] == "start"]
    return report_steps(starts[-1]["total_steps"], checkpoint_every) if starts else []


def step_of(folder: Path) -> int:
    """The step that a checkpoint's name states."""
    return int(folder.name.removeprefix("step-"))


def find_due(run: Path, step: int) -> int | None:
    """The step of the checkpoint that was due after a step; None while it is not whole.

    Where steps were skipped then, the trainer has put it off: it is the first one after.
    """
    return next((found for found in map(step_of, list_checkpoints(run)) if found >= step), None)


def prune(run: Path, measured: int, keep: int) -> None:
    """Remove checkpoints up to the one that was measured, but for the newest of them."""
    for folder in [folder for folder in list_checkpoints(run) if step_of(folder) <= measured][:-keep]:
        (folder / MANIFEST).unlink(missing_ok=True)  # killed in between, it is no longer listed
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_free(run: Path) -> None:
    """Wait for supervisor and ranks of an earlier start, whose driver is gone, to have saved and ended.

    Raises:
        EnvironmentFault: they have not after minutes.
    """
    deadline = time.monotonic() + RELEASE_SECONDS
    while True:
        try:
            with ExitStack() as stack:
                for name in (".supervisor-0.lock", LOCK):
                    stack.enter_context(lock_folder(run, name=name))
            return
        except EnvironmentFault:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


def describe_end(run: Path, log: Path) -> str:
    """Why training has ended without a checkpoint that was due."""
    said = read_outcome(run) or {}
    if said.get("outcome") == "done":
        events = read_json_lines(run / EVENTS)
        failed = [event["error"] for event in events if event["event"] == "checkpoint_failed"]
        skipped = sum(event["event"] == "step_skipped" for event in events)
        return failed[-1] if failed else f"training is done, with {skipped} steps skipped; see {run / EVENTS}"
    if said.get("outcome") == "requeue":
        return "training was asked to stop"
    return str(said.get("error") or last_line(log) or f"see {log}")


def last_line(log: Path) -> str:
    """What was printed last."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
        lines = file.read().decode(errors="replace").splitlines()
    shown = [line for line in lines if line.strip()]
    errors = [line for line in shown if line.startswith("frepa: error: ")]
    return (errors or shown or [""])[-1].removeprefix("frepa: error: ")[:500]
