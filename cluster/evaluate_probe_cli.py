"""`frepa evaluate probe`, and what builds on probes. Heavy imports happen inside the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cluster.evaluate_cli import publish, write_result
from cluster.leakage_cli import leakage_options
from cluster.options import FOLDER

if TYPE_CHECKING:
    from frepa_dist.evaluate.extract import Extraction
    from frepa_dist.evaluate.task import ProbeTask

F = TypeVar("F", bound=Callable[..., Any])
FROZEN = click.Choice(["logistic", "linear", "knn"])
HEADS = click.Choice([*FROZEN.choices, "finetune"])


def _compose(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order of the help text."""

    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


set_options = _compose(
    click.option(
        "--labels", type=FOLDER, help="CSV with filename,label[,split,patient]; default: a folder per class."
    ),
    click.option(
        "--label-column", default="label", show_default=True, help="Column, or label of a dataset, to tell."
    ),
    click.option("--classes", help="The only ones to use, such as N,D; default: all."),
    click.option("--modality", help="Of a dataset, the only one to use; of files, what they are."),
    click.option("--seed", default=0, show_default=True, help="Of split, folds, training and bootstrap."),
    click.option("--resamples", "num_resamples", default=1000, show_default=True, help="Of the bootstrap."),
)
labeled_options = _compose(
    set_options,
    click.option("--grades", "are_grades", is_flag=True, help="Classes are ordered numbers: kappa, too."),
    click.option("--smoke-test", is_flag=True, help="The labels are not medical: the report will say so."),
)
transfer_options = _compose(
    click.option("--transfer", metavar="IMAGES", help="Judge on all of this set; learn from the first."),
    click.option("--transfer-labels", type=FOLDER, help="CSV of the set of --transfer."),
)
extraction_options = _compose(
    click.option("--cache", type=FOLDER, help="Folder of known features: none of them is computed again."),
    click.option("--cache-bytes", default=10 << 30, show_default=True, help="That may stay in the cache."),
    click.option("--num-ranks", default=1, show_default=True, help="Processes that compute features."),
    click.option("--batch-size", default=64, show_default=True, help="Images at a time."),
    click.option("--device", help="Such as cpu or cuda:1; default: a GPU if there is one."),
)
training_option = click.option(
    "--train", multiple=True, metavar="KEY=VALUE", help="Setting of a head trained by steps: epochs=20."
)


def permutations_option(name: str) -> Callable[[F], F]:
    """Number of permutations, as the argument `name`."""
    return click.option(
        "--permutations", name, default=2000, show_default=True, help="Of each permutation test."
    )


out_option = click.option("--out", type=FOLDER, help="JSON file for the result.")


@click.command("probe")
@click.argument("encoder")
@click.argument("images")
@labeled_options
@transfer_options
@click.option("--head", type=HEADS, default="logistic", show_default=True, help="What stands on the encoder.")
@training_option
@extraction_options
@leakage_options
@out_option
def evaluate_probe(encoder: str, out: Path | None, **options: Any) -> None:
    """Tell the classes of labeled images: AUROC and more, with bootstrap intervals.

    IMAGES is a folder of files, or a dataset of shards that was built with labels. The heads:

    \b
    logistic  logistic regression on frozen features, penalty by cross-validation (the papers' probe)
    linear    a linear layer on frozen, standardized features, by AdamW (as MAE's, without BatchNorm)
    knn       votes of nearest neighbors by the cosine, their number by cross-validation
    finetune  the encoder learns too: layer-wise decay, drop path, light augmentation
    """
    from frepa_dist.evaluate.probe import run_probe

    task, extraction = pop_task(options), pop_extraction(options)
    result = run_probe(encoder, task, extraction=extraction, **options)
    publish(result, out)


@click.command("label-curve")
@click.argument("encoder")
@click.argument("images")
@labeled_options
@transfer_options
@click.option("--head", type=FROZEN, default="logistic", show_default=True, help="See `probe`.")
@training_option
@click.option("--shares", default="1,5,10,100", show_default=True, help="Of the training part, in %.")
@click.option("--draws", "num_draws", default=5, show_default=True, help="Of each share.")
@extraction_options
@leakage_options
@click.option("--page", type=FOLDER, help="HTML page with the curve.")
@out_option
def evaluate_label_curve(
    encoder: str, out: Path | None, page: Path | None, shares: str, **options: Any
) -> None:
    """How well a probe does with few labels: 1, 5, 10 and 100 % of the training part, drawn by patient."""
    from frepa_dist.evaluate.label_curve import run_label_curve
    from frepa_dist.evaluate.label_page import write_curve

    task, extraction = pop_task(options), pop_extraction(options)
    result = run_label_curve(encoder, task, shares=parse_shares(shares), extraction=extraction, **options)
    write_result(result.as_json(), out)
    if page is not None:
        write_curve([result], page)
    click.echo(result.describe())


@click.command("tokens")
@click.argument("encoder")
@click.argument("images")
@labeled_options
@click.option("--keep", default=0.25, show_default=True, help="Share of the tokens in a subset.")
@click.option("--head", type=FROZEN, default="logistic", show_default=True, help="See `probe`.")
@permutations_option("num_permutations")
@training_option
@extraction_options
@leakage_options
@out_option
def evaluate_tokens(encoder: str, out: Path | None, **options: Any) -> None:
    """A probe that sees a quarter of the tokens: HF, random or LF ones, against all of them.

    Image files need --modality: it decides what high frequency is. LF in both readings: the lowest quarter
    kept, the highest removed.
    """
    from frepa_dist.evaluate.token_probe import run_token_probe

    task, extraction = pop_task(options), pop_extraction(options)
    result = run_token_probe(encoder, task, extraction=extraction, **options)
    publish(result, out)


@click.command("compare")
@click.argument("results", nargs=-1, required=True, type=FOLDER)
@click.option("--measure", type=click.Choice(["auroc", "auprc"]), default="auroc", show_default=True)
@permutations_option("num")
@click.option("--seed", default=0, show_default=True, help="Of the permutations.")
@out_option
def evaluate_compare(results: tuple[Path, ...], out: Path | None, **options: Any) -> None:
    """Paired tests between RESULTS of `frepa evaluate probe --out` on the same test images.

    DeLong's test of two classes where images are independent, else a permutation of patients; p values are
    corrected by Holm over all pairs.
    """
    from frepa_dist.evaluate.paired import run_compare

    result = run_compare(results, **options)
    publish(result, out)


@click.command("features")
@click.argument("encoder")
@click.argument("images")
@click.option("--modality", help="Of a dataset, the only one to use.")
@extraction_options
@click.option("--out", type=FOLDER, help="safetensors file for the features; their names are in its header.")
def evaluate_features(
    encoder: str, images: str, modality: str | None, out: Path | None, **options: Any
) -> None:
    """Compute features of all images of a folder or a dataset, and keep them in --cache or --out.

    Under a launcher (torchrun --no-python, srun) each rank computes its share; give them a common --cache.
    """
    from frepa_dist.evaluate.feature_files import run_features

    result = run_features(encoder, images, modality=modality, extraction=pop_extraction(options), out=out)
    click.echo(result.describe())


def pop_task(options: dict[str, Any]) -> ProbeTask:
    """Take the options that name images and labels out of others."""
    from frepa_dist.evaluate.task import ProbeTask
    from shards.support.settings import validate

    given = {name: options.pop(name) for name in ProbeTask.model_fields if name in options}
    if given["classes"] is not None:
        given["classes"] = [name.strip() for name in given["classes"].split(",") if name.strip()]
    return validate(ProbeTask, given, where="options")


def pop_extraction(options: dict[str, Any]) -> Extraction:
    """Take the options of `extraction_options` out of others."""
    from frepa_dist.evaluate.extract import Extraction
    from shards.support.settings import validate

    given = {name: options.pop(name) for name in Extraction.model_fields}
    return validate(Extraction, given, where="options")


def parse_shares(text: str) -> list[float]:
    """Percentages between commas, as shares.

    Raises:
        click.BadParameter: one is no number.
    """
    try:
        return [float(part) / 100 for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{error}; allowed: percentages such as 1,5,10,100") from error


PROBE_COMMANDS = (
    evaluate_probe,
    evaluate_label_curve,
    evaluate_tokens,
    evaluate_compare,
    evaluate_features,
)
