"""Rendering: settings in, texts of files out. It reads templates and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2

from cluster.render.quoting import quote_argument, quote_command, quote_shell, quote_yaml
from cluster.render.settings import LaunchConfig
from shards.support.errors import ConfigError
from shards.support.settings import parse_yaml

Target = Literal["slurm", "kubernetes", "kuberay", "docker"]
TARGETS: tuple[Target, ...] = get_args(Target)

TEMPLATES = Path(__file__).parents[1] / "templates"
ATTACHED, CONFIG = "/etc/frepa", "config.yaml"
"""Folder and name of a config in a pod that does not see the file it was read from."""


@dataclass(frozen=True)
class ConfigFile:
    """A config that a job is started with.

    Attributes:
        name: as the command line takes it: of a shipped one, or a path that all nodes see.
        text: None of a shipped one; else what the file holds, for machines that do not see it.
    """

    name: str
    text: str | None = None


def render_files(
    config: LaunchConfig, target: Target, pretrain: ConfigFile, sweep: ConfigFile
) -> dict[str, str]:
    """Render what a target needs.

    Args:
        config: what runs where.
        target: one of `TARGETS`.
        pretrain: the config of the run.
        sweep: the config of the sweep.

    Returns:
        The text of each file, by name.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 (neither HTML nor XML: every value names its own quoting)
    )
    filters = {"sh": quote_shell, "command": quote_command, "yaml": quote_yaml, "arg": quote_argument}
    environment.filters |= filters
    in_pods = target in ("kubernetes", "kuberay")
    configs = {"pretrain": pretrain, "sweep": sweep}
    attached = {job: attached_files(file) if in_pods else {} for job, file in configs.items()}
    names = {job: f"{ATTACHED}/{CONFIG}" if attached[job] else file.name for job, file in configs.items()}
    values: dict[str, Any] = {
        "c": config,
        "attached": attached,
        "pretrain": pretrain_arguments(config, names["pretrain"], metrics_settings(config, in_pods)),
        "shards": shards_arguments(config),
        "sweep": sweep_arguments(config, names["sweep"]),
        "evaluate": evaluate_commands(config),
        "ray_version": version("ray"),
    }
    templates = sorted(path.name for path in (TEMPLATES / target).glob("[!_]*.j2"))
    return {
        name.removesuffix(".j2"): environment.get_template(f"{target}/{name}").render(values).rstrip() + "\n"
        for name in templates
    }


def attached_files(file: ConfigFile) -> dict[str, str]:
    """What a ConfigMap has to bring into the pods: nothing of a shipped config."""
    return {} if file.text is None else {CONFIG: file.text}


def pretrain_arguments(config: LaunchConfig, name: str, settings: Sequence[str] = ()) -> list[str]:
    """Arguments of `frepa` that train, with the run config of a name and more settings."""
    job = config.pretrain
    places = _settings({"output": config.place(job.output), "data.root": config.place(config.data_root)})
    return [
        *("pretrain", "--or-resume"),
        *("--config", name),
        *("--num-ranks", str(config.ranks)),
        *("--stop-seconds", str(config.stop_seconds)),
        *("--hang-seconds", str(job.hang_seconds)),
        *("--max-restarts", str(job.max_restarts)),
        *_sets([*places, *settings, *job.overrides]),
    ]


def metrics_settings(config: LaunchConfig, in_pods: bool) -> list[str]:
    """Where ranks serve metrics: on a pod's own address, on Slurm's nodes only where one is named."""
    address = "0.0.0.0" if in_pods else config.slurm.metrics_address  # noqa: S104 (the pod's network)
    if config.metrics_targets is None or address is None:
        return []
    # port 0: any that is free, so that jobs which share a node do not meet
    where = {"address": address, "targets": config.place(config.metrics_targets)}
    return ["train.metrics.port=0", *_settings({f"train.metrics.{key}": text for key, text in where.items()})]


def shards_arguments(config: LaunchConfig) -> list[str]:
    """Arguments of `frepa` that build, all but where it runs."""
    job = config.shards
    places = [config.place(place) for place in (*job.sources, config.data_root)]
    state = ("--state", config.place(job.state))
    return ["shards", "build", *places, "--config", job.config, *state, *_sets(job.overrides)]


def sweep_arguments(config: LaunchConfig, name: str) -> list[str]:
    """Arguments of `frepa` that search, all but the Ray cluster's address."""
    job = config.sweep
    places = _settings({"output": config.place(job.output), "set.data.root": config.place(config.data_root)})
    return ["sweep", name, "--or-resume", *_sets([*places, *job.overrides])]


def evaluate_commands(config: LaunchConfig) -> list[list[str]]:
    """Arguments of `frepa`, one after the other, that make of a run what is handed on."""
    job, run = config.evaluate, config.place(config.pretrain.output)
    probe = f"{run}/probe.json"
    return [
        ["evaluate", "probe", run, config.place(job.labelled), "--out", probe, *job.probe_arguments],
        ["export", run, config.place(job.encoder)],
        ["report", run, "--probe", probe],
    ]


def _settings(texts: Mapping[str, str]) -> list[str]:
    """Texts as `key=value` for --set, which reads a value as YAML."""
    return [f"{key}={text if _is_plain(text) else quote_yaml(text)}" for key, text in texts.items()]


def _is_plain(text: str) -> bool:
    try:
        return bool(parse_yaml(text) == text)
    except ConfigError:
        return False


def _sets(overrides: Iterable[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]
