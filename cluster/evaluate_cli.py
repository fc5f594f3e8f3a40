"""`frepa evaluate ...`. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import click

from cluster.leakage_cli import leakage_options
from cluster.options import FOLDER, F

if TYPE_CHECKING:
    from shards.support.page import Page


class Result(Protocol):
    """What every evaluation gives."""

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""

    def describe(self) -> str:
        """A few lines for the terminal."""


def train_option(function: F) -> F:
    """Add `--train key=value`, repeatable."""
    words = "Setting of the training, such as epochs=40."
    return click.option("--train", "train", multiple=True, metavar="KEY=VALUE", help=words)(function)


def page_option(function: F) -> F:
    """Add `--page FILE`."""
    return click.option("--page", type=FOLDER, help="HTML file with figures and pictures.")(function)


@click.group("evaluate")
def evaluate_group() -> None:
    """Measure what an encoder has learned.

    ENCODER is a run folder, an exported folder, an official MAE checkpoint, timm:NAME,
    random:SIZE or random:BACKBONE (`frepa backbones` lists them).
    """


@evaluate_group.command("cka")
@click.argument("encoder")
@click.argument("images")
@click.option("--num", default=512, show_default=True, help="Most images of a modality to use.")
@click.option("--modality", help="What image files are; of a dataset, the only one to use.")
@click.option("--out", type=FOLDER, help="JSON file for the result.")
@click.option("--seed", default=0, show_default=True, help="Which images, and of the random tokens.")
def evaluate_cka(
    encoder: str, images: str, num: int, modality: str | None, out: Path | None, seed: int
) -> None:
    """CKA of the full image's features with those of its HF, LF and random tokens and of filtered images.

    IMAGES is a folder of images or a dataset of shards.
    """
    from frepa_dist.evaluate.cka import run_cka

    result = run_cka(encoder, images, num=num, seed=seed, modality=modality)
    publish(result, out)


@evaluate_group.command("reconstruct")
@click.argument("run", type=FOLDER)
@click.argument("images")
@click.option("--num", default=64, show_default=True, help="Most images of a modality to use.")
@click.option("--modality", help="What image files are; of a dataset, the only one to use.")
@click.option("--out", type=FOLDER, help="JSON file for the result.")
@page_option
@click.option("--seed", default=0, show_default=True, help="Which images, and what is hidden of them.")
def evaluate_reconstruct(
    run: Path, images: str, num: int, modality: str | None, out: Path | None, page: Path | None, seed: int
) -> None:
    """How well the student of RUN restores what is hidden, above all fine detail.

    IMAGES is a folder of images or a dataset of shards, best of images that RUN was not trained on. What is
    hidden: what the method itself hides, and two corruptions that are the same for all methods.
    """
    from frepa_dist.evaluate.reconstruct import run_reconstruct

    result = run_reconstruct(run, images, num=num, seed=seed, modality=modality)
    publish(result, out)
    if page is not None:
        from frepa_dist.evaluate.analysis_pages import add_reconstruct
        from frepa_dist.evaluate.reconstruct_pictures import draw_reconstructions

        rows = draw_reconstructions(run, images, num=num, seed=seed, modality=modality)
        write_page(page, lambda shown: add_reconstruct(shown, result, rows))


@evaluate_group.command("segment")
@click.argument("encoder")
@click.argument("images", type=FOLDER)
@click.option("--masks", type=FOLDER, required=True, help="CSV with filename,mask[,fov,mask2,split,patient].")
@click.option("--mask-column", default="mask", show_default=True, help="Column of the masks to find.")
@click.option("--fov-column", default="fov", show_default=True, help="Column of masks of what counts.")
@click.option("--second-column", default="mask2", show_default=True, help="Column of another observer.")
@train_option
@click.option("--out", type=FOLDER, help="JSON file for the result.")
@page_option
@click.option(
    "--seed", default=0, show_default=True, help="Of the split, the tiles, the start and the bootstrap."
)
@leakage_options
def evaluate_segment(
    encoder: str,
    images: Path,
    masks: Path,
    mask_column: str,
    fov_column: str,
    second_column: str,
    train: tuple[str, ...],
    out: Path | None,
    page: Path | None,
    seed: int,
    allow_leakage: bool,
    states: tuple[Path, ...],
) -> None:
    """Segmentation: a light decoder on the frozen encoder; Dice, clDice and more on whole images.

    Files are named relative to IMAGES. Pixels of a mask that are not 0 belong to it.
    """
    from frepa_dist.evaluate.dense import DenseTraining
    from frepa_dist.evaluate.pairs import Columns
    from frepa_dist.evaluate.segment import run_segment
    from shards.support.settings import apply_overrides, validate

    gallery: list[Any] | None = [] if page else None
    result = run_segment(
        encoder,
        images,
        masks,
        columns=Columns(mask=mask_column, where=fov_column, second=second_column),
        training=validate(DenseTraining, apply_overrides({"seed": seed}, train), where="--train"),
        gallery=gallery,
        allow_leakage=allow_leakage,
        states=states,
    )
    publish(result, out, page, lambda shown: dense_pages().add_segment(shown, result, gallery))


def dense_pages() -> ModuleType:
    """Pages of dense tasks; imported where a page is wanted, for they bring matplotlib."""
    from frepa_dist.evaluate import dense_pages

    return dense_pages


def publish(
    result: Result, out: Path | None, page: Path | None = None, add: Callable[[Page], None] | None = None
) -> None:
    """Print a result; write it as JSON, and the page that `add` fills, each where a file is named."""
    write_result(result.as_json(), out)
    click.echo(result.describe())
    if page is not None and add is not None:
        write_page(page, add)


def write_result(result: dict[str, Any] | list[dict[str, Any]], out: Path | None) -> None:
    """Write a result as JSON where a file is named."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def write_page(path: Path, add: Callable[[Page], None]) -> None:
    """Write a page that one result fills; its title is the command."""
    from shards.support.page import Page

    shown = Page(click.get_current_context().command_path)
    add(shown)
    shown.write(path)
    click.echo(f"page    {path}")
