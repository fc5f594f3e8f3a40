"""Images, with masks or without, as a table lists them, and which of them are tested on.

Shapes: H, W of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from frepa_dist.evaluate.labelled import FILENAME, PATIENT, SPLIT, read_rows, split_of
from frepa_dist.evaluate.masks import Mask
from frepa_dist.evaluate.views import decode_file, list_images, read_file
from shards.formats.common import Pixels, Unreadable
from shards.formats.pictures import check_format, decode_page
from shards.read.draws import sample_rng
from shards.read.views import three_planes
from shards.support.errors import DataError
from shards.support.settings import Settings

LOSSY, LEAST_LOSSY = ("jpeg", "webp"), 128  # formats of a mask, and its least value in them
TEST_SHARE = 4  # a split that is made holds out one image, or patient, of so many


@dataclass(frozen=True)
class MaskedImage:
    """Files of one image.

    Attributes:
        image: the picture.
        mask: its mask, see `load_mask`; None where there is nothing to find.
        where: mask of the pixels that count (field of view); None counts all.
        second: mask of a second observer, None where there is none.
        is_test: whether it is in the test part.
    """

    image: Path
    mask: Path | None
    where: Path | None
    second: Path | None
    is_test: bool


class Columns(Settings):
    """Columns of the table that name files of masks; only `mask` has to be there.

    Attributes:
        mask: what is to be found.
        where: pixels that count.
        second: a second observer's mask.
    """

    mask: str = "mask"
    where: str = "fov"
    second: str = "mask2"


def read_masked(
    images: Path, table: Path, columns: Columns | None = None, *, seed: int = 0, keep_empty: bool = False
) -> list[MaskedImage]:
    """Read which images have which masks.

    Args:
        images: folder that the table's names are relative to.
        table: a CSV file with the columns `filename`, one of masks, and maybe `split` and `patient`.
        columns: what the columns of masks are called.
        seed: of the split, where the table gives none: one patient (image) of four is tested on.
        keep_empty: rows without a mask are images in which there is nothing to find; else they are left out.

    Raises:
        ConfigError: a column is missing, or a split has an unknown name.
        DataError: files are missing, or one part of the split is empty.
    """
    columns = columns or Columns()
    header, rows = read_rows(table, (FILENAME, columns.mask))
    rows = [row for row in rows if row[columns.mask] or keep_empty]
    tests = _test_rows(rows, SPLIT in header, table, seed)

    def file(row: dict[str, str], column: str) -> Path | None:
        name = row.get(column)
        return images / name if name else None

    found = [
        MaskedImage(
            images / row[FILENAME],
            file(row, columns.mask),
            file(row, columns.where),
            file(row, columns.second),
            is_test,
        )
        for row, is_test in zip(rows, tests, strict=True)
    ]
    files = [path for item in found for path in (item.image, item.mask, item.where, item.second) if path]
    _check_parts(files, [item.is_test for item in found], table)
    return found


def read_split(images: Path, table: Path | None, *, seed: int = 0) -> list[tuple[Path, bool]]:
    """Read which images there are, and whether each is tested on.

    Args:
        images: folder of the images.
        table: a CSV file with the column `filename`, relative to the folder, and maybe `split` and `patient`;
            None takes all images below the folder.
        seed: of the split, where none is given, as in `read_masked`.

    Raises:
        ConfigError: a column is missing, or a split has an unknown name.
        DataError: files are missing, or one part of the split is empty.
    """
    if table is None:
        paths = list_images(images)
        tests = _test_rows([{} for _ in paths], False, images, seed)
    else:
        header, rows = read_rows(table, (FILENAME,))
        paths = [images / row[FILENAME] for row in rows]
        tests = _test_rows(rows, SPLIT in header, table, seed)
    _check_parts(paths, tests, table or images)
    return list(zip(paths, tests, strict=True))


def read_patients(images: Path, table: Path | None, files: Sequence[Path]) -> list[str] | None:
    """Name the patient of each file as the table has it, empty where it has none; None without such a column.

    Raises:
        ConfigError, DataError: the table cannot be read.
    """
    if table is None:
        return None
    header, rows = read_rows(table, (FILENAME,))
    if PATIENT not in header:
        return None
    known = {images / row[FILENAME]: row[PATIENT].strip() for row in rows}
    return [known[path] for path in files]


def number_patients(patients: Sequence[str] | None) -> list[int] | None:
    """Numbers in the place of names, which a result does not keep; a file without a patient has its own."""
    if patients is None:
        return None
    names = [name or f"(row {number})" for number, name in enumerate(patients)]
    return [int(number) for number in np.unique(names, return_inverse=True)[1]]


def _check_parts(files: Sequence[Path], tests: Sequence[bool], where: Path) -> None:
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} files are missing: {', '.join(map(str, missing[:3]))}",
            where=where,
            fix="file names are relative to the folder of images; correct that folder or the names",
        )
    if len(set(tests)) < 2:
        raise DataError(
            f"{len(tests)} images, all in one part of the split",
            where=where,
            allowed="at least one image to learn from and one to test on",
        )


def _test_rows(rows: Sequence[dict[str, str]], is_split: bool, table: Path, seed: int) -> list[bool]:
    if is_split:
        tests = [split_of(row[SPLIT], table) == "test" for row in rows]
        known = {(row.get(PATIENT, "").strip(), is_test) for row, is_test in zip(rows, tests, strict=True)}
        cut = {name for name, is_test in known if name and (name, not is_test) in known}
        if cut:
            raise DataError(
                f"images of one patient on both sides of the split: {len(cut)} patients",
                where=table,
                fix="put all images of a patient into one part, or leave the split to us (no such column)",
            )
        return tests
    names = [row.get(PATIENT, "").strip() or f"(row {number})" for number, row in enumerate(rows)]
    patients = sorted(set(names))
    order = sample_rng(seed, 0, 0, "split of masks").permutation(len(patients))
    tested = {patients[place] for place in order[: max(1, len(patients) // TEST_SHARE)]}
    return [name in tested for name in names]


def load_image(path: Path, short_side: int | None) -> Pixels:
    """The picture (3, H, W) uint8, resized to a short side; None keeps its size.

    Raises:
        DataError: it cannot be read.
    """
    pixels = decode_file(path)
    if short_side is not None:
        height, width = pixels.shape[:2]
        scale = short_side / min(height, width)
        size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
        shrinks = scale < 1
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return three_planes(pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def load_truth(item: MaskedImage) -> tuple[Mask, Mask]:
    """The mask and the pixels that count, both (H, W) at the size of the file.

    Raises:
        DataError: one cannot be read, or has another shape than the picture.
    """
    height, width = decode_file(item.image).shape[:2]
    shape = (height, width)
    mask = np.zeros(shape, bool) if item.mask is None else load_mask(item.mask, shape)
    return mask, load_mask(item.where, shape)


def load_mask(path: Path | None, shape: tuple[int, int]) -> Mask:
    """A mask (H, W) of the picture's shape: its pixels that are not 0. All of it where there is no file.

    A format that may lose something draws specks around the edges of a mask: there, half of white is least.

    Raises:
        DataError: it cannot be read, or has another shape, or is so dark that nothing of it would be left.
    """
    if path is None:
        return np.ones(shape, bool)
    data = read_file(path)
    try:
        pixels = decode_page(data).pixels
        is_lossy = check_format(data) in LOSSY
    except Unreadable as error:
        raise Unreadable(error.reason, error.detail, where=path) from error
    brightest = np.nan_to_num(pixels if pixels.ndim == 2 else pixels.max(axis=2))
    mask: Mask = brightest >= LEAST_LOSSY if is_lossy else brightest != 0
    if is_lossy and brightest.any() and not mask.any():
        raise DataError(
            f"a mask in a format that may lose something, whose brightest pixel is {brightest.max()}",
            where=path,
            allowed=f"{LEAST_LOSSY} or more where something is to be found",
            fix="save it as PNG, or brighten it",
        )
    if mask.shape != shape:
        raise DataError(
            f"the mask is {mask.shape[0]} x {mask.shape[1]} pixels, its picture {shape[0]} x {shape[1]}",
            where=path,
        )
    return mask


def resize_mask(mask: Mask, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """The share of each pixel (H', W') that the mask covers."""
    return np.asarray(
        cv2.resize(mask.astype(np.float32), shape[::-1], interpolation=cv2.INTER_AREA), np.float32
    )
