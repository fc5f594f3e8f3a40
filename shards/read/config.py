"""Settings of reading: which dataset, how its bytes are got, and what a view of a sample is."""

from __future__ import annotations

import math
from pathlib import Path, PurePath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from shards.read.access import RemoteConfig
from shards.read.windows import WindowConfig
from shards.support.settings import Settings

PlaceName = Annotated[
    str, BeforeValidator(lambda value: str(value) if isinstance(value, PurePath) else value)
]
"""A folder or `s3://bucket/prefix`, as text: a path would eat one of the slashes."""


def _check_scale(scale: tuple[float, float]) -> tuple[float, float]:
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError("two numbers with 0 < low <= high <= 1")
    return scale


def _check_ratio(ratio: tuple[float, float]) -> tuple[float, float]:
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError("two numbers with 0 < low <= high")
    return ratio


CropScale = Annotated[tuple[float, float], AfterValidator(_check_scale)]
"""Range of a crop's area, as a share of the image's."""

CropRatio = Annotated[tuple[float, float], AfterValidator(_check_ratio)]
"""Range of a crop's width / height."""


class AccessConfig(Settings):
    """How a dataset in S3 is read; means nothing for a folder.

    Attributes:
        remote: `cache` copies whole shards to this machine before they are read, `range` asks for the bytes
            of each sample.
        cache_dir: folder of the copies, shared by all processes of a machine; None takes
            frepa-shards-UID below the folder for temporary files (TMPDIR, /tmp). Where that is in memory,
            name a folder on a disk.
        cache_bytes: room for the copies; the one that was used least recently goes first.
    """

    remote: Literal["cache", "range"] = "cache"
    cache_dir: Path | None = None
    cache_bytes: int = Field(default=64 << 30, gt=0)


class StreamConfig(AccessConfig):
    """Which dataset is read, and what a view of a sample is."""

    root: PlaceName
    snapshot: str | None = None
    """Hash of the snapshot; None: the current one."""
    image_size: int = Field(default=224, gt=0)
    patch_size: int = Field(default=16, gt=0)
    hf_keep: float = Field(default=0.25, gt=0, le=1)
    """Share of the patches that count as HF tokens."""
    hf_digests: dict[str, str] | None = None
    """HF version by modality (`HFParams.digest`), in the tars or added by `frepa shards rehf`; of modalities
    that are not named, and for None, the one in the tars."""
    crop_scale: CropScale = (0.2, 1.0)
    crop_ratio: CropRatio = (3 / 4, 4 / 3)
    flip: bool = True
    """Mirror every second view left to right."""
    ct_windows: WindowConfig = WindowConfig()
    """Which window a view in Hounsfield units gets."""
    augment: bool = True
    """False: the largest centered square of every image, never mirrored, CT in the reference window."""
    num_workers: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    bad_samples: Literal["fail", "skip"] = "fail"
    """A sample that cannot be read: an error, or replaced by another one of its modality and reported."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        return self

    @property
    def num_patches(self) -> int:
        """N."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def remote_config(self) -> RemoteConfig:
        """How the dataset is read."""
        return RemoteConfig(self.remote, self.cache_dir, self.cache_bytes)
