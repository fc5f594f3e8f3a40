"""`frepa launch render`: the files that start this system on a cluster. Heavy imports are in the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cluster.options import FOLDER, set_option


@click.group("launch")
def launch_group() -> None:
    """Files that start this system on Slurm and Kubernetes."""


@launch_group.command("render")
@click.option(
    "--target",
    required=True,
    type=click.Choice(["slurm", "kubernetes", "kuberay", "docker"]),
    help="What starts the jobs.",
)
@click.option("--settings", type=FOLDER, help="YAML file of settings (cluster/render/settings.py).")
@click.option("--config", help="Run config of the pretraining: a file, or the name of a shipped one.")
@click.option("--nodes", type=click.IntRange(min=1), help="Machines; default: 2.")
@click.option("--gpus-per-node", type=click.IntRange(min=0), help="GPUs of each; default: 4.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the files; they are overwritten.")
@set_option
def render(
    target: Any,
    settings: Path | None,
    config: str | None,
    nodes: int | None,
    gpus_per_node: int | None,
    out: Path,
    overrides: tuple[str, ...],
) -> None:
    """Write the files that start pretraining, builds, sweeps and evaluation on a cluster.

    \b
    frepa launch render --target slurm --config retmae/vit_b --nodes 4 --gpus-per-node 8 \\
        --set slurm.partition=gpu --set pretrain.overrides='[train.micro_batch_size=32]' --out jobs
    """
    from cluster.render.configs import check_run, find_sweep
    from cluster.render.files import ConfigFile, render_files
    from cluster.render.settings import LaunchConfig
    from shards.stores.atomic import writing_to
    from shards.support.settings import apply_overrides, merge, read_config, validate

    given: dict[str, Any] = {"nodes": nodes, "gpus_per_node": gpus_per_node}
    data = {key: value for key, value in given.items() if value is not None}
    if config is not None:
        data["pretrain"] = {"config": config}
    data = apply_overrides(merge(read_config(settings) if settings else {}, data), overrides)
    checked = validate(LaunchConfig, data, where=settings or "frepa launch render")
    trains = target in ("slurm", "kubernetes")
    pretrain = check_run(checked) if trains else ConfigFile(checked.pretrain.config)
    files = render_files(checked, target, pretrain, find_sweep(checked))
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (out / name).write_text(text, encoding="utf-8")
    for name in files:
        click.echo(out / name)
