"""`frepa evaluate restore`, `detect`: dense tasks. Heavy imports happen inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.evaluate_cli import dense_pages, page_option, publish, train_option
from cluster.leakage_cli import leakage_options
from cluster.options import FOLDER

if TYPE_CHECKING:
    from frepa_dist.evaluate.degrade import TaskName
    from frepa_dist.evaluate.detect import Source


@click.command("restore")
@click.argument("encoder")
@click.argument("images", type=FOLDER)
@click.option(
    "--task", type=click.Choice(["denoise", "super-resolution"]), default="denoise", show_default=True
)
@click.option("--noise-sd", type=float, help="Of Gaussian noise, as a share of white; default: 25 / 255.")
@click.option("--photons", type=float, help="Add Poisson noise of so many photons at white.")
@click.option("--labels", type=FOLDER, help="CSV with filename[,split,patient]; default: all images.")
@train_option
@click.option("--out", type=FOLDER, help="JSON file for the result.")
@page_option
@click.option("--seed", default=0, show_default=True, help="Of the split, the noise, the tiles, the start.")
@leakage_options
def evaluate_restore(
    encoder: str,
    images: Path,
    task: TaskName,
    noise_sd: float | None,
    photons: float | None,
    labels: Path | None,
    train: tuple[str, ...],
    out: Path | None,
    page: Path | None,
    seed: int,
    allow_leakage: bool,
    states: tuple[Path, ...],
) -> None:
    """Restoration: a light decoder on the frozen encoder; PSNR, SSIM, RMSE beside the degraded image's own.

    The decoder sees nothing but the encoder's maps, unless --train skip=true gives it the degraded image.
    """
    from frepa_dist.evaluate.degrade import Degradation
    from frepa_dist.evaluate.restore import run_restore
    from frepa_dist.evaluate.restore_head import RestoreTraining
    from shards.support.settings import apply_overrides, validate

    given = {"noise_sd": noise_sd, "photons": photons}
    wanted = {"task": task, **{name: value for name, value in given.items() if value is not None}}
    gallery: list[Any] | None = [] if page else None
    result = run_restore(
        encoder,
        images,
        labels,
        degradation=validate(Degradation, wanted, where="frepa evaluate restore"),
        training=validate(RestoreTraining, apply_overrides({"seed": seed}, train), where="--train"),
        gallery=gallery,
        allow_leakage=allow_leakage,
        states=states,
    )
    publish(result, out, page, lambda shown: dense_pages().add_restore(shown, result, gallery))


@click.command("detect")
@click.argument("encoder")
@click.argument("images", type=FOLDER)
@click.option("--masks", type=FOLDER, required=True, help="CSV with filename,mask[,fov,split,patient].")
@click.option(
    "--source",
    type=click.Choice(["decoder", "tokens"]),
    default="decoder",
    show_default=True,
    help="A decoder that learns masks, or a linear probe that learns which images have a lesion.",
)
@click.option("--mask-column", default="mask", show_default=True, help="Column of the masks of lesions.")
@click.option("--fov-column", default="fov", show_default=True, help="Column of masks of what counts.")
@click.option("--skip-empty", is_flag=True, help="Leave rows without a mask out; else they have no lesion.")
@click.option(
    "--count", "count", multiple=True, metavar="KEY=VALUE", help="How lesions count, such as tolerance=5."
)
@train_option
@click.option("--out", type=FOLDER, help="JSON file for the result.")
@page_option
@click.option(
    "--seed", default=0, show_default=True, help="Of the split, the tiles, the start, the bootstrap."
)
@leakage_options
def evaluate_detect(
    encoder: str,
    images: Path,
    masks: Path,
    source: Source,
    mask_column: str,
    fov_column: str,
    skip_empty: bool,
    count: tuple[str, ...],
    train: tuple[str, ...],
    out: Path | None,
    page: Path | None,
    seed: int,
    allow_leakage: bool,
    states: tuple[Path, ...],
) -> None:
    """Lesions: the share found at 1/8 to 8 false positives per image (FROC), their IoU, where heat points.

    A lesion is a connected component of a mask. Files are named relative to IMAGES.
    """
    from frepa_dist.evaluate.dense import DenseTraining
    from frepa_dist.evaluate.detect import DetectSettings, run_detect
    from frepa_dist.evaluate.pairs import Columns
    from shards.support.settings import apply_overrides, validate

    gallery: list[Any] | None = [] if page else None
    result = run_detect(
        encoder,
        images,
        masks,
        columns=Columns(mask=mask_column, where=fov_column),
        settings=validate(DetectSettings, apply_overrides({"source": source}, count), where="--count"),
        training=validate(DenseTraining, apply_overrides({"seed": seed}, train), where="--train"),
        keep_empty=not skip_empty,
        gallery=gallery,
        allow_leakage=allow_leakage,
        states=states,
    )
    publish(result, out, page, lambda shown: dense_pages().add_detect(shown, result, gallery))


DENSE_COMMANDS = (evaluate_restore, evaluate_detect)
