"""Images with masks of what matters in them (vessels, lesions), to measure HF tokens by.

A set is a folder of images with a CSV file, columns `filename`, `mask` and maybe `fov` (the true field of
view; mask pixels outside it do not count), `split` and a group such as the camera, all paths relative to the
file's folder; or a folder of images and a folder of masks of the same names.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.builder.canonical import resize_to_canonical
from shards.formats.common import Pixels
from shards.formats.pictures import SUFFIXES, decode_image
from shards.support.errors import ConfigError, DataError

Float32 = npt.NDArray[np.float32]

TABLE = "labels.csv"
MASK_SUFFIXES = (*SUFFIXES, ".gif")
SEARCH, VALIDATION = "search", "validation"
_SPLITS = {
    **dict.fromkeys(("train", "training"), SEARCH),
    **dict.fromkeys(("val", "valid", "validation", "test", "testing"), VALIDATION),
}


@dataclass(frozen=True)
class MaskedFile:
    """Where an image and its masks are; `part` is empty where the set does not say."""

    image: Path
    mask: Path
    fov: Path | None
    group: str
    part: str


@dataclass(frozen=True)
class MaskedImage:
    """An image at working size.

    Attributes:
        pixels: (H, W) or (H, W, 3) uint8.
        worse: the same as two worse cameras would have taken it, see `worsen`.
        mask: (N,) how many pixels of each patch the mask covers, row-major.
        file: where it came from.
    """

    pixels: Pixels
    worse: tuple[Pixels, Pixels]
    mask: Float32
    file: MaskedFile


def list_masked(
    images: Sequence[Path], masks: Sequence[Path], group_column: str
) -> tuple[list[MaskedFile], list[str]]:
    """List images with their masks.

    Args:
        images: folders, a set each.
        masks: for each set its CSV file or folder of masks; none: `labels.csv` in each folder.
        group_column: column of the groups; a set without it is one group, called as its folder.

    Returns:
        The files, in the order of the tables or names, and a line for each row without a mask.

    Raises:
        ConfigError: a column is missing, a split has an unknown name, or `masks` are not as many as sets.
        DataError: files are missing.
    """
    masks = masks or [folder / TABLE for folder in images]
    if len(masks) != len(images):
        raise ConfigError(
            f"{len(images)} folders of images, but {len(masks)} of masks",
            allowed="--masks as often as there are folders, in their order; or never, for their labels.csv",
        )
    files: list[MaskedFile] = []
    left_out: list[str] = []
    names: set[str] = set()
    for folder, place in zip(images, masks, strict=True):
        if not folder.is_dir():
            raise DataError("there is no such folder of images", where=folder)
        name = _unused(folder.resolve().name, names)
        if place.is_dir():
            files += _pair_folders(folder, place, name)
        else:
            listed, without = _read_table(folder, place, name, group_column)
            files += listed
            left_out += without
    missing = [
        path for file in files for path in (file.image, file.mask, file.fov) if path and not path.is_file()
    ]
    if missing:
        shown = ", ".join(map(str, missing[:3]))
        raise DataError(
            f"{len(missing)} files are missing, such as {shown}",
            fix="paths in a table are relative to the folder of its images; leave an unknown mask empty",
        )
    return files, left_out


def load_masked(file: MaskedFile, size: int, patch_size: int, seed: int) -> MaskedImage | None:
    """Read an image with its mask; None where no mask pixel lies in a whole patch inside the field of view.

    Args:
        file: where they are.
        size: shorter side after resizing; aspect kept, never enlarged.
        patch_size: in pixels after resizing.
        seed: of the worse copies.

    Raises:
        DataError: a file cannot be read, is smaller than a patch, or a mask is not as large as its image.
    """
    image = decode_image(file.image.read_bytes(), str(file.image))
    mask = _read_mask(file.mask, image.shape[:2])
    if file.fov is not None:
        mask &= _read_mask(file.fov, image.shape[:2])
    pixels = resize_to_canonical(image, size)
    if min(pixels.shape[:2]) < patch_size:
        raise DataError(f"the image is smaller than a patch of {patch_size} pixels", where=file.image)
    covered = resize_to_canonical(mask * np.uint8(255), size).astype(np.float32) / 255
    rows, columns = covered.shape[0] // patch_size, covered.shape[1] // patch_size
    whole = covered[: rows * patch_size, : columns * patch_size]
    sums = whole.reshape(rows, patch_size, columns, patch_size).sum(axis=(1, 3)).ravel()
    if not sums.any():
        return None
    return MaskedImage(pixels, worsen(image, size, seed), sums, file)


def worsen(image: Pixels, size: int, seed: int) -> tuple[Pixels, Pixels]:
    """Imitate two worse cameras: a noisy sensor (sd 6 of 255, at twice the size) and light from one side.

    Published sets are well exposed; parameters searched on them alone take noise for detail.
    """
    rng = np.random.default_rng(seed)
    larger = resize_to_canonical(image, 2 * size).astype(np.float32)
    noisy = larger + rng.normal(0, 6, larger.shape).astype(np.float32)
    pixels = resize_to_canonical(image, size).astype(np.float32)
    height, width = pixels.shape[:2]
    ramp = np.linspace(0.4, 1.6, width, dtype=np.float32)[:: rng.choice((-1, 1))]
    light = np.broadcast_to(ramp, (height, width)).reshape(height, width, *[1] * (pixels.ndim - 2))
    return resize_to_canonical(_to_8_bit(noisy), size), _to_8_bit(pixels * light)


def _to_8_bit(values: Float32) -> Pixels:
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)


def assign_parts(
    files: Sequence[MaskedFile], *, validation: float, hold_out: Sequence[str], seed: int
) -> list[str]:
    """Say for each image whether the search sees it or only the validation.

    A group in `hold_out` is all validation. A group whose files name splits of both kinds keeps them (train
    against validation and test); of any other a share is drawn.

    Raises:
        ConfigError: `hold_out` names no group, or a part would be empty.
    """
    groups = list(dict.fromkeys(file.group for file in files))
    unknown = [name for name in hold_out if name not in groups]
    if unknown:
        raise ConfigError(f"no group '{unknown[0]}' to hold out", allowed=", ".join(groups))
    parts = [file.part for file in files]
    rng = np.random.default_rng(seed)
    for group in groups:
        members = [index for index, file in enumerate(files) if file.group == group]
        if group in hold_out:
            drawn = dict.fromkeys(members, VALIDATION)
        elif {SEARCH, VALIDATION} <= {parts[index] for index in members}:
            drawn = {index: parts[index] or SEARCH for index in members}
        else:
            num = min(max(1, round(validation * len(members))), len(members) - 1)
            chosen = set(rng.permutation(members)[:num].tolist())
            drawn = {index: VALIDATION if index in chosen else SEARCH for index in members}
        for index, part in drawn.items():
            parts[index] = part
    for part in (SEARCH, VALIDATION):
        if part not in parts:
            raise ConfigError(
                f"no image is left for {part}",
                allowed="at least one image on each side",
                fix="give more images with masks, or hold out fewer groups",
            )
    return parts


def _read_table(
    folder: Path, table: Path, name: str, group_column: str
) -> tuple[list[MaskedFile], list[str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"the table of masks cannot be read: {error}",
            where=table,
            allowed="a CSV file in UTF-8 with the columns filename and mask, or a folder of masks",
            fix="name it with --masks",
        ) from error
    for column in ("filename", "mask"):
        if column not in header:
            raise ConfigError(
                f"there is no column '{column}'",
                where=table,
                allowed="filename, mask; maybe fov, split, " + group_column,
                fix=f"the file has {', '.join(header) or 'none'}",
            )
    found, without = [], []
    for row in rows:
        values = {key: (value or "").strip() for key, value in row.items() if isinstance(value, str)}
        image = folder / values.get("filename", "")
        if not values.get("mask"):
            without.append(f"{image}: no mask is named")
            continue
        fov = folder / values["fov"] if values.get("fov") else None
        group = values.get(group_column) or name
        part = _part_of(values.get("split", ""), table)
        found.append(MaskedFile(image, folder / values["mask"], fov, group, part))
    return found, without


def _part_of(split: str, table: Path) -> str:
    if split and split.lower() not in _SPLITS:
        raise ConfigError(f"unknown split '{split}'", where=table, allowed=", ".join(sorted(_SPLITS)))
    return _SPLITS.get(split.lower(), "")


def _pair_folders(images: Path, masks: Path, name: str) -> list[MaskedFile]:
    by_stem = {path.relative_to(masks).with_suffix(""): path for path in _walk(masks, MASK_SUFFIXES)}
    found = []
    for path in _walk(images, SUFFIXES):
        if masks.resolve() in path.resolve().parents:
            continue  # masks below the images
        stem = path.relative_to(images).with_suffix("")
        if stem not in by_stem:
            raise DataError(
                f"no mask for it in {masks}",
                where=path,
                allowed="masks of the images' names, with any suffix",
                fix="rename them, or give a table with the columns filename and mask",
            )
        found.append(MaskedFile(path, by_stem[stem], None, name, ""))
    return found


def _walk(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes and path.is_file())


def _unused(name: str, names: set[str]) -> str:
    free, number = name, 1
    while free in names:
        number += 1
        free = f"{name}-{number}"
    names.add(free)
    return free


def _read_mask(path: Path, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Read a mask as (H, W) booleans: above half of its largest value, so that 0/1 and 0/255 are the same."""
    try:
        with Image.open(path) as picture:
            values = np.asarray(picture.convert("L"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"the mask cannot be read: {error}", where=path) from error
    if values.shape != shape:
        raise DataError(
            f"the mask has {values.shape[1]} x {values.shape[0]} pixels, its image {shape[1]} x {shape[0]}",
            where=path,
            fix="give masks as large as their images",
        )
    return np.asarray(values > 0.5 * max(int(values.max()), 1))
