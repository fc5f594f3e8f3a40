"""Which frequencies each layer of an encoder passes: the relative log-amplitude of its maps' spectra.

As Park and Kim ("How Do Vision Transformers Work?", ICLR 2022, arXiv 2202.06709) measure it: the 2-D Fourier
transform of each channel of a map, the logarithm of its amplitude, averaged over channels and images, along
the half-diagonal from zero frequency to the map's highest one, less its value at zero frequency. Layers that
blur fall, layers that sharpen rise. Frequencies are shares of the map's own highest one (pi): maps of a
hierarchical network get smaller from stage to stage, and only within a stage are its layers compared in the
same units.

Shapes: n images, B batch, D width, h = w sides of a map, F = h // 2 + 1 frequencies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from frepa_dist.evaluate.encoder import Encoder
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.image_measures import intervals_over_images
from frepa_dist.evaluate.layers import run_layers
from frepa_dist.evaluate.views import PixelLoader, list_pixels
from shards.support.progress import Progress
from shards.support.settings import Settings

SMALLEST = 1e-6  # added to amplitudes before the logarithm, as the authors' code does


class SpectraConfig(Settings):
    """What is measured.

    Attributes:
        num: most images of a modality.
        seed: of the choice of images.
        batch_size: images at a time.
    """

    num: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0)
    batch_size: int = Field(default=16, ge=1)


class LayerSpectrum(Settings):
    """One layer's response.

    Attributes:
        modality: of the images.
        layer: its name.
        side: h of its maps.
        frequencies: F shares of the map's highest frequency, from 0 to 1 (to somewhat less for an odd side).
        amplitude: mean over images of the relative log-amplitude at each; 0 at frequency 0.
        by_image: the last one, at the highest frequency, of each image.
        low, high: 95% bootstrap interval of its mean over images (percentiles).
    """

    modality: str
    layer: str
    side: int
    frequencies: list[float]
    amplitude: list[float]
    by_image: list[float]
    low: float
    high: float


class SpectraResult(Settings):
    """All layers, and what they were measured on."""

    encoder: str
    images: str
    config: SpectraConfig
    rows: list[LayerSpectrum]

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")

    def describe(self) -> str:
        """A table for the terminal."""
        lines = ["log-amplitude at the highest frequency of the map less that at zero (mean, 95% interval)"]
        lines += [
            f"{row.modality:15} {row.layer:24} {row.side:3d} x {row.side:<3d} {row.amplitude[-1]:7.3f}  "
            f"[{row.low:.3f}, {row.high:.3f}]  n = {len(row.by_image)}"
            for row in self.rows
        ]
        return "\n".join(lines)


def run_layer_spectra(
    encoder: str,
    images: Path | str,
    *,
    config: SpectraConfig | None = None,
    modality: str | None = None,
    device: str | None = None,
    num_resamples: int = 1000,
) -> SpectraResult:
    """Measure which frequencies each layer passes.

    Args:
        encoder: see `features.SOURCES`.
        images: a dataset of shards, or a folder of image files.
        config: what is measured.
        modality: of image files; of a dataset, the only one to use.
        device: where the encoder runs, None takes a GPU if there is one.
        num_resamples: of the bootstrap.

    Raises:
        ConfigError: the encoder shows no layers, or the modality is not known.
        DataError: something cannot be read.
    """
    config = config or SpectraConfig()
    loaded = load_encoder(encoder, device)
    found = list_pixels(images, loaded.view_grid, num=config.num, seed=config.seed, modality=modality)
    rows = []
    for name, loaders in found.items():
        for layer, (side, values) in measure(loaded, loaders, config, f"spectra, {name}").items():
            last = [{"last": float(value)} for value in values[:, -1]]
            low, high = intervals_over_images(last, num_resamples, config.seed)
            rows.append(
                LayerSpectrum(
                    modality=name,
                    layer=layer,
                    side=side,
                    frequencies=[2 * k / side for k in range(values.shape[1])],
                    amplitude=values.mean(axis=0).tolist(),
                    by_image=values[:, -1].tolist(),
                    low=low["last"],
                    high=high["last"],
                )
            )
    return SpectraResult(encoder=loaded.name, images=str(images), config=config, rows=rows)


def measure(
    encoder: Encoder, loaders: list[PixelLoader], config: SpectraConfig, description: str
) -> dict[str, tuple[int, npt.NDArray[np.float64]]]:
    """Side of the map and relative log-amplitudes (n, F) of each layer."""
    found: dict[str, list[npt.NDArray[np.float64]]] = {}
    sides: dict[str, int] = {}

    def reduce(maps: Tensor) -> Tensor:
        # the side travels as the first number of each row
        side = torch.full((len(maps), 1), maps.shape[-1], dtype=torch.float64)
        return torch.cat([side, relative_log_amplitude(maps).double().cpu()], dim=1)

    with Progress(len(loaders), description) as progress:
        for start in range(0, len(loaders), config.batch_size):
            pixels = [load() for load in loaders[start : start + config.batch_size]]
            images = encoder.normalize(torch.from_numpy(np.stack(pixels)))
            for layer, rows in run_layers(encoder, images, reduce).items():
                sides[layer] = int(rows[0, 0])
                found.setdefault(layer, []).append(rows[:, 1:].numpy())
            progress.update(len(pixels))
    return {layer: (sides[layer], np.concatenate(parts)) for layer, parts in found.items()}


def relative_log_amplitude(maps: Tensor) -> Tensor:
    """Log-amplitude of the spectra of maps less that at zero frequency, along the half-diagonal.

    Args:
        maps: (B, D, h, h).

    Returns:
        (B, F), the mean over channels; entry k is the frequency of k cycles along each side.
    """
    spectrum = torch.fft.fft2(maps.float())
    places = torch.arange(maps.shape[-1] // 2 + 1, device=maps.device)
    amplitude = torch.log(spectrum[..., places, places].abs() + SMALLEST).mean(dim=1)
    return amplitude - amplitude[:, :1]
