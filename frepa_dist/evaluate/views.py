"""Evaluation views: the center square of an image at an encoder's size, with its patches ranked by detail.

Images come from files or from a dataset of shards. Both take the same way as in training: pixels by
`shards.formats` and `shards.crops`, high-frequency (HF) ranks from the response map of the whole image.

Shapes: S side of a view in pixels, N patches of a view, row-major.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.canonical import resize_to_canonical
from shards.crops import apply_crop, center_crop, crop_shares
from shards.draws import sample_rng
from shards.formats import SUFFIXES, Pixels, decode_image
from shards.hf_tokens import HFParams, hf_map, hf_response, indices_from_map
from shards.modalities import find_modality
from shards.reader import ShardReader, exclusion_rows
from shards.schema import load_snapshot
from shards.support.errors import ConfigError, DataError

CANONICAL_SIZE = 512  # the short side at which the HF response of a file is computed
CELLS_PER_PATCH = 4  # of its response map


class View(NamedTuple):
    """A view and the order of its patches.

    Attributes:
        image: (S, S, 3) uint8; grey images repeated.
        hf_order: (N,) int64, all patches, strongest high-frequency response first.
    """

    image: Pixels
    hf_order: npt.NDArray[np.int64]


class Grid(NamedTuple):
    """Side of a view and of its patches, in pixels."""

    image_size: int
    patch_size: int


ViewLoader = Callable[[], View]


def view_pixels(image: Pixels, size: int) -> Pixels:
    """Cut the largest centered square of (H, W) or (H, W, 3) and resize it to (size, size, 3)."""
    view = apply_crop(image, center_crop(*image.shape[:2]), size)
    return np.repeat(view[:, :, None], 3, axis=2) if view.ndim == 2 else np.ascontiguousarray(view)


def read_image(path: Path) -> Pixels:
    """Decode an image file, (H, W) or (H, W, 3).

    Raises:
        DataError: it cannot be read, or is no image.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from error
    return decode_image(data, str(path))


def list_images(folder: Path) -> list[Path]:
    """Image files below a folder by their suffix, sorted; hidden files and folders are left out.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DataError("no such folder", where=folder)
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise DataError("no image in this folder", where=folder, allowed=" ".join(sorted(SUFFIXES)))
    return found


def list_views(
    images: Path,
    grid: Grid,
    *,
    num: int,
    seed: int = 0,
    snapshot: str | None = None,
    modality: str | None = None,
) -> dict[str, list[ViewLoader]]:
    """Choose images at random and name the functions that load their views.

    Args:
        images: a dataset of shards, or a folder of image files.
        grid: size of the views and of their patches.
        num: most images of a modality.
        seed: which images are chosen, and in which order.
        snapshot: state of the dataset, None for the current one.
        modality: of the image files: it decides what high frequency means. Of a dataset: the only one to use.

    Returns:
        The loaders by modality.

    Raises:
        ConfigError: the modality is unknown, or missing for image files.
        DataError: there are no images, or the dataset cannot be read.
    """
    if (images / "dataset.json").is_file():
        loaders = _dataset_loaders(images, snapshot, grid, modality)
    elif modality is None:
        raise ConfigError(
            "which patches are high-frequency depends on the modality, and files do not say it",
            where=images,
            fix="name it with --modality, or build a dataset with `frepa shards build`",
        )
    else:
        params = find_modality(modality).hf
        loaders = {modality: [partial(_view_of_file, path, params, grid) for path in list_images(images)]}
    return {name: _choose(found, num, seed, name) for name, found in loaders.items()}


def _choose(loaders: Sequence[ViewLoader], num: int, seed: int, modality: str) -> list[ViewLoader]:
    order = sample_rng(seed, 0, 0, f"evaluation images, {modality}").permutation(len(loaders))
    return [loaders[index] for index in order[:num]]


def _dataset_loaders(
    root: Path, digest: str | None, grid: Grid, modality: str | None
) -> dict[str, list[ViewLoader]]:
    snapshot = load_snapshot(root, digest)
    if modality is not None and modality not in snapshot.modalities:
        raise ConfigError(
            f"the dataset holds no '{modality}'", where=root, allowed=", ".join(snapshot.modalities)
        )
    reader, excluded = ShardReader(root, snapshot), exclusion_rows(root, snapshot)
    loaders: dict[str, list[ViewLoader]] = {}
    for shard, info in enumerate(snapshot.shards):
        if modality in (None, info.modality):
            rows = np.setdiff1d(np.arange(info.num_samples), excluded.get(shard, ()))
            found = loaders.setdefault(info.modality, [])
            found.extend(partial(_view_of_sample, reader, shard, int(row), grid) for row in rows)
    return loaders


def _view_of_sample(reader: ShardReader, shard: int, row: int, grid: Grid) -> View:
    sample = reader.read(shard, row)
    return _make_view(sample.image, sample.hf_map, grid)


def _view_of_file(path: Path, params: HFParams, grid: Grid) -> View:
    image = resize_to_canonical(read_image(path), CANONICAL_SIZE)
    cell = max(1, grid.patch_size // CELLS_PER_PATCH)
    return _make_view(image, hf_map(hf_response(image, params), cell), grid)


def _make_view(image: Pixels, response_map: npt.NDArray[np.uint8], grid: Grid) -> View:
    shares = crop_shares(center_crop(*image.shape[:2]), *image.shape[:2])
    order = indices_from_map(response_map, shares, grid.patch_size, 1.0, output_size=grid.image_size)
    return View(view_pixels(image, grid.image_size), order.astype(np.int64))
