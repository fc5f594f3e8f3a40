"""Results of a suite on disk: one file for each task and encoder, named by all that decides what is in it.

    OUTPUT/results/TASK--ENCODER-SEED--DIGEST.json

A file is written whole or not at all. A suite that is started again reads what is there under the names it
expects; what other settings, weights or images gave has other names and is never read.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ConfigDict, ValidationError

from frepa_dist.evaluate.labelled import FILENAME, read_rows
from frepa_dist.evaluate.overlays import Gallery
from frepa_dist.evaluate.pictures import is_dataset
from frepa_dist.evaluate.suite.config import Entry, MasksEntry
from frepa_dist.evaluate.suite.readings import READERS
from frepa_dist.evaluate.views import list_images, read_file
from frepa_dist.runs import CONFIG
from shards.dataset import load_snapshot
from shards.formats.common import Pixels
from shards.stores.atomic import replace_text
from shards.support.settings import Settings

FORMAT = 2  # counts up when a result of the same settings, weights and images would be another
RESULTS = "results"
SHOWN_ONLY = {"name", "published"}  # of a task: what changes no number
WITH_PICTURES = ("segment", "detect", "restore", "token-pca")
WITHOUT_LEAKAGE = ("cka", "layer-cka", "reconstruct", "layer-spectra", "token-pca")  # nothing is learned
TABLES = {"images": ("labels", "masks"), "transfer": ("transfer_labels",)}  # of the images of a task
WITHOUT_MODALITY = ("segment", "detect", "restore")  # they do not look at it


class Picture(Settings):
    """A picture as PNG in base64, and its caption."""

    png: str
    caption: str


class Cell(Settings):
    """What one task gave for one encoder.

    Attributes:
        kind: of the task.
        source: of the encoder, and `encoder` what it was loaded as.
        result: see `readings.READERS`.
        pictures: rows, one for each test image shown.
        seconds: that it took.
    """

    model_config = ConfigDict(ser_json_inf_nan="constants")

    kind: str
    source: str
    encoder: str
    result: dict[str, Any]
    pictures: list[list[Picture]]
    seconds: float


def cell_path(output: Path, task: str, encoder: str, digest: str) -> Path:
    """Where to write a result; names are for people, the digest finds it."""
    return output / RESULTS / f"{_slug(task)}--{_slug(encoder)}--{digest}.json"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[:48] or "unnamed"


def cell_digest(
    task: Entry,
    images: str,
    encoder: str,
    source: str,
    *,
    may_leak: bool,
    states: Iterable[Path],
    num_pictures: int,
) -> str:
    """Name all that decides a result.

    Args:
        task: its settings.
        images: digest of its images and tables, see `data_digest`.
        encoder: digest of the weights, see `feature_cache.encoder_digest`.
        source: what the user named; of a run folder other images are known to have been seen than of a file
            with the same weights.
        may_leak: whether it is one that images of the pretraining were allowed for.
        states: where they were looked for.
        num_pictures: that were drawn.
    """
    unused = SHOWN_ONLY | ({"modality"} if task.kind in WITHOUT_MODALITY else set())
    told = [
        FORMAT,
        task.model_dump(mode="json", exclude=unused),
        images,
        encoder,
        str(Path(source).resolve()) if is_run(source) else "",
        may_leak,
        sorted(str(state) for state in states) if is_run(source) else [],
        num_pictures,
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:20]


def is_run(source: str) -> bool:
    """Whether a source is a run folder, of which the images of the pretraining are known."""
    return (Path(source) / CONFIG).is_file()


def data_digest(task: Entry) -> str:
    """Name all that a task reads: files by path, size and time of change, a dataset by its snapshot.

    Of a task with a table these are the files that it names, masks too, wherever they lie.

    Raises:
        FrepaError: they are not there.
    """
    facts: list[Any] = []
    for name, names_of_tables in TABLES.items():
        place = getattr(task, name, None)
        if place is None:
            continue
        table = next((t for each in names_of_tables if (t := getattr(task, each, None)) is not None), None)
        if table is not None:
            facts.append(hashlib.sha256(read_file(table)).hexdigest())
        if is_dataset(place):
            facts.append(load_snapshot(place).hash)
        else:
            files = list_images(Path(place)) if table is None else _named_files(task, Path(place), table)
            facts += [(str(path), *_stamp(path)) for path in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _named_files(task: Entry, images: Path, table: Path) -> list[Path]:
    """Files that a table names."""
    _, rows = read_rows(table, (FILENAME,))
    masks = task.columns.model_dump().values() if isinstance(task, MasksEntry) else ()
    return [images / row[column] for row in rows for column in (FILENAME, *masks) if row.get(column)]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:  # the task itself says what is missing
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def read_cell(output: Path, digest: str) -> Cell | None:
    """Read a result, None where there is none, or one that is damaged or of another version."""
    for path in sorted((output / RESULTS).glob(f"*--{digest}.json")):
        try:
            cell = Cell.model_validate_json(path.read_text(encoding="utf-8"))
            READERS[cell.kind][0].model_validate(cell.result)
        except (OSError, ValidationError, UnicodeDecodeError):
            continue
        return cell
    return None


def write_cell(path: Path, cell: Cell) -> None:
    """Write a result.

    Raises:
        EnvironmentFault: the disk is full, or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, cell.model_dump_json() + "\n")


def pack_pictures(gallery: Gallery) -> list[list[Picture]]:
    """Pictures for a file."""
    return [[Picture(png=_to_png(pixels), caption=words) for pixels, words in row] for row in gallery]


def _to_png(pixels: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def unpack_picture(picture: Picture) -> Pixels:
    """Pixels (H, W, 3)."""
    with Image.open(io.BytesIO(base64.b64decode(picture.png))) as image:
        return np.asarray(image.convert("RGB"))
