"""`frepa datasets check`: is a copy of a data set whole, and what would an evaluation be given of it."""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from frepa_dist.evaluate.datasets.layout import FILES, Found, Layout, Problem, read_layout
from frepa_dist.evaluate.datasets.recipe import Recipe
from shards.builder.canonical import encode_png
from shards.formats.common import ReadOptions, Unreadable
from shards.formats.pictures import SUFFIXES, decode_image
from shards.formats.registry import open_object, read_header
from shards.read.draws import sample_rng
from shards.stores.atomic import replace_file
from shards.stores.blobs import FileBlob
from shards.support.errors import ConfigError, DataError
from shards.support.progress import track

SAMPLE = 32  # images that are decoded, unless all are asked for
CONVERTED = (".gif", ".ppm", ".pgm", ".pbm")
"""Pictures that the evaluations do not read; `--out` writes PNG copies of them."""

_VOLUMES = (".nii", ".nii.gz", ".dcm", ".dicom", ".npy", ".npz", ".h5", ".hdf5")
_FIRST = ("filename", "label", "split", "patient", *FILES)
_LISTED = 10


@dataclass
class CheckReport:
    """What was found.

    Attributes:
        recipe: of the data set.
        folder: of the copy.
        layout: its images, and what is not as the recipe says.
        num_decoded: images that were decoded, with their masks.
        problems: of the layout, then of the files.
    """

    recipe: Recipe
    folder: Path
    layout: Layout
    num_decoded: int
    problems: list[Problem] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as text."""
        images = self.layout.images
        lines = [f"{self.recipe.name} in {self.folder}: {len(images)} images, {self.num_decoded} decoded"]
        lines += [f"  {name:<20} {count:>6}" for name, count in self.layout.counts.items()]
        for column in ("split", "label"):
            counts = Counter(image.columns.get(column, "") for image in images)
            if set(counts) - {""}:
                shown = ", ".join(
                    f"{value or '(none)'} {count}" for value, count in sorted(counts.items())[:20]
                )
                lines.append(f"  {column:<20} {shown}")
        patients = {image.columns.get("patient", "") for image in images} - {""}
        lines.append(f"  {'patients':<20} {len(patients) or 'not known'}")
        lines += [f"problem: {problem}" for problem in self.problems[:_LISTED]]
        if len(self.problems) > _LISTED:
            lines.append(f"and {len(self.problems) - _LISTED} more problems")
        if not self.problems:
            lines.append("as the recipe says")
        if not self.recipe.verified:
            lines.append("the recipe itself was never compared with a copy from the original place")
        return lines

    def check(self) -> None:
        """Raise where there is a problem.

        Raises:
            DataError: names the first and counts them.
        """
        if self.problems:
            raise DataError(
                f"{len(self.problems)} problems, the first one: {self.problems[0].what}",
                where=self.folder,
                fix=self.problems[0].fix,
            )


def check_dataset(recipe: Recipe, folder: Path, *, deep: bool = False, seed: int = 0) -> CheckReport:
    """Check a copy of a data set against its recipe.

    Args:
        recipe: of the data set.
        folder: of the copy.
        deep: decode every image and mask; else a sample, and sizes of masks from the files' headers.
        seed: of the sample.

    Raises:
        ConfigError: the recipe knows no layout.
        DataError: there is no such folder.
    """
    if recipe.kind == "facts":
        raise ConfigError("this recipe holds facts, no layout", where=recipe.name, fix=recipe.get)
    layout = read_layout(recipe, folder)
    chosen = layout.images
    if not deep and len(chosen) > SAMPLE:
        rng = sample_rng(seed, 0, 0, "data set sample")
        chosen = [chosen[i] for i in np.sort(rng.choice(len(chosen), SAMPLE, replace=False))]
    problems = list(layout.problems)
    for image in track(chosen, total=len(chosen), description="decode"):
        problems += _check_files(folder, image)
    return CheckReport(recipe, folder, layout, len(chosen), problems)


def write_labels(report: CheckReport, out: Path) -> int:
    """Write the table that `frepa evaluate probe` and `segment` read; files are named relative to the folder.

    GIF and PPM files, which the evaluations do not read, are copied as PNG into a folder beside the table.

    Returns:
        How many were.

    Raises:
        DataError: a file cannot be converted.
        EnvironmentFault: the table cannot be written.
    """
    copies = out.parent / f"{out.stem}-png"
    num_copied = 0

    def name_of(path: str) -> str:
        nonlocal num_copied
        if not path.lower().endswith(CONVERTED):
            return path
        copy = copies / f"{path}.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(copy) as file:
            file.write(encode_png(_read_picture(report.folder / path)))
        num_copied += 1
        return Path(os.path.relpath(copy, report.folder)).as_posix()

    rows = [dict(_row(image, name_of)) for image in report.layout.images]
    used = {name for row in rows for name, value in row.items() if value}
    more = sorted({name for row in rows for name in row} - set(_FIRST))
    header = [name for name in (*_FIRST, *more) if name == "filename" or name in used]
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(out) as file:
        file.write(text.getvalue().encode())
    return num_copied


def _row(image: Found, name_of: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    yield "filename", name_of(image.image)
    yield from image.columns.items()
    yield from ((name, name_of(path)) for name, path in image.files.items())


def _check_files(folder: Path, image: Found) -> list[Problem]:
    """Decode an image and its masks, and compare their sizes."""
    problems, sizes = [], {}
    for name, path in {"image": image.image, **image.files}.items():
        try:
            sizes[name] = _size(folder / path)
        except DataError as error:
            problems.append(Problem(f"{path}: {error.what}", "get the file again"))
    size = sizes.get("image")
    problems += [
        Problem(
            f"{image.files[name]}: {_show(found)}, its image {image.image} has {_show(size)}",
            "masks must have the size of their image: take both from the same source",
        )
        for name, found in sizes.items()
        if size is not None and found != size
    ]
    return problems


def _size(path: Path) -> tuple[int, ...]:
    """Height and width of a picture, or slices, height and width of a volume; it is decoded for it.

    Raises:
        DataError: it cannot be read.
    """
    if path.name.lower().endswith(_VOLUMES):
        blob = FileBlob(str(path), path.stat().st_size)
        header = read_header(blob, ReadOptions())
        with open_object(blob, ReadOptions()) as opened:
            opened.decode(header.num_units // 2)
        return (header.num_units, header.height, header.width)
    return _read_picture(path).shape[:2]


def _read_picture(path: Path) -> np.ndarray:
    """Pixels of a picture, uint8, (H, W) or (H, W, 3).

    Raises:
        DataError: it cannot be read.
    """
    try:
        if path.suffix.lower() in SUFFIXES:
            return decode_image(path.read_bytes(), str(path))
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            plain = image.convert("L" if image.mode in ("1", "L", "P") and _is_grey(image) else "RGB")
            return np.asarray(plain, np.uint8)
    except Unreadable as error:
        raise DataError(error.what, where=path) from error
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise DataError(f"cannot be decoded ({type(error).__name__})", where=path) from error


def _is_grey(image: Image.Image) -> bool:
    """Whether all colors of a palette are grey."""
    if image.mode != "P":
        return True
    colors = np.array(image.getpalette("RGB") or [0, 0, 0], np.int16).reshape(-1, 3)
    return bool((colors == colors[:, :1]).all())


def _show(size: tuple[int, ...] | None) -> str:
    return " x ".join(map(str, size or ()))
