"""How far each corruption shifts the grey levels of images (Frepa, arXiv 2407.14651): total variation.

Half the sum of |p - q| over the bins of two histograms: the share of the pixels that would have to change
their grey level to undo the shift. 0 where the histogram stays, 1 where the two have no level in common.
Corruptions clip nothing, and what lies below 0 or above 1 has bins of its own.

Shapes: B images, C channels, S image side, N bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from frepa_dist.corruption import CorruptionConfig, corrupt
from frepa_dist.corruption.plan import Mode
from frepa_dist.draws import SampleDraws
from frepa_dist.evaluate.image_measures import intervals_over_images
from frepa_dist.evaluate.overlays import Gallery, to_picture
from frepa_dist.evaluate.views import Grid, PixelLoader, list_pixels
from frepa_dist.normalization import min_max_scale
from shards.read.draws import draw_key
from shards.support.progress import Progress
from shards.support.settings import Settings

CELL = 32  # of a grid that views of a dataset need; no patch is looked at


class HistogramConfig(Settings):
    """What is measured.

    Attributes:
        num: most images of a modality.
        seed: of the choice of images, and of what is hidden.
        image_size: S, as the paper's.
        ratio: share of the tiles, patches or cells that is masked.
        bins: N, of [0, 1]; 256 are the grey levels of a picture.
        tile: side of the tiles, in pixels at that size.
        mode: of the frequency masking, see `CorruptionConfig`.
    """

    num: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0)
    image_size: int = Field(default=512, ge=64, multiple_of=CELL)
    ratio: float = Field(default=0.625, gt=0, lt=1)
    bins: int = Field(default=256, ge=2)
    tile: int = Field(default=32, ge=1)
    mode: Mode = "hermitian"

    def corruptions(self) -> dict[str, CorruptionConfig]:
        """What is tried, by name."""
        ratio = (self.ratio, self.ratio)
        tiles = {"tile": self.tile, "tile_ratio": ratio}
        return {
            f"{self.ratio:.1%} of tiles as noise": CorruptionConfig(kinds={"histogram": 1.0}, **tiles),
            f"{self.ratio:.1%} of tiles zero": CorruptionConfig(kinds={"zero": 1.0}, **tiles),
            f"{self.ratio:.1%} of frequencies": CorruptionConfig(
                kinds={"frequency": 1.0}, cell_ratio=ratio, mode=self.mode
            ),
            "low frequencies kept": CorruptionConfig(kinds={"low_pass": 1.0}),
            "low frequencies removed": CorruptionConfig(kinds={"high_pass": 1.0}),
        }


class HistogramRow(Settings):
    """The shift by one corruption of images of one modality.

    Attributes:
        modality: of the images.
        corruption: what was done.
        num_images: how many images.
        by_image: total variation of each image's histogram, the mean of its channels.
        mean, low, high: of these, with a 95% bootstrap interval over images (percentiles).
        pooled: total variation of the histograms of all images together.
        before, after: those, N + 2 shares: below 0, the bins, above 1.
    """

    modality: str
    corruption: str
    num_images: int
    by_image: list[float]
    mean: float
    low: float
    high: float
    pooled: float
    before: list[float]
    after: list[float]


class HistogramResult(Settings):
    """All rows, and what they were measured on."""

    images: str
    config: HistogramConfig
    rows: list[HistogramRow]

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")

    def describe(self) -> str:
        """A table for the terminal."""
        lines = [
            f"total variation of the grey levels, {self.config.bins} bins, {self.config.image_size} pixels: "
            "of each image (mean, 95% interval), and of all together",
        ]
        lines += [
            f"{row.modality:15} {row.corruption:28} {row.mean:.4f} [{row.low:.4f}, {row.high:.4f}]  "
            f"{row.pooled:.4f}  n = {row.num_images}"
            for row in self.rows
        ]
        return "\n".join(lines)


def run_histogram(
    images: Path | str,
    *,
    config: HistogramConfig | None = None,
    modality: str | None = None,
    num_resamples: int = 1000,
    gallery: Gallery | None = None,
) -> HistogramResult:
    """Measure how far corruptions shift the grey levels of images.

    Args:
        images: a dataset of shards, or a folder of image files.
        config: what is measured.
        modality: of image files; of a dataset, the only one to use.
        num_resamples: of the bootstrap.
        gallery: where the first image of each modality and its corruptions are put.

    Raises:
        ConfigError: the modality is not known.
        DataError: there are no images, or one cannot be read.
    """
    config = config or HistogramConfig()
    grid = Grid(config.image_size, CELL)
    found = list_pixels(images, grid, num=config.num, seed=config.seed, modality=modality)
    rows = []
    for name, loaders in found.items():
        rows += measure(name, loaders, config, num_resamples)
        if gallery is not None:
            scaled = _load(loaders[0])
            shown = [(_picture(scaled), name)]
            for corruption, changed in _corrupt_all(scaled, 0, config).items():
                shown.append((_picture(changed), corruption))
            gallery.append(shown)
    return HistogramResult(images=str(images), config=config, rows=rows)


def measure(
    modality: str, loaders: Sequence[PixelLoader], config: HistogramConfig, num_resamples: int
) -> list[HistogramRow]:
    """Measure the shift of each corruption on images of one modality."""
    before, after = [], {name: [] for name in config.corruptions()}  # type: ignore[var-annotated]
    with Progress(len(loaders), f"histograms, {modality}") as progress:
        for number, load in enumerate(loaders):
            scaled = _load(load)
            before.append(histograms(scaled, config.bins)[0])
            for name, changed in _corrupt_all(scaled, number, config).items():
                after[name].append(histograms(changed, config.bins)[0])
            progress.update()
    old = torch.stack(before)  # (n, C, N + 2)
    rows = []
    for name, parts in after.items():
        new = torch.stack(parts)
        by_image = total_variation(old, new).mean(dim=1).tolist()
        low, high = intervals_over_images([{"tv": tv} for tv in by_image], num_resamples, config.seed)
        pooled = (old.mean(dim=(0, 1)), new.mean(dim=(0, 1)))
        rows.append(
            HistogramRow(
                modality=modality,
                corruption=name,
                num_images=len(loaders),
                by_image=by_image,
                mean=float(np.mean(by_image)),
                low=low["tv"],
                high=high["tv"],
                pooled=float(total_variation(*pooled)),
                before=pooled[0].tolist(),
                after=pooled[1].tolist(),
            )
        )
    return rows


def histograms(images: Tensor, bins: int) -> Tensor:
    """Shares of the pixels of images (B, C, S, S) by grey level: below 0, bins, above 1; (B, C, N + 2)."""
    places = torch.floor(images * bins).clamp(-1, bins).long() + 1
    places[images == 1] = bins  # the last bin holds its upper end
    counts = [torch.bincount(channel.flatten(), minlength=bins + 2) for image in places for channel in image]
    return torch.stack(counts).reshape(*images.shape[:2], bins + 2) / images[0, 0].numel()


def total_variation(first: Tensor, second: Tensor) -> Tensor:
    """Half the sum of differences of distributions (..., N) -> (...)."""
    return (first - second).abs().sum(dim=-1) / 2


def _load(load: PixelLoader) -> Tensor:
    """(1, 3, S, S) in [0, 1], by the image's own range as Frepa scales it."""
    return min_max_scale(torch.from_numpy(load()[None]).float() / 255)


def _corrupt_all(scaled: Tensor, number: int, config: HistogramConfig) -> dict[str, Tensor]:
    draws = SampleDraws([draw_key(config.seed, 0, number)], "cpu")
    return {name: corrupt(scaled, draws, kind).images for name, kind in config.corruptions().items()}


def _picture(scaled: Tensor) -> Any:
    return to_picture((scaled[0].clamp(0, 1) * 255).round().byte().numpy())
