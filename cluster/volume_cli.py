"""`frepa evaluate volume`. Heavy imports happen inside the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.leakage_cli import leakage_options
from cluster.options import FOLDER

if TYPE_CHECKING:
    from shards.read.windows import WindowName

WINDOWS = ("lung", "soft_tissue", "bone", "brain", "full")


@click.command("volume")
@click.argument("encoder")
@click.argument("dataset")
@click.option("--label-column", default="label", show_default=True, help="Label that the volumes have.")
@click.option(
    "--task",
    type=click.Choice(["classification"]),
    default="classification",
    show_default=True,
    help="Datasets hold no masks: a dense head is trained from Python (evaluate.volume_dense).",
)
@click.option("--modality", help="The only one to use.")
@click.option("--window", type=click.Choice(WINDOWS), help="Of CT; default: from air to hard bone.")
@click.option("--train-encoder", is_flag=True, help="Train the 2D encoder too.")
@click.option(
    "--head", "head", multiple=True, metavar="KEY=VALUE", help="Setting of the head, such as depth=4."
)
@click.option(
    "--train", "train", multiple=True, metavar="KEY=VALUE", help="Setting of the training, such as epochs=20."
)
@click.option(
    "--seed", default=0, show_default=True, help="Of the split, the start, the order, the bootstrap."
)
@click.option("--cache", type=FOLDER, help="Folder for the maps of a frozen encoder while this runs.")
@click.option("--out", type=FOLDER, help="JSON file for the result.")
@click.option("--smoke-test", is_flag=True, help="The labels are not medical: the report will say so.")
@leakage_options
def evaluate_volume(
    encoder: str,
    dataset: str,
    label_column: str,
    task: str,
    modality: str | None,
    window: WindowName | None,
    train_encoder: bool,
    head: tuple[str, ...],
    train: tuple[str, ...],
    seed: int,
    cache: Path | None,
    out: Path | None,
    smoke_test: bool,
    allow_leakage: bool,
    states: tuple[Path, ...],
) -> None:
    """Classify volumes: 2D encoder, attention between slices, and a head; beside it, each slice alone.

    DATASET is one of shards that were built from volumes, with a label for each.
    """
    from frepa_dist.evaluate.volume import run_volume
    from frepa_dist.evaluate.volume_training import VolumeTraining
    from frepa_dist.models.volume import VolumeSettings
    from shards.support.settings import apply_overrides, validate

    result = run_volume(
        encoder,
        dataset,
        label_column,
        modality=modality,
        window=window,
        train_encoder=train_encoder,
        settings=validate(VolumeSettings, apply_overrides({}, head), where="--head"),
        training=validate(VolumeTraining, apply_overrides({"seed": seed}, train), where="--train"),
        cache=cache,
        smoke_test=smoke_test,
        allow_leakage=allow_leakage,
        states=states,
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
    click.echo(result.describe())
