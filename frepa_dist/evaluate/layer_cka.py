"""Debiased CKA of all pairs of layers, within an encoder or between two, and of each layer with bands.

A layer is compared by its mean over places. With bands, an image's features are compared with those of the
same image of which only a band of frequencies is left: which frequencies a layer says what it says by.

Shapes: n images, L layers, D width, B batch, S image side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator
from torch import Tensor

from frepa_dist.evaluate.cka import (
    MIN_IMAGES,
    Float64,
    centered_kernel,
    cka_of_kernels,
    jackknife_errors,
)
from frepa_dist.evaluate.encoder import Encoder
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.layers import pool_layers
from frepa_dist.evaluate.views import PixelLoader, list_pixels
from frepa_dist.spectrum import gaussian_low_pass
from shards.support.errors import DataError
from shards.support.progress import Progress
from shards.support.settings import Settings

Features = Mapping[str, npt.NDArray[np.float32]]
EDGES = (4.0, 8.0, 16.0, 32.0)


class LayerCkaConfig(Settings):
    """What is compared.

    Attributes:
        num: most images of a modality.
        seed: of the choice of images.
        edges: of the bands in cycles per image side, rising, positive; no public source states any.
        batch_size: images at a time.
    """

    num: int = Field(default=256, ge=MIN_IMAGES)
    seed: int = Field(default=0, ge=0)
    edges: tuple[float, ...] = Field(default=EDGES, min_length=1)
    batch_size: int = Field(default=32, ge=1)

    @field_validator("edges")
    @classmethod
    def _check_edges(cls, edges: tuple[float, ...]) -> tuple[float, ...]:
        if edges[0] <= 0 or any(b <= a for a, b in itertools.pairwise(edges)):
            raise ValueError("edges must be positive and rising")
        return edges

    def bands(self) -> dict[str, tuple[float, float]]:
        """Lower and upper edge of each band by name; 0 and infinity where there is none."""
        inner = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(self.edges)]
        names = [f"below {self.edges[0]:g}", *inner, f"above {self.edges[-1]:g}"]
        return dict(zip(names, itertools.pairwise([0.0, *self.edges, math.inf]), strict=True))


class LayerCkaRow(Settings):
    """Layers of images of one modality.

    Attributes:
        modality: of the images; modalities are never mixed.
        num_images: n.
        layers: of the first encoder.
        others: of the second one, or the first again.
        cka: of each layer (rows) with each of the others (columns).
        error: their jackknife standard errors, None where there are too few images.
        bands: names of the bands.
        band_cka: of each layer (rows) with itself for an image of which that band is left (columns).
        band_error: their jackknife standard errors.
    """

    modality: str
    num_images: int
    layers: list[str]
    others: list[str]
    cka: list[list[float]]
    error: list[list[float]] | None
    bands: list[str]
    band_cka: list[list[float]]
    band_error: list[list[float]] | None


class LayerCkaResult(Settings):
    """All rows, and what they were measured on; `other` is the second encoder, None for the first again."""

    encoder: str
    other: str | None
    images: str
    config: LayerCkaConfig
    rows: list[LayerCkaRow]

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")

    def describe(self) -> str:
        """For each layer its nearest one among the others, and its bands."""
        lines = []
        for row in self.rows:
            against = "its own other layers" if self.other is None else self.other
            lines.append(
                f"{row.modality}, n = {row.num_images}: debiased linear CKA; most alike of {against}"
            )
            lines.append(f"{'layer':22} {'most alike':28} " + " ".join(f"{band:>10}" for band in row.bands))
            for place, name in enumerate(row.layers):
                best = _most_alike(row.cka[place], place if self.other is None else None)
                bands = " ".join(f"{value:10.3f}" for value in row.band_cka[place])
                alike = "" if best is None else f"{row.others[best]} {row.cka[place][best]:.3f}"
                lines.append(f"{name:22} {alike:28} {bands}")
        return "\n".join(lines)


def _most_alike(values: Sequence[float], own: int | None) -> int | None:
    places = [place for place in range(len(values)) if place != own]
    return max(places, key=lambda place: values[place], default=None)


def run_layer_cka(
    encoder: str,
    images: Path | str,
    *,
    other: str | None = None,
    config: LayerCkaConfig | None = None,
    modality: str | None = None,
    device: str | None = None,
) -> LayerCkaResult:
    """Compare all layers with all layers, and each with what it makes of bands of frequencies.

    Args:
        encoder: see `features.SOURCES`.
        images: a dataset of shards, or a folder of image files.
        other: a second encoder; its images may have another side.
        config: what is compared.
        modality: of image files; of a dataset, the only one to use.
        device: where the encoders run, None takes a GPU if there is one.

    Raises:
        ConfigError: an encoder shows no layers, or the modality is not known.
        DataError: there are fewer than 4 images of a modality, or something cannot be read.
    """
    config = config or LayerCkaConfig()
    loaded = load_encoder(encoder, device)
    second = None if other is None else load_encoder(other, device)
    found, found_by_second = (
        {}
        if one is None
        else list_pixels(images, one.view_grid, num=config.num, seed=config.seed, modality=modality)
        for one in (loaded, second)
    )
    rows = []
    for name, loaders in found.items():
        if len(loaders) < MIN_IMAGES:
            raise DataError(
                f"CKA of {len(loaders)} images of {name}", where=images, allowed=f"at least {MIN_IMAGES}"
            )
        full, *banded = embed_layers(loaded, loaders, config, config.bands().values(), f"layers, {name}")
        others = None
        if second is not None:
            (others,) = embed_layers(second, found_by_second[name], config, (), f"other layers, {name}")
        rows.append(compare_layers(name, full, others, dict(zip(config.bands(), banded, strict=True))))
    return LayerCkaResult(
        encoder=loaded.name,
        other=None if second is None else second.name,
        images=str(images),
        config=config,
        rows=rows,
    )


def embed_layers(
    encoder: Encoder,
    loaders: Sequence[PixelLoader],
    config: LayerCkaConfig,
    bands: Iterable[tuple[float, float]],
    description: str,
) -> list[Features]:
    """Mean features of all layers: of whole images, then of each band; (n, D) by name of the layer."""
    wanted = [None, *bands]
    found: list[dict[str, list[npt.NDArray[np.float32]]]] = [{} for _ in wanted]
    with Progress(len(loaders), description) as progress:
        for start in range(0, len(loaders), config.batch_size):
            pixels = [load() for load in loaders[start : start + config.batch_size]]
            images = encoder.normalize(torch.from_numpy(np.stack(pixels)))
            for band, features in zip(wanted, found, strict=True):
                seen = images if band is None else band_pass(images, *band)
                for name, values in pool_layers(encoder, seen).items():
                    features.setdefault(name, []).append(values.cpu().numpy())
            progress.update(len(pixels))
    return [{name: np.concatenate(parts) for name, parts in features.items()} for features in found]


def band_pass(images: Tensor, low: float, high: float) -> Tensor:
    """Leave a band of frequencies of images (B, 3, S, S); bands whose edges meet add up to the images.

    Edges are those of Gaussian filters (gain .61 at the edge from below, .39 from above), so that nothing
    rings. Normalized images are filtered, so that what loses its mean is left at
    the mean that an encoder was trained around.

    Args:
        images: normalized.
        low: edge in cycles per image side, 0 where there is none.
        high: the other edge, infinity where there is none.
    """
    above = gaussian_low_pass(images, high) if math.isfinite(high) else images
    return above - gaussian_low_pass(images, low) if low > 0 else above


def compare_layers(
    modality: str, features: Features, others: Features | None, bands: Mapping[str, Features]
) -> LayerCkaRow:
    """CKA of all pairs of layers, and of each layer with its bands.

    Args:
        modality: of the images.
        features: (n, D) by layer.
        others: the same of another encoder, None for the same one.
        bands: for each band the features of the first encoder.
    """
    kernels = _kernels(features)
    second = kernels if others is None else _kernels(others)
    errors = jackknife_errors(kernels, second)
    values, spreads = [], []
    for place, name in enumerate(features):
        own = kernels[place : place + 1]
        banded = np.stack([centered_kernel(band[name]) for band in bands.values()])
        values.append(cka_of_kernels(own, banded)[0].tolist())
        spread = jackknife_errors(own, banded)
        spreads.append([] if spread is None else spread[0].tolist())
    return LayerCkaRow(
        modality=modality,
        num_images=kernels.shape[-1],
        layers=list(features),
        others=list(others or features),
        cka=cka_of_kernels(kernels, second).tolist(),
        error=None if errors is None else errors.tolist(),
        bands=list(bands),
        band_cka=values,
        band_error=None if errors is None else spreads,
    )


def _kernels(features: Features) -> Float64:
    """(L, n, n), U-centered."""
    return np.stack([centered_kernel(values) for values in features.values()])
