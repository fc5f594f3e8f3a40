"""Degraded copies of images, whose restoration says what an encoder kept: noise, half the resolution.

Both are made from 8-bit pictures, and are 8-bit pictures again, so that any encoder takes them. Noise comes
before any compression in reality and after it here: what JPEG did to a file stays in both copies.

Shapes: H, W of an image.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from shards.formats.common import Pixels
from shards.read.draws import sample_rng
from shards.support.settings import Settings

TaskName = Literal["denoise", "super-resolution"]


class Degradation(Settings):
    """What is done to an image; no public source states these levels.

    Attributes:
        task: `denoise` adds noise; `super-resolution` halves both sides and doubles them again, bicubic with
            antialiasing, as benchmarks of super-resolution do: bicubic interpolation is then the image given.
        noise_sd: standard deviation of white Gaussian noise, as a share of white (25 / 255 is usual).
        photons: expected number at white of a Poisson count, whose noise grows with the root of the signal:
            a low dose, simulated in the pixels and not in projections. None has no such noise; it comes
            before the Gaussian one.
    """

    task: TaskName = "denoise"
    noise_sd: float = Field(default=25 / 255, ge=0)
    photons: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.task == "denoise" and not self.noise_sd and self.photons is None:
            raise ValueError("without noise there is nothing to restore: set noise_sd or photons")
        return self

    def __str__(self) -> str:
        """What was done, in words."""
        if self.task == "super-resolution":
            return "half the resolution, bicubic"
        gaussian = [f"Gaussian noise of sd {self.noise_sd:.3g}"] if self.noise_sd else []
        poisson = [f"Poisson noise of {self.photons:g} photons at white"] if self.photons else []
        return " and ".join(poisson + gaussian)


def degrade(image: Pixels, config: Degradation, seed: int, number: int) -> Pixels:
    """Degrade an image; the same for the same seed and number.

    Args:
        image: (3, H, W); sides of super-resolution are even.
        config: how.
        seed: of the noise.
        number: of the image.

    Returns:
        (3, H, W) uint8, rounded and clipped. A grey image stays grey: its channels have the same noise.
    """
    if config.task == "super-resolution":
        return _halve_and_double(image)
    rng = sample_rng(seed, 0, number, "degradation")
    values = (image[:1] if is_grey(image) else image) / 255
    if config.photons is not None:
        values = rng.poisson(values * config.photons) / config.photons
    noisy = values + config.noise_sd * rng.standard_normal(values.shape)
    rounded = np.clip(np.round(noisy * 255), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(rounded, image.shape))


def is_grey(image: Pixels) -> bool:
    """Whether the channels of (3, H, W) are the same."""
    return bool((image == image[:1]).all())


def crop_to_even(image: Pixels) -> Pixels:
    """Cut the last row or column of (3, H, W) where their number is odd."""
    height, width = image.shape[1:]
    return image[:, : height - height % 2, : width - width % 2]


def _halve_and_double(image: Pixels) -> Pixels:
    height, width = image.shape[1:]
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    small = picture.resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    large = small.resize((width, height), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(large).transpose(2, 0, 1))
