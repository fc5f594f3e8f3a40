"""`frepa evaluate leakage`, and the options of evaluations about it; heavy imports are in the command."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cluster.options import FOLDER
from shards.support.errors import ConfigError, DataError

if TYPE_CHECKING:
    from shards.audit.stored import StoredImages

F = TypeVar("F", bound=Callable[..., Any])
STATE = click.option(
    "--state",
    "states",
    multiple=True,
    type=FOLDER,
    help="Private folder of the build: tells patients, and the bytes of every file; may be repeated.",
)
ALLOW = click.option("--allow-leakage", is_flag=True, help="Go on where images were in the pretraining data.")


def leakage_options(function: F) -> F:
    """Add `--allow-leakage` and `--state`."""
    return ALLOW(STATE(function))


@click.command("leakage")
@click.argument("dataset")
@click.argument("images")
@click.option("--labels", type=FOLDER, help="CSV with filename[,patient]: only these files; default: all.")
@click.option(
    "--modality", "modalities", multiple=True, help="One to search, or several; default: all that are drawn."
)
@click.option("--most-near", type=click.IntRange(min=0), help="Samples with near hashes to read at most.")
@click.option("--jobs", type=click.IntRange(min=1), default=None, help="Processes; default: one per core.")
@click.option("--out", type=FOLDER, help="JSON file for the result.")
@click.option("--page", type=FOLDER, help="HTML page with the pairs side by side: it shows the images.")
@leakage_options
def evaluate_leakage(
    dataset: str,
    images: str,
    labels: Path | None,
    modalities: tuple[str, ...],
    most_near: int | None,
    jobs: int | None,
    out: Path | None,
    page: Path | None,
    allow_leakage: bool,
    states: tuple[Path, ...],
) -> None:
    """Are IMAGES in the pretraining data? Same bytes, pixels, patients, near duplicates. Exit code 3 if so.

    DATASET is one of shards, or a run folder: the modalities that it draws from its dataset are searched.
    IMAGES is a folder of files, or another dataset.
    """
    from frepa_dist.evaluate.pictures import is_dataset, open_shards
    from frepa_dist.runs import CONFIG, load_run_config
    from shards.audit.leakage import MOST_NEAR, find_leakage
    from shards.audit.leakage_page import write_leakage_page
    from shards.dataset import load_snapshot
    from shards.formats.registry import find_images
    from shards.read.balance import drawn_modalities

    place, snapshot, drawn = dataset, None, None
    if (Path(dataset) / CONFIG).is_file():
        data = load_run_config(Path(dataset)).data
        place, snapshot = str(data.root), data.snapshot
        drawn = drawn_modalities(data.modality_weights, load_snapshot(place, snapshot).modalities)
    patients: dict[int, str] = {}
    files: list[Path] | StoredImages
    if is_dataset(images):
        if page is not None or labels is not None:
            raise ConfigError(
                "--page and --labels are for files, and this is a dataset",
                where=images,
                fix="name a folder of files, or leave the two out",
            )
        files = open_shards(images).stored()
    elif labels is None:
        files = find_images(Path(images))
    else:
        files, patients = _read_table(labels, Path(images))
    report = find_leakage(
        place,
        files,
        images=images,
        snapshot=snapshot,
        modalities=modalities or drawn,
        states=states,
        patients=patients,
        most_near=MOST_NEAR if most_near is None else most_near,
        jobs=jobs or 0,
    )
    for line in report.lines():
        click.echo(line)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if page is not None:
        write_leakage_page(report, Path(images), page)
        click.echo(f"page  {page}")
    if not allow_leakage:
        report.check()


def _read_table(table: Path, images: Path) -> tuple[list[Path], dict[int, str]]:
    """Files that a table names, and their patients."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        files = [images / row["filename"] for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        raise DataError(
            f"the table cannot be read: {error}", where=table, allowed="a CSV file with a column 'filename'"
        ) from error
    return files, {place: row["patient"] for place, row in enumerate(rows) if row.get("patient")}
