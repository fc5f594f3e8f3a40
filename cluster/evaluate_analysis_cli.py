"""`frepa evaluate layer-cka`, `high-pass`, ...: analyses of encoders. Heavy imports inside the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from cluster.evaluate_cli import page_option, publish, write_page, write_result
from cluster.evaluate_probe_cli import pop_task, set_options, transfer_options
from cluster.leakage_cli import leakage_options
from cluster.options import FOLDER, F


def images_options(num: int, words: str) -> Callable[[F], F]:
    """Add --num, --modality, --out, --page and --seed."""

    def add(function: F) -> F:
        for option in (
            click.option("--seed", default=0, show_default=True, help=words),
            page_option,
            click.option("--out", type=FOLDER, help="JSON file for the result."),
            click.option("--modality", help="What image files are; of a dataset, the only one to use."),
            click.option("--num", default=num, show_default=True, help="Most images of a modality to use."),
        ):
            function = option(function)
        return function

    return add


@click.command("layer-cka")
@click.argument("encoder")
@click.argument("images")
@click.option("--other", metavar="ENCODER", help="A second encoder to compare with; default: the first.")
@click.option("--edges", default="4,8,16,32", show_default=True, help="Of the bands, cycles per image side.")
@images_options(256, "Which images.")
def evaluate_layer_cka(
    encoder: str,
    images: str,
    other: str | None,
    edges: str,
    num: int,
    modality: str | None,
    out: Path | None,
    page: Path | None,
    seed: int,
) -> None:
    """CKA of all pairs of layers, of one encoder or two, and of layers with bands of frequencies.

    IMAGES is a folder of images or a dataset of shards.
    """
    from frepa_dist.evaluate.layer_cka import LayerCkaConfig, run_layer_cka
    from shards.support.settings import validate

    config = {"num": num, "seed": seed, "edges": _numbers(edges, "--edges")}
    result = run_layer_cka(
        encoder,
        images,
        other=other,
        config=validate(LayerCkaConfig, config, where="frepa evaluate layer-cka"),
        modality=modality,
    )
    publish(result, out, page, lambda shown: analysis_pages().add_layer_cka(shown, result))


@click.command("high-pass")
@click.argument("encoders", nargs=-1, required=True)
@click.argument("images")
@set_options
@transfer_options
@click.option(
    "--cutoffs", default="0,5,10,20,30,40,50", show_default=True, help="d0 in cycles per image side; 0: raw."
)
@click.option("--out", type=FOLDER, help="JSON file for the results, a list.")
@page_option
@leakage_options
def evaluate_highpass(
    encoders: tuple[str, ...], cutoffs: str, out: Path | None, page: Path | None, **options: Any
) -> None:
    """A linear probe of raw images, tested on images that are high-passed more and more."""
    from frepa_dist.evaluate.highpass import run_highpass

    task, numbers = pop_task(options), _numbers(cutoffs, "--cutoffs")
    results = [run_highpass(encoder, task, cutoffs=numbers, **options) for encoder in encoders]
    write_result([result.as_json() for result in results], out)
    for result in results:
        click.echo(f"{result.encoder}\n{result.describe()}")
    if page is not None:
        write_page(page, lambda shown: analysis_pages().add_highpass(shown, results))


@click.command("histogram")
@click.argument("images")
@click.option("--size", default=512, show_default=True, help="Side of the views in pixels.")
@click.option("--ratio", default=0.625, show_default=True, help="Share of the tiles that is masked.")
@click.option("--bins", default=256, show_default=True, help="Of a histogram.")
@images_options(64, "Which images, and what is hidden of them.")
def evaluate_histogram(
    images: str,
    size: int,
    ratio: float,
    bins: int,
    num: int,
    modality: str | None,
    out: Path | None,
    page: Path | None,
    seed: int,
) -> None:
    """How far each corruption shifts the grey levels of images; no encoder is needed.

    IMAGES is a folder of images or a dataset of shards.
    """
    from frepa_dist.evaluate.histogram import HistogramConfig, run_histogram
    from shards.support.settings import validate

    config = {"num": num, "seed": seed, "image_size": size, "ratio": ratio, "bins": bins}
    gallery: list[Any] | None = [] if page else None
    result = run_histogram(
        images,
        config=validate(HistogramConfig, config, where="frepa evaluate histogram"),
        modality=modality,
        gallery=gallery,
    )
    publish(result, out, page, lambda shown: analysis_pages().add_histogram(shown, result, gallery))


@click.command("layer-spectra")
@click.argument("encoder")
@click.argument("images")
@images_options(64, "Which images.")
def evaluate_layer_spectra(
    encoder: str, images: str, num: int, modality: str | None, out: Path | None, page: Path | None, seed: int
) -> None:
    """Which frequencies each layer passes: the relative log-amplitude of its maps (Park and Kim 2022).

    IMAGES is a folder of images or a dataset of shards.
    """
    from frepa_dist.evaluate.layer_spectra import SpectraConfig, run_layer_spectra
    from shards.support.settings import validate

    config = validate(SpectraConfig, {"num": num, "seed": seed}, where="frepa evaluate layer-spectra")
    result = run_layer_spectra(encoder, images, config=config, modality=modality)
    publish(result, out, page, lambda shown: analysis_pages().add_layer_spectra(shown, result))


@click.command("token-pca")
@click.argument("encoder")
@click.argument("images")
@click.option("--layer", default="output", show_default=True, help="A name that layer-spectra lists.")
@click.option("--foreground", is_flag=True, help="Let the first component leave the background out.")
@images_options(12, "Which images.")
def evaluate_token_pca(
    encoder: str,
    images: str,
    layer: str,
    foreground: bool,
    num: int,
    modality: str | None,
    out: Path | None,
    page: Path | None,
    seed: int,
) -> None:
    """Tokens as colors: their first three principal components over a set of images; --page shows them.

    IMAGES is a folder of images or a dataset of shards.
    """
    from frepa_dist.evaluate.token_pca import TokenPcaConfig, run_token_pca
    from shards.support.settings import validate

    config = {"num": num, "seed": seed, "layer": layer, "foreground": foreground}
    gallery: list[Any] = []
    result = run_token_pca(
        encoder,
        images,
        config=validate(TokenPcaConfig, config, where="frepa evaluate token-pca"),
        modality=modality,
        gallery=gallery if page else None,
    )
    publish(result, out, page, lambda shown: analysis_pages().add_token_pca(shown, result, gallery))


def analysis_pages() -> ModuleType:
    """Pages of analyses; imported where a page is wanted, for they bring matplotlib."""
    from frepa_dist.evaluate import analysis_pages

    return analysis_pages


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{error}: numbers with commas between", param_hint=option) from error


ANALYSIS_COMMANDS = (
    evaluate_layer_cka,
    evaluate_highpass,
    evaluate_histogram,
    evaluate_layer_spectra,
    evaluate_token_pca,
)
