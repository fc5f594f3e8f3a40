"""Reconstruction as a measurement: how far a student restores what was hidden, above all fine detail.

A method shows what it hides itself by `Method.previews`. Those errors compare a run with itself, not with
runs of other methods, which hide other things. For that there are two corruptions that are the same for all
students that take whole images (Frepa, arXiv 2407.14651, reconstructs external images so): random patches
hidden, and low frequencies removed.

Shapes: B images, S image side.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from frepa_dist.config import RunConfig
from frepa_dist.corruption import CorruptionConfig, corrupt
from frepa_dist.draws import SampleDraws
from frepa_dist.evaluate.views import Grid, PixelLoader, list_pixels
from frepa_dist.methods.base import InputSettings, Preview
from frepa_dist.methods.registry import METHODS
from frepa_dist.normalization import min_max_scale
from frepa_dist.runs import load_student
from frepa_dist.spectrum import DETAIL_CYCLES, high_band_error, radial_frequency
from shards.read.draws import draw_key
from shards.support.errors import DataError
from shards.support.progress import Progress
from shards.support.settings import Settings

GREY_LEVEL = 1 / 255


class Errors(NamedTuple):
    """How far predictions are from images, each (B,).

    Attributes:
        absolute: mean absolute error over the hidden pixels, of values in [0, 1].
        relative: sum |x - y| / sum |x| over the hidden pixels; images darker than one grey level of 255 are
            taken for that bright.
        high_band: relative root-mean-square error above the cut-off, of the whole image: 0 where all detail
            is there and true, 1 where none is there; NaN for an image without detail.
        power_kept: power above the cut-off as a share of the image's, more than 1 where detail is made up;
            NaN likewise.
    """

    absolute: Tensor
    relative: Tensor
    high_band: Tensor
    power_kept: Tensor


def compare(images: Tensor, preview: Preview, cutoff_cycles: float = DETAIL_CYCLES) -> Errors:
    """Compare predictions with images (B, 3, S, S) in [0, 1]."""
    hidden = preview.hidden.expand_as(images)
    num_hidden = hidden.sum(dim=(1, 2, 3))
    gap = ((preview.predicted - images).abs() * hidden).sum(dim=(1, 2, 3))
    brightness = (images.abs() * hidden).sum(dim=(1, 2, 3))
    high_band = high_band_error(preview.predicted, images, cutoff_cycles)
    kept = high_band_power(preview.predicted, cutoff_cycles) / high_band_power(images, cutoff_cycles)
    return Errors(
        absolute=gap / num_hidden,
        relative=gap / brightness.maximum(GREY_LEVEL * num_hidden),
        high_band=high_band,
        power_kept=torch.where(high_band.isnan(), torch.nan, kept),
    )


def high_band_power(images: Tensor, cutoff_cycles: float) -> Tensor:
    """Power of images (B, C, S, S) at and above a frequency in cycles per image side: (B,)."""
    above = radial_frequency(images.shape[-1], images.device) >= cutoff_cycles
    power: Tensor = torch.fft.fft2(images).abs().square() * above
    return power.sum(dim=(1, 2, 3))


def scale_images(images: Tensor, settings: InputSettings) -> Tensor:
    """Scale images uint8 (B, 3, S, S) to float32 in [0, 1], each to all of it where training does so."""
    scaled = images.float() / 255
    return min_max_scale(scaled) if getattr(settings, "min_max", False) else scaled


class ReconstructionSettings(Settings):
    """What is measured, and on what.

    No source states how much the common corruptions should hide; here it is MAE's share of the patches, and
    the disc of masked frequency modeling (MFM).

    Attributes:
        num: most images of a modality.
        seed: of the choice of images, and of what is hidden.
        cutoff_cycles: where detail begins, in cycles per image side.
        batch_size: images at a time.
        patches: the common corruption that hides patches.
        low_frequencies: the common corruption that removes low frequencies.
    """

    num: int = Field(ge=1)
    seed: int = Field(ge=0)
    cutoff_cycles: float = Field(default=DETAIL_CYCLES, gt=0)
    batch_size: int = Field(default=16, ge=1)
    patches: CorruptionConfig = CorruptionConfig(kinds={"random_patches": 1.0})
    low_frequencies: CorruptionConfig = CorruptionConfig(kinds={"high_pass": 1.0})

    def common(self) -> dict[str, CorruptionConfig]:
        """The corruptions that are the same for all methods, by what the result calls them."""
        ratio, patch, radius = self.patches.patch_ratio, self.patches.patch, self.low_frequencies.pass_radius
        return {
            f"{ratio:.0%} of {patch}-pixel patches hidden": self.patches,
            f"below {radius:g} cycles removed": self.low_frequencies,
        }


class Spread(Settings):
    """A value over images.

    Attributes:
        mean: over the images.
        deviation: standard deviation over the images, None for one image.
    """

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Take mean and deviation of values."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(mean=statistics.fmean(values), deviation=deviation)

    def __str__(self) -> str:
        """Mean and deviation in four digits."""
        return f"{self.mean:.4f}" + ("" if self.deviation is None else f" +- {self.deviation:.4f}")


class ReconstructionRow(Settings):
    """The errors of one modality under one corruption; see `Errors`.

    Attributes:
        modality: of the images.
        corruption: what was hidden.
        common: whether this corruption is the same for all methods; else it is the method's own.
        num_images: how many images.
        absolute, relative, high_band, power_kept: see `Errors`.
        by_image: their values one by one, None where an image has no detail; the same seed and number of
            images give the same images in the same order.
        note: what a reader must know of these predictions.
    """

    modality: str
    corruption: str
    common: bool
    num_images: int
    absolute: Spread
    relative: Spread
    high_band: Spread
    power_kept: Spread
    by_image: dict[str, list[float | None]] = Field(default_factory=dict)
    note: str = ""


class ReconstructionResult(Settings):
    """All rows, and what they were measured on."""

    run: str
    step: int
    method: str
    images: str
    config: ReconstructionSettings
    rows: list[ReconstructionRow]

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")

    def describe(self) -> str:
        """A table for the terminal."""
        lines = [
            f"{self.run}, step {self.step}: mean +- standard deviation over images; detail is what lies "
            f"above {self.config.cutoff_cycles:g} cycles per image side",
            f"{'modality':15} {'hidden':40} {'n':>4} {'relative error':>18} {'error of detail':>18} "
            f"{'power of detail':>18}",
        ]
        for row in self.rows:
            name = f"{row.corruption} ({'common' if row.common else 'own'})"
            lines.append(
                f"{row.modality:15} {name:40} {row.num_images:4d} {row.relative!s:>18} {row.high_band!s:>18} "
                f"{row.power_kept!s:>18}"
            )
        return "\n".join(lines + list(dict.fromkeys(row.note for row in self.rows if row.note)))


def run_reconstruct(
    run_dir: Path,
    images: Path | str,
    *,
    num: int = 64,
    seed: int = 0,
    modality: str | None = None,
    device: str | None = None,
) -> ReconstructionResult:
    """Reconstruct images with the newest student of a run, and measure the errors.

    Args:
        run_dir: the run.
        images: a dataset of shards, or a folder of image files; best of images not seen in training.
        num: most images of a modality.
        seed: of the choice of images, and of what is hidden.
        modality: of image files; of a dataset, the only one to use.
        device: where the student runs, None takes a GPU if there is one.

    Raises:
        ConfigError: the modality is not known.
        DataError: no such run, something cannot be read, or a prediction is not finite.
    """
    settings = ReconstructionSettings(num=num, seed=seed)
    student, config, step = load_student(run_dir)
    student.requires_grad_(False).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    grid = Grid(config.method.input.image_size, config.method.input.patch_size)
    found = list_pixels(images, grid, num=num, seed=seed, modality=modality)
    rows = [
        row for name, loaders in found.items() for row in measure(student, config, name, loaders, settings)
    ]
    return ReconstructionResult(
        run=str(run_dir),
        step=step,
        method=config.method.name,
        images=str(images),
        config=settings,
        rows=rows,
    )


def measure(
    student: nn.Module,
    config: RunConfig,
    modality: str,
    loaders: Sequence[PixelLoader],
    settings: ReconstructionSettings,
) -> list[ReconstructionRow]:
    """Measure the errors on the images of one modality, a row for each corruption.

    Raises:
        DataError: an image cannot be read, or a prediction is not finite.
    """
    device = next(student.parameters()).device
    found: dict[tuple[str, bool, str], list[Errors]] = {}
    with Progress(len(loaders), f"reconstruct, {modality}") as progress:
        for start in range(0, len(loaders), settings.batch_size):
            pixels = [load() for load in loaders[start : start + settings.batch_size]]
            images = scale_images(torch.from_numpy(np.stack(pixels)).to(device), config.method.input)
            keys = [draw_key(settings.seed, 0, start + number) for number in range(len(pixels))]
            for preview, common in list_previews(student, images, config, keys, settings):
                errors = compare(images, preview, settings.cutoff_cycles)
                found.setdefault((preview.name, common, preview.note), []).append(errors)
            progress.update(len(pixels))
    return [
        ReconstructionRow(
            modality=modality,
            corruption=name,
            common=common,
            num_images=len(loaders),
            note=note,
            **_spreads(columns, name),
            by_image={
                key: [None if math.isnan(value) else value for value in column.tolist()]
                for key, column in columns.items()
            },
        )
        for (name, common, note), batches in found.items()
        for columns in [_join(batches)]
    ]


def _join(batches: Sequence[Errors]) -> dict[str, Tensor]:
    """Errors of all images, (n,) by name."""
    return {key: torch.cat([getattr(errors, key) for errors in batches]).cpu() for key in Errors._fields}


def _spreads(columns: Mapping[str, Tensor], name: str) -> dict[str, Spread]:
    if not columns["absolute"].isfinite().all():
        raise DataError(
            f"the reconstructions hold NaN or infinity ({name})", fix="use a run that did not diverge"
        )
    if columns["high_band"].isnan().all():
        raise DataError("none of the images has any detail", fix="name a folder of medical images")
    # images without detail are left out where detail is measured
    return {key: Spread.of(column[~column.isnan()].tolist()) for key, column in columns.items()}


@torch.no_grad()
def list_previews(
    student: nn.Module,
    images: Tensor,
    config: RunConfig,
    draw_keys: Sequence[int],
    settings: ReconstructionSettings,
) -> list[tuple[Preview, bool]]:
    """What a student makes of images (B, 3, S, S): its method's previews, then the common corruptions.

    A student that hides patches itself has the former only: its own hiding is the one that it can restore.

    Returns:
        Each with whether the corruption is a common one.
    """
    method = METHODS[config.method.name]
    previews = [(preview, False) for preview in method.previews(student, images, config.method, draw_keys)]
    for name, corruption in settings.common().items():
        corrupted = corrupt(images, SampleDraws(draw_keys, images.device), corruption)
        predicted = method.restore(student, corrupted.images, config.method)
        if predicted is not None:
            hidden = corrupted.hidden > 0
            shown = Preview(
                name, corrupted.images.clamp(0, 1), torch.where(hidden, predicted, images), hidden
            )
            previews.append((shown, True))
    return previews
