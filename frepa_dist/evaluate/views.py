"""Evaluation views: the center square of an image at an encoder's size, with its patches ranked by detail.

Images come from files or from a dataset of shards. Both take the way of training views without augmentation
(`shards.read.views.cut_view`); the response map of a file is computed as the build would have done.

Shapes: S side of a view in pixels, N patches of a view, row-major.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shards.builder.canonical import resize_to_canonical
from shards.dataset import has_dataset
from shards.formats.common import Pixels
from shards.formats.pictures import SUFFIXES, decode_image
from shards.formats.registry import find_images
from shards.hf.maps import hf_map
from shards.hf.modalities import find_modality
from shards.hf.tokens import HFParams, hf_response
from shards.read.config import StreamConfig
from shards.read.crops import apply_crop, center_crop
from shards.read.draws import sample_rng
from shards.read.kept import KeptSamples, exclusion_rows
from shards.read.reader import Sample, ShardReader
from shards.read.views import cut_view, open_snapshot, three_planes
from shards.read.windows import to_bytes
from shards.stores.store import is_remote
from shards.support.errors import ConfigError, DataError

CANONICAL_SIZE = 512  # the short side at which the HF response of a file is computed
CELLS_PER_PATCH = 4  # of its response map


class View(NamedTuple):
    """A view and the order of its patches.

    Attributes:
        image: (3, S, S) uint8; grey images repeated, CT in the reference window.
        hf_order: (N,) int64, all patches, strongest high-frequency response first.
    """

    image: Pixels
    hf_order: npt.NDArray[np.int64]


class Grid(NamedTuple):
    """Side of a view and of its patches, in pixels."""

    image_size: int
    patch_size: int


ViewLoader = Callable[[], View]
PixelLoader = Callable[[], Pixels]


def stack_images(views: Sequence[View]) -> Tensor:
    """Stack the images of B views, (B, 3, S, S) uint8."""
    return torch.from_numpy(np.stack([view.image for view in views]))


def read_pixels(path: Path, size: int) -> Pixels:
    """Decode an image file to the pixels of its view, (3, size, size).

    Raises:
        DataError: it cannot be read, or is no image.
    """
    image = decode_file(path)
    pixels = apply_crop(image, center_crop(*image.shape[:2]), size)
    return three_planes(pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def decode_file(path: Path) -> Pixels:
    """Decode an image file, (H, W) or (H, W, 3) uint8.

    Raises:
        DataError: it cannot be read, or is no image.
    """
    return decode_image(read_file(path), str(path))


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from error


def list_images(folder: Path) -> list[Path]:
    """Images below a folder that are decoded here, see `shards.formats.registry.find_images`.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    return find_images(folder, SUFFIXES)


def list_views(
    images: Path | str,
    grid: Grid,
    *,
    num: int,
    seed: int = 0,
    snapshot: str | None = None,
    hf_digests: Mapping[str, str] | None = None,
    modality: str | None = None,
) -> dict[str, list[ViewLoader]]:
    """Choose images at random and name the functions that load their views.

    Args:
        images: a dataset of shards (a folder or `s3://bucket/prefix`), or a folder of image files.
        grid: size of the views and of their patches.
        num: most images of a modality.
        seed: which images are chosen, and in which order.
        snapshot: state of the dataset, None for the current one.
        hf_digests: HF version by modality, as of `StreamConfig`.
        modality: of the image files: it decides what high frequency means. Of a dataset: the only one to use.

    Returns:
        The loaders by modality.

    Raises:
        ConfigError: the modality is unknown, or missing for image files.
        DataError: there are no images, or the dataset cannot be read.
    """
    if is_remote(images) or has_dataset(images):
        config = stream_config(images, grid, snapshot, hf_digests)
        return _dataset_loaders(config, modality, num, seed)
    paths = list_images(Path(images))
    if modality is None:
        raise ConfigError(
            "which patches are high-frequency depends on the modality, and files do not say it",
            where=images,
            fix="name it with --modality, or build a dataset with `frepa shards build`",
        )
    params = find_modality(modality).hf
    chosen = _choose(len(paths), num, seed, modality)
    return {modality: [partial(view_of_file, paths[i], params, grid) for i in chosen]}


def list_pixels(
    images: Path | str, grid: Grid, *, num: int, seed: int = 0, modality: str | None = None
) -> dict[str, list[PixelLoader]]:
    """Choose images at random like `list_views`, of which only the pixels (3, S, S) matter.

    Image files need no modality then; where none is named, they are called "images".

    Raises:
        ConfigError: the modality is unknown.
        DataError: there are no images, or the dataset cannot be read.
    """
    if is_remote(images) or has_dataset(images):
        views = list_views(images, grid, num=num, seed=seed, modality=modality)
        return {name: [partial(_pixels_of, load) for load in loaders] for name, loaders in views.items()}
    if modality is not None:
        find_modality(modality)
    name, paths = modality or "images", list_images(Path(images))
    chosen = _choose(len(paths), num, seed, name)
    return {name: [partial(read_pixels, paths[i], grid.image_size) for i in chosen]}


def _pixels_of(load: ViewLoader) -> Pixels:
    return load().image


def _choose(available: int, num: int, seed: int, modality: str) -> list[int]:
    rng = sample_rng(seed, 0, 0, f"evaluation images, {modality}")
    chosen: list[int] = rng.choice(available, size=min(num, available), replace=False).tolist()
    return chosen


def _dataset_loaders(
    config: StreamConfig, modality: str | None, num: int, seed: int
) -> dict[str, list[ViewLoader]]:
    snapshot = open_snapshot(config)
    if modality is not None and modality not in snapshot.modalities:
        raise ConfigError(
            f"the dataset holds no '{modality}'", where=config.root, allowed=", ".join(snapshot.modalities)
        )
    reader = ShardReader(config.root, snapshot, config.hf_digests, config.remote_config)
    excluded = exclusion_rows(config.root, snapshot)
    loaders: dict[str, list[ViewLoader]] = {}
    for name in snapshot.modalities if modality is None else [modality]:
        kept = KeptSamples(snapshot, excluded, name)
        loaders[name] = [
            partial(_view_of_sample, reader, *kept.locate(i), config)
            for i in _choose(len(kept), num, seed, name)
        ]
    return loaders


def stream_config(
    root: Path | str,
    grid: Grid,
    snapshot: str | None = None,
    hf_digests: Mapping[str, str] | None = None,
) -> StreamConfig:
    """Views without augmentation that rank all their patches; a few out of many shards, so by ranges."""
    return StreamConfig(
        root=str(root),
        snapshot=snapshot,
        hf_digests=dict(hf_digests or {}),
        remote="range",
        image_size=grid.image_size,
        patch_size=grid.patch_size,
        hf_keep=1.0,
        augment=False,
    )


def _view_of_sample(reader: ShardReader, shard: int, row: int, config: StreamConfig) -> View:
    return center_view(reader.read(shard, row), config)


def view_of_file(path: Path, params: HFParams, grid: Grid) -> View:
    """View of an image file, its response map computed as a build would have done.

    Raises:
        DataError: it cannot be read, or is no image.
    """
    image = resize_to_canonical(decode_file(path), CANONICAL_SIZE)
    cell = max(1, grid.patch_size // CELLS_PER_PATCH)
    sample = Sample(path.name, image, hf_map(hf_response(image, params), cell), num_bytes=0)
    return center_view(sample, stream_config(path.parent, grid))


def center_view(sample: Sample, config: StreamConfig) -> View:
    """View of a sample, as `stream_config` describes it; CT in the reference window."""
    pixels, order = cut_view(sample, center_crop(*sample.image.shape[:2]), config)
    return View(three_planes(to_bytes(pixels)), order.astype(np.int64))
