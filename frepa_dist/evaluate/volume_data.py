"""Labeled volumes for a volume head: which are used, how they are split, and what the head is given of them.

A frozen 2D encoder runs once: the maps of all slices go into one file (float16), read window by window, so
that memory does not grow with the dataset. One that is trained is given the slices anew at each step.

Shapes: N slices of a volume, n windows of F places, S image side, D width, h = w sides of a map.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from frepa_dist.evaluate.encoder import Encoder
from frepa_dist.evaluate.labelled import SPLIT, SPLITS
from frepa_dist.evaluate.scores import Bool, Int64
from frepa_dist.evaluate.splits import TEST_FOLDS, stratified_folds
from shards.read.reader import ShardReader
from shards.read.volumes import Volume, iterate_slices, volume_window
from shards.read.windows import WindowName, to_unit_range
from shards.support.errors import ConfigError, DataError, EnvironmentFault
from shards.support.progress import Progress

_ROOM = 1 << 28  # bytes that are left on the disk of the maps


@dataclass(frozen=True)
class LabeledVolumes:
    """Volumes with their classes, and which of them are the test part.

    Attributes:
        volumes: N of them.
        classes: names, sorted.
        y: (N,) class of each.
        groups: (N,) those of one group show one patient, or share slices.
        is_test: (N,).
        split: "given" by the label `split`, or "made".
        num_left_out: volumes without the label.
    """

    volumes: list[Volume]
    classes: list[str]
    y: Int64
    groups: Int64
    is_test: Bool
    split: str
    num_left_out: int


class Load(Protocol):
    """Gives a head what it works on."""

    def __call__(self, volume: int, rows: Int64) -> Tensor:
        """Of a volume, by its place, slices `rows` (n, F) -> (n, F, ...) float32; -1: anything finite."""


def label_volumes(volumes: Sequence[Volume], column: str, seed: int, where: object) -> LabeledVolumes:
    """Choose the volumes that have a label, and split them so that no patient is on both sides.

    Args:
        volumes: of the dataset.
        column: name of the label.
        seed: of the split, where the labels give none.
        where: the dataset, for errors.

    Raises:
        ConfigError: no volume has such a label, or a split has an unknown name or is not given of each.
        DataError: slices of a volume have different labels, there are too few volumes, or the split that is
            given parts a patient.
    """
    torn = [volume for volume in volumes if column in volume.varying]
    if torn:
        raise DataError(
            f"'{column}' differs among the slices of {len(torn)} volumes, such as {torn[0].name}",
            where=where,
            fix="give every slice the label of its volume, and build again",
        )
    chosen = [volume for volume in volumes if volume.labels.get(column)]
    if not chosen:
        names = sorted({name for volume in volumes for name in volume.labels})
        raise ConfigError(
            f"none of {len(volumes)} volumes has a label '{column}'",
            where=where,
            allowed=", ".join(names) or "(the dataset has no labels)",
            fix="name another column, or build with --labels and --label-columns",
        )
    labels = [str(volume.labels[column]) for volume in chosen]
    classes = sorted(set(labels))
    y = np.array([classes.index(label) for label in labels], np.int64)
    groups = np.unique([volume.group for volume in chosen], return_inverse=True)[1]
    given = column != SPLIT and any(volume.split or SPLIT in volume.varying for volume in chosen)
    is_test = _given_split(chosen, groups, where) if given else _made_split(y, groups, seed, classes, where)
    train, test = (np.bincount(part, minlength=len(classes)) for part in (y[~is_test], y[is_test]))
    if len(classes) < 2 or train.min() < 1 or test.min() < 1:
        raise _too_few(y, classes, where)
    return LabeledVolumes(
        chosen, classes, y, groups, is_test, "given" if given else "made", len(volumes) - len(chosen)
    )


def _given_split(volumes: Sequence[Volume], groups: Int64, where: object) -> Bool:
    without = [volume.name for volume in volumes if not volume.split]
    if without:
        raise ConfigError(
            f"{len(without)} of {len(volumes)} volumes are in no part of the split that is given, or in "
            f"several, such as {without[0]}",
            where=where,
            allowed="a split of every volume, or of none to have one made",
            fix="fill the column 'split', and build again",
        )
    names = [str(volume.split).strip().lower() for volume in volumes]
    unknown = sorted(set(names) - set(SPLITS))
    if unknown:
        raise ConfigError(f"unknown split '{unknown[0]}'", where=where, allowed=", ".join(sorted(SPLITS)))
    is_test = np.array([SPLITS[name] == "test" for name in names])
    if set(groups[is_test]) & set(groups[~is_test]):
        raise DataError(
            "the split that is given has volumes of one patient, or volumes that share slices, on both sides",
            where=where,
            fix="split by patient, and leave out what repeats",
        )
    return is_test


def _made_split(y: Int64, groups: Int64, seed: int, classes: list[str], where: object) -> Bool:
    folds = stratified_folds(y, groups, TEST_FOLDS, seed) if len(classes) > 1 else []
    if not folds:
        raise _too_few(y, classes, where)
    is_test = np.zeros(len(y), bool)
    is_test[folds[0][1]] = True
    return is_test


def _too_few(y: Int64, classes: list[str], where: object) -> DataError:
    counts = Counter(classes[k] for k in y.tolist())
    shown = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return DataError(
        f"too few volumes of a class: {shown}",
        where=where,
        allowed="two classes or more, each with a training and a test volume of different patients",
        fix="add volumes, or name another label",
    )


class SliceEncoder(nn.Module):
    """A loaded encoder as a module: images in [0, 1] (n, 3, S, S) -> maps (n, D, h, w).

    Raises:
        ConfigError: the encoder gives no maps.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        if encoder.map is None or encoder.module is None:
            raise ConfigError(
                "this encoder gives no map of features",
                where=encoder.name,
                allowed="a backbone of `frepa backbones`, or a timm model with `forward_intermediates`",
            )
        self.module = encoder.module
        self._encoder, self._map = encoder, encoder.map

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) in [0, 1] -> (n, D, h, w)."""
        return self._map(self._encoder.normalize(images))


class SliceImages:
    """The slices of volumes as images in [0, 1], read from the shards each time.

    Args:
        reader: of the snapshot.
        volumes: of it.
        size: S.
        window: of CT.
    """

    def __init__(
        self, reader: ShardReader, volumes: Sequence[Volume], size: int, window: WindowName | None
    ) -> None:
        self._reader, self._volumes, self._size, self._window = reader, volumes, size, window

    def __call__(self, volume: int, rows: Int64) -> Tensor:
        """Slices `rows` (n, F) of a volume -> (n, F, 3, S, S); -1 gives zeros."""
        wanted = np.unique(rows[rows >= 0])
        images = torch.cat([torch.zeros(1, 3, self._size, self._size), *self.chunks(volume, wanted)])
        places = np.where(rows >= 0, np.searchsorted(wanted, rows) + 1, 0)
        return images[torch.from_numpy(places)]

    def chunks(self, volume: int, rows: Int64, num: int = 1) -> Iterator[Tensor]:
        """Slices `rows` (m,) of a volume, `num` at a time: (num, 3, S, S); grey planes share their memory."""
        wanted = self._volumes[volume].pick(rows)
        waiting: list[npt.NDArray[np.generic]] = []
        for number, pixels in enumerate(iterate_slices(self._reader, wanted, size=self._size), 1):
            waiting.append(pixels if pixels.ndim == 3 else pixels[:, :, None])
            if len(waiting) == num or number == len(rows):
                stacked = torch.from_numpy(np.stack(waiting)).permute(0, 3, 1, 2)
                window = torch.tensor([volume_window(pixels.dtype, self._window)] * len(waiting))
                yield to_unit_range(stacked, window)
                waiting = []


class SliceMaps:
    """The maps of all slices of some volumes, in a file.

    Args:
        maps: (slices of all volumes, D, h, w) float16.
        starts: of each volume, the place of its first slice.
    """

    def __init__(self, maps: npt.NDArray[np.float16], starts: Int64) -> None:
        self._maps, self._starts = maps, starts

    def __call__(self, volume: int, rows: Int64) -> Tensor:
        """Slices `rows` (n, F) of a volume -> (n, F, D, h, w); -1 gives another slice."""
        return torch.from_numpy(self._maps[self._starts[volume] + np.maximum(rows, 0)].astype(np.float32))


def store_maps(
    encode: Callable[[Tensor], Tensor],
    images: SliceImages,
    volumes: Sequence[Volume],
    folder: Path,
    device: torch.device,
    *,
    num: int,
) -> SliceMaps:
    """Run a frozen encoder over all slices and write their maps into a file of `folder`.

    Args:
        encode: images in [0, 1] (n, 3, S, S) -> (n, D, h, w).
        images: of the volumes.
        volumes: which.
        folder: where; the caller removes it.
        device: of the encoder.
        num: slices at a time.

    Raises:
        DataError: a slice is damaged, or its map holds NaN or infinity, or more than float16 can.
        EnvironmentFault: there is no room for the file.
    """
    counts = np.array([len(volume.slices) for volume in volumes], np.int64)
    maps: npt.NDArray[np.float16] | None = None
    done = 0
    with Progress(int(counts.sum()), "maps of slices", unit="slice") as progress, torch.no_grad():
        for place, volume in enumerate(volumes):
            for chunk in images.chunks(place, np.arange(len(volume.slices)), num):
                found = encode(chunk.to(device)).half().cpu().numpy()
                if not np.isfinite(found).all():
                    raise DataError(
                        "the map of a slice holds NaN, infinity or values beyond 65,504",
                        where=f"volume {volume.name}",
                        fix="use an earlier checkpoint, or an encoder with a final norm",
                    )
                if maps is None:
                    maps = _create_file(folder / "maps.npy", (int(counts.sum()), *found.shape[1:]))
                maps[done : done + len(found)] = found
                done += len(found)
                progress.update(len(found))
    assert maps is not None
    return SliceMaps(maps, np.cumsum(counts) - counts)


def _create_file(path: Path, shape: tuple[int, ...]) -> npt.NDArray[np.float16]:
    """Create a mapped array after a look at the disk: a map that finds it full ends the process."""
    needed, free = int(np.prod(shape)) * 2, shutil.disk_usage(path.parent).free
    if needed + _ROOM > free:
        raise EnvironmentFault(
            f"the maps of all slices take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
            where=path.parent,
            fix="name a folder on a larger disk with --cache, or a smaller encoder",
        )
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
