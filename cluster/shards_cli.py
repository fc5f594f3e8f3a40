"""`frepa shards ...`: build, look at, check, join and extend datasets; heavy imports are in the commands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from cluster.options import FOLDER, set_option
from shards.support.errors import ConfigError

JOBS = click.option(
    "--jobs", type=click.IntRange(min=1), default=None, help="Processes; default: one per core."
)


@click.group("shards")
def shards_group() -> None:
    """Build and look at datasets. A place is a folder or s3://bucket/prefix."""


@shards_group.command("build")
@click.argument("sources", nargs=-1, required=True)
@click.argument("dest")
@click.option("--config", help="Build config: a file, or the name of a shipped one (shards/ct, ...).")
@click.option("--modality", help="What the images are: fundus, ct, mri, ...")
@click.option("--size", type=int, help="Short side of a stored image in pixels; default: 512.")
@click.option("--source-name", "source", help="Name of this source in the dataset; default: images.")
@click.option("--labels", help="none, folder, or a CSV file; default: none.")
@click.option("--executor", type=click.Choice(["local", "ray"]), help="Where it runs; default: local.")
@JOBS
@click.option("--state", type=FOLDER, help="Private folder: salt, plan, names; default: DEST.state")
@click.option("--keep-names", is_flag=True, default=None, help="Store file names (which may name patients).")
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing to DEST.")
@click.option("--retry-quarantined", is_flag=True, default=None, help="Try again what was quarantined.")
@set_option
def build(
    sources: tuple[str, ...],
    dest: str,
    config: str | None,
    dry_run: bool,
    overrides: tuple[str, ...],
    **options: Any,
) -> None:
    """Build shards at DEST from folders, S3 buckets or listings, or extend the dataset that is there.

    SOURCES are folders, files, s3://bucket/prefix, or a .csv or .parquet listing with a column `uri` or
    `filename`. Interrupted, it goes on where it stopped when started again; of a source that has grown, it
    adds what is new. The same input gives the same bytes.
    """
    from shards.builder.build import BuildConfig, build_dataset, plan_build
    from shards.support.settings import apply_overrides, merge, read_config, validate

    given = {key: value for key, value in options.items() if value is not None}
    settings = merge(read_config(config) if config else {}, given)
    checked = validate(
        BuildConfig, apply_overrides(settings, overrides), where=config or "frepa shards build"
    )
    if dry_run:
        for line in plan_build(sources, dest, checked).lines():
            click.echo(line)
        return
    report = build_dataset(sources, dest, checked)
    for line in report.lines():
        click.echo(line)


@shards_group.command("verify")
@click.argument("dest")
@click.option("--deep", is_flag=True, help="Read every byte: checksums, pixels, HF tokens.")
@click.option("--snapshot", help="Hash of the snapshot; default: the current one.")
@JOBS
def verify(dest: str, deep: bool, snapshot: str | None, jobs: int | None) -> None:
    """Check the dataset at DEST against its snapshot; every problem is named. Exit code 3 if there is one."""
    from shards.audit.verify import verify_dataset

    report = verify_dataset(dest, deep=deep, snapshot=snapshot, jobs=jobs or 0)
    for line in report.lines():
        click.echo(line)
    report.check()


@shards_group.command("stats")
@click.argument("dest")
@click.option("--out", type=FOLDER, help="HTML page to write; default: DEST-stats.html.")
@click.option("--num", default=200, show_default=True, help="Images of a modality to look into.")
@click.option("--seed", default=0, show_default=True, help="Which images are drawn.")
@JOBS
def stats(dest: str, out: Path | None, num: int, seed: int, jobs: int | None) -> None:
    """Tell what the dataset at DEST holds: a table, and a page with plots and images with their HF tokens."""
    from shards.audit.stats import dataset_stats, write_stats_page
    from shards.stores.store import is_remote

    found = dataset_stats(dest, num=num, seed=seed, jobs=jobs or 0)
    for line in found.lines():
        click.echo(line)
    if out is None:  # beside a folder; of S3, here
        place = Path(dest.rstrip("/").rsplit("/", 1)[-1]) if is_remote(dest) else Path(dest).resolve()
        out = place.with_name(f"{place.name}-stats.html")
    write_stats_page(found, out)
    click.echo(f"page  {out}")


@shards_group.command("merge")
@click.argument("sources", nargs=-1, required=True)
@click.argument("dest")
@click.option("--rename", multiple=True, metavar="PLACE:MODALITY/OLD=NEW", help="A source's name in DEST.")
@JOBS
def merge_command(sources: tuple[str, ...], dest: str, rename: tuple[str, ...], jobs: int | None) -> None:
    """Join the datasets SOURCES into DEST, a new dataset or one that is there."""
    from shards.audit.merge import merge_datasets

    report = merge_datasets(sources, dest, rename=_parse_renames(rename), jobs=jobs or 0)
    for line in report.lines():
        click.echo(line)


def _parse_renames(texts: tuple[str, ...]) -> Mapping[str, str]:
    for text in texts:
        if "=" not in text:
            raise ConfigError(f"no new name in '{text}'", where="--rename", allowed="PLACE:MODALITY/OLD=NEW")
    return dict(text.rsplit("=", 1) for text in texts)


@shards_group.command("rehf")
@click.argument("dest")
@click.option("--modality", required=True, help="The modality whose HF tokens are computed anew.")
@click.option("--config", help="File with the parameters under `hf:`, as `frepa shards tune-hf` writes it.")
@JOBS
@set_option
def rehf(dest: str, modality: str, config: str | None, jobs: int | None, overrides: tuple[str, ...]) -> None:
    """Add another version of the HF tokens to the dataset at DEST; pixels are not rewritten.

    Parameters start from the modality's defaults: --set hf.cutoff_cycles=20
    """
    from shards.audit.rehf import rehf_dataset
    from shards.hf.modalities import find_modality
    from shards.hf.tokens import HFParams
    from shards.support.settings import apply_overrides, merge, read_config, validate

    where = config or "frepa shards rehf"
    start = {"modality": modality, "hf": find_modality(modality).hf.model_dump()}
    settings = apply_overrides(merge(start, read_config(config) if config else {}), overrides)
    if unknown := settings.keys() - start.keys():
        raise ConfigError(f"unknown key {', '.join(sorted(unknown))}", where=where, allowed="hf")
    if settings["modality"] != modality:
        raise ConfigError(f"these are parameters of {settings['modality']}, not {modality}", where=where)
    params = validate(HFParams, settings["hf"], where=where)
    report = rehf_dataset(dest, modality, params, jobs=jobs or 0)
    for line in report.lines():
        click.echo(line)


@shards_group.command("tune-hf")
@click.argument("images", nargs=-1, required=True, type=FOLDER)
@click.option(
    "--masks", multiple=True, type=FOLDER, help="CSV or folder, one per IMAGES; default: its labels.csv."
)
@click.option("--modality", required=True, help="The modality whose HF parameters are searched.")
@click.option("--out", type=FOLDER, required=True, help="Folder for best.yaml and tune-hf.html.")
@click.option("--trials", type=int, help="Parameter sets to try; default: 100.")
@click.option("--size", type=int, help="Side of the images in pixels; default: 224.")
@click.option("--hold-out", multiple=True, help="A group to validate on; default: a random share of each.")
@click.option("--group-column", help="Column that tells cameras or sets apart; default: group.")
@click.option("--seed", type=int, help="Of the search and the split; default: 0.")
@set_option
def tune_hf_command(
    images: tuple[Path, ...],
    masks: tuple[Path, ...],
    out: Path,
    overrides: tuple[str, ...],
    **options: Any,
) -> None:
    """Search the HF parameters that keep the vessels or lesions of IMAGES with masks in the kept tokens."""
    from shards.support.settings import apply_overrides, validate
    from shards.tune.search import TuneConfig, tune_hf

    given = {key: value for key, value in options.items() if value not in (None, ())}
    config = validate(TuneConfig, apply_overrides(given, overrides), where="frepa shards tune-hf")
    for line in tune_hf(images, out, config, masks=masks).lines():
        click.echo(line)
    click.echo(f"page  {out / 'tune-hf.html'}")
