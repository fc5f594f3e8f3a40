"""`frepa datasets ...`: recipes of public data sets; heavy imports are in the commands."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.options import FOLDER


@click.group("datasets")
def datasets_group() -> None:
    """Public data sets of the papers: where to get them, how a copy is laid out. Nothing is downloaded."""


@datasets_group.command("list")
def list_datasets() -> None:
    """List the recipes."""
    from frepa_dist.evaluate.datasets.recipe import load_recipe, recipe_names

    click.echo(f"{'name':<20} {'modality':<14} {'kind':<8} {'images':>6}  {'verified':<8}  title")
    for name in recipe_names():
        recipe = load_recipe(name)
        counts = [part.count for part in recipe.parts]
        number = str(sum(filter(None, counts))) if counts and all(counts) else "-"
        yes = "yes" if recipe.verified else "no"
        click.echo(f"{name:<20} {recipe.modality:<14} {recipe.kind:<8} {number:>6}  {yes:<8}  {recipe.title}")


@datasets_group.command("show")
@click.argument("name")
def show(name: str) -> None:
    """Show the recipe NAME (or a YAML file): where to get the set, its terms, its layout, sources."""
    from frepa_dist.evaluate.datasets.recipe import load_recipe

    for line in load_recipe(name).lines():
        click.echo(line)


@datasets_group.command("check")
@click.argument("name")
@click.argument("folder", type=FOLDER)
@click.option("--deep", is_flag=True, help="Decode every image and mask; default: a sample.")
@click.option(
    "--out", type=FOLDER, help="CSV file for `frepa evaluate probe --labels` and `segment --masks`."
)
@click.option("--seed", default=0, show_default=True, help="Of the sample.")
def check(name: str, folder: Path, deep: bool, out: Path | None, seed: int) -> None:
    """Check the copy of NAME in FOLDER: layout, counts, masks; exit code 3 where something is wrong.

    With --out the table is written even so, of what is there.
    """
    from frepa_dist.evaluate.datasets.check import check_dataset, write_labels
    from frepa_dist.evaluate.datasets.recipe import load_recipe

    report = check_dataset(load_recipe(name), folder, deep=deep, seed=seed)
    for line in report.lines():
        click.echo(line)
    if out is not None and report.layout.images:
        num_copied = write_labels(report, out)
        copied = f", {num_copied} files copied as PNG beside it" if num_copied else ""
        click.echo(f"labels  {out}{copied}")
    report.check()
