"""Samples to micro-batches: the view of a sample that belongs to a place in the plan.

Shapes: B samples of a micro-batch, S side of a view in pixels, N patches of a view, K HF tokens among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Self, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from shards.crops import Crop, apply_crop, center_crop, crop_shares, random_crop
from shards.draws import sample_rng
from shards.hf_tokens import indices_from_map
from shards.order import Slots
from shards.reader import KeptSamples, Sample, ShardReader
from shards.schema import Snapshot, load_snapshot
from shards.support.errors import DataError
from shards.support.settings import Settings

MAX_REPLACEMENTS = 8
"""How many samples in a row may be damaged under `skip`: beyond it, the dataset is, not the sample."""


class StreamConfig(Settings):
    """Which dataset is read, and what a view of a sample is."""

    root: Path
    snapshot: str | None = None
    """Hash of the snapshot; None: the current one."""
    image_size: int = Field(default=224, gt=0)
    patch_size: int = Field(default=16, gt=0)
    hf_keep: float = Field(default=0.25, gt=0, le=1)
    """Share of the patches that count as HF tokens."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Range of a crop's area, as a share of the image's."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of a crop's width / height."""
    flip: bool = True
    """Mirror every second view left to right."""
    augment: bool = True
    """False: the largest centered square of every image, never mirrored."""
    hf_digest: str | None = None
    """Digest of the HF parameters (`HFParams.digest`) that all modalities must be built with; None: any."""
    num_workers: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    bad_samples: Literal["fail", "skip"] = "fail"
    """A sample that cannot be read: an error, or replaced by another one of its modality and reported."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale {self.crop_scale}: two numbers with 0 < low <= high <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio {self.crop_ratio}: two numbers with 0 < low <= high")
        return self

    @property
    def num_patches(self) -> int:
        """N."""
        return (self.image_size // self.patch_size) ** 2


def open_snapshot(config: StreamConfig) -> Snapshot:
    """Load the snapshot that is to be read.

    Raises:
        DataError: there is no such dataset, or it holds other HF tokens than `config.hf_digest` says.
    """
    snapshot = load_snapshot(config.root, config.snapshot)
    for modality, digest in sorted(snapshot.hf_digests.items()):
        if config.hf_digest not in (None, digest):
            raise DataError(
                f"the HF tokens of {modality} were computed with parameters {digest}, "
                f"not with {config.hf_digest}, which this run asks for",
                where=config.root,
                fix="build the dataset again with those HF parameters, or remove hf_digest from the config",
            )
    return snapshot


class Skipped(TypedDict):
    """A sample that could not be read and was replaced."""

    position: int
    sample: str
    reason: str


class MicroBatch(TypedDict):
    """Consecutive slots of a global batch, ready for a device."""

    image: torch.Tensor
    """(B, 3, S, S) uint8 RGB, grey images repeated."""
    hf_indices: torch.Tensor
    """(B, K) int64, the HF tokens of the view, strongest first."""
    mask_noise: torch.Tensor
    """(B, N) float32, uniform in [0, 1)."""
    position: torch.Tensor
    """(B,) int64, place in the epoch's plan."""
    slot: torch.Tensor
    """(B,) int64, place in the global batch."""
    key: list[str]
    skipped: list[Skipped]
    """What `bad_samples: skip` replaced."""
    num_bytes: int
    """Bytes read from shards."""


class Request(NamedTuple):
    """What a micro-batch is made from; small, since it travels to a worker."""

    epoch: int
    slots: Slots


class Views(torch.utils.data.Dataset["MicroBatch | DataError"]):
    """Map-style dataset whose index is a `Request` and whose item is a whole micro-batch.

    A function of its arguments and of the request: which process asks, and what was asked before, is nothing
    to it.
    """

    def __init__(
        self, config: StreamConfig, snapshot: Snapshot, exclusions: dict[int, NDArray[np.int64]]
    ) -> None:
        self.config, self.exclusions = config, exclusions
        self.reader = ShardReader(config.root, snapshot)

    def __getitem__(self, request: Request) -> MicroBatch | DataError:
        # an error is returned: on its way out of a worker DataLoader would turn it into text with a traceback
        try:
            return self._micro_batch(request)
        except DataError as error:
            return error

    def _micro_batch(self, request: Request) -> MicroBatch:
        config, slots = self.config, request.slots
        size, num = config.image_size, len(slots.position)
        images = np.empty((num, 3, size, size), np.uint8)
        hf_indices = np.empty((num, round(config.hf_keep * config.num_patches)), np.int64)
        noise = np.empty((num, config.num_patches), np.float32)
        keys: list[str] = []
        skipped: list[Skipped] = []
        num_bytes = 0
        for i in range(num):
            position = int(slots.position[i])
            shard, row = int(slots.shard[i]), int(slots.row[i])
            sample = self._read(request.epoch, position, shard, row, skipped)
            crop = self._crop(sample, request.epoch, position)
            images[i], hf_indices[i] = cut_view(sample, crop, config)
            sample_rng(config.seed, request.epoch, position, "mask").random(out=noise[i], dtype=np.float32)
            keys.append(sample.key)
            num_bytes += sample.num_bytes
        return MicroBatch(
            image=torch.from_numpy(images),
            hf_indices=torch.from_numpy(hf_indices),
            mask_noise=torch.from_numpy(noise),
            position=torch.from_numpy(slots.position.copy()),
            slot=torch.from_numpy(slots.slot.copy()),
            key=keys,
            skipped=skipped,
            num_bytes=num_bytes,
        )

    def _crop(self, sample: Sample, epoch: int, position: int) -> Crop:
        config, (height, width) = self.config, sample.image.shape[:2]
        if not config.augment:
            return center_crop(height, width)
        rng = sample_rng(config.seed, epoch, position, "crop")
        return random_crop(
            rng, height, width, scale=config.crop_scale, ratio=config.crop_ratio, flip=config.flip
        )

    def _read(self, epoch: int, position: int, shard: int, row: int, skipped: list[Skipped]) -> Sample:
        """Read a sample, or under `skip` the first readable one of a sequence drawn for its position."""
        replacements = self._replacements(epoch, position, shard)
        while True:
            try:
                return self.reader.read(shard, row)
            except DataError as error:
                if self.config.bad_samples == "fail":
                    raise
                skipped.append(
                    Skipped(position=position, sample=self.reader.where(shard, row), reason=error.what)
                )
            following = next(replacements, None)
            if following is None:
                raise DataError(
                    f"{1 + MAX_REPLACEMENTS} samples drawn for one place in the plan are all damaged, "
                    f"the last one: {skipped[-1]['sample']}: {skipped[-1]['reason']}",
                    where=self.config.root,
                    fix="restore the shards, or build the dataset again",
                )
            shard, row = following

    def _replacements(self, epoch: int, position: int, shard: int) -> Iterator[tuple[int, int]]:
        """Draw samples of a shard's modality, each as likely as any other."""
        kept = KeptSamples(self.reader.snapshot, self.exclusions, self.reader.snapshot.shards[shard].modality)
        rng = sample_rng(self.config.seed, epoch, position, "replacement")
        for number in rng.integers(len(kept), size=MAX_REPLACEMENTS).tolist():
            yield kept.locate(number)


def cut_view(
    sample: Sample, crop: Crop, config: StreamConfig
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Cut a view out of a sample, and rank its HF tokens in the same rectangle of the response map.

    Returns:
        The pixels, (3, S, S) or for a grey image (S, S), and the indices of the HF tokens, (K,).
    """
    pixels = apply_crop(sample.image, crop, config.image_size)
    indices = indices_from_map(
        sample.hf_map,
        crop_shares(crop, *sample.image.shape[:2]),
        config.patch_size,
        config.hf_keep,
        output_size=config.image_size,
        flip=crop.flip,
    )
    return pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1), indices
