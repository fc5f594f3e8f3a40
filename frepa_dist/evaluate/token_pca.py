"""Tokens as colors: the first three principal components over a set of images, one for red, green, blue.

The components are those of all tokens of all images together, so that a color means the same in each. With
`foreground` the first one decides which tokens are shown, as DINOv2 does (Oquab et al., arXiv 2304.07193),
and the colors are the components of those alone. Its sign means nothing; here the side with the smaller
share of the tokens along the images' borders is the foreground.

Shapes: n images, D width, h, w sides of a map, N = h w tokens of an image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.layers import LAST, layer_maps
from frepa_dist.evaluate.overlays import Gallery, fit_picture, to_picture
from frepa_dist.evaluate.scores import Bool, Float64
from frepa_dist.evaluate.views import list_pixels
from shards.formats.common import Pixels
from shards.support.progress import Progress
from shards.support.settings import Settings

SHOWN_RANGE = (2, 98)  # percentiles of a component that are drawn as dark and bright


class TokenPcaConfig(Settings):
    """What is drawn.

    Attributes:
        num: images of a modality.
        seed: of the choice of images.
        layer: whose tokens, of `evaluate.layers`; the encoder's own map by default.
        foreground: whether the first component leaves tokens out.
    """

    num: int = Field(default=12, ge=1)
    seed: int = Field(default=0, ge=0)
    layer: str = LAST
    foreground: bool = False


class TokenPcaRow(Settings):
    """Tokens of images of one modality.

    Attributes:
        modality: of the images.
        num_images: how many.
        num_tokens: that the components are of.
        explained: share of the variance of each of the three.
    """

    modality: str
    num_images: int
    num_tokens: int
    explained: list[float]


class TokenPcaResult(Settings):
    """What the colors stand for; the pictures themselves are in the gallery."""

    encoder: str
    images: str
    config: TokenPcaConfig
    rows: list[TokenPcaRow]

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")

    def describe(self) -> str:
        """A line for each modality."""
        lines = []
        for row in self.rows:
            shares = ", ".join(f"{share:.1%}" for share in row.explained)
            lines.append(
                f"{row.modality}: {row.num_tokens} tokens of {row.num_images} images; the three components "
                f"hold {shares} of the variance"
            )
        return "\n".join(lines)


def run_token_pca(
    encoder: str,
    images: Path | str,
    *,
    config: TokenPcaConfig | None = None,
    modality: str | None = None,
    device: str | None = None,
    gallery: Gallery | None = None,
) -> TokenPcaResult:
    """Draw tokens as colors.

    Args:
        encoder: see `features.SOURCES`.
        images: a dataset of shards, or a folder of image files.
        config: what is drawn.
        modality: of image files; of a dataset, the only one to use.
        device: where the encoder runs, None takes a GPU if there is one.
        gallery: where images and their colors are put.

    Raises:
        ConfigError: the encoder shows no layers, or not that one, or the modality is not known.
        DataError: something cannot be read.
    """
    config = config or TokenPcaConfig()
    loaded = load_encoder(encoder, device)
    found = list_pixels(images, loaded.view_grid, num=config.num, seed=config.seed, modality=modality)
    rows = []
    for name, loaders in found.items():
        pixels, maps = [], []
        with Progress(len(loaders), f"tokens, {name}") as progress:
            for load in loaders:
                pixels.append(load())
                normalized = loaded.normalize(torch.from_numpy(pixels[-1][None]))
                maps.append(layer_maps(loaded, normalized, [config.layer])[config.layer][0].cpu().numpy())
                progress.update()
        colors, explained, num_tokens = color_tokens(np.stack(maps), foreground=config.foreground)
        rows.append(
            TokenPcaRow(
                modality=name, num_images=len(loaders), num_tokens=num_tokens, explained=explained.tolist()
            )
        )
        if gallery is not None:
            for image, color in zip(pixels, colors, strict=True):
                gallery.append([(to_picture(image), ""), (enlarge(color, image.shape[-1]), "")])
    return TokenPcaResult(encoder=loaded.name, images=str(images), config=config, rows=rows)


def color_tokens(
    maps: npt.NDArray[np.floating[Any]], *, foreground: bool = False
) -> tuple[npt.NDArray[np.uint8], Float64, int]:
    """Color tokens by their first three principal components.

    Args:
        maps: (n, D, h, w), D >= 3.
        foreground: whether the first component leaves tokens out: they are black.

    Returns:
        Colors (n, h, w, 3); the share of the variance that each component holds, (3,); how many tokens they
        are the components of.
    """
    num, width, height, across = maps.shape
    tokens = np.asarray(maps, np.float64).transpose(0, 2, 3, 1).reshape(-1, width)
    chosen = np.ones(len(tokens), bool)
    if foreground:
        first, _ = principal_components(tokens, 1)
        chosen = _foreground(first[:, 0].reshape(num, height, across)).ravel()
    values, explained = principal_components(tokens[chosen], 3)
    low, high = np.percentile(values, SHOWN_RANGE, axis=0)
    shares = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    colors = np.zeros((len(tokens), 3), np.uint8)
    colors[chosen] = np.round(255 * shares)
    return colors.reshape(num, height, across, 3), explained, int(chosen.sum())


def principal_components(rows: Float64, num: int) -> tuple[Float64, Float64]:
    """Coordinates (m, num) of rows (m, D), and the share of the variance of each, (num,).

    Each component's sign is that of its largest skew, so that the same rows give the same colors everywhere.
    """
    centered = rows - rows.mean(axis=0)
    variances, axes = np.linalg.eigh(centered.T @ centered)
    values = centered @ axes[:, ::-1][:, :num]
    values *= np.where((values**3).sum(axis=0) < 0, -1.0, 1.0)
    total = max(float(variances.sum()), np.finfo(float).tiny)
    return values, variances[::-1][:num] / total


def _foreground(values: Float64) -> Bool:
    """Which side of zero of the first component (n, h, w) has the smaller share of the border."""
    is_high = values > 0
    border = np.ones(values.shape[1:], bool)
    border[1:-1, 1:-1] = False
    share = is_high[:, border].mean() / max(is_high.mean(), 1e-12)
    return is_high if share <= 1 else ~is_high


def enlarge(colors: npt.NDArray[np.uint8], side: int) -> Pixels:
    """Draw the colors (h, w, 3) of tokens as squares, as large as the picture of side `side`."""
    larger: Pixels = cv2.resize(colors, (side, side), interpolation=cv2.INTER_NEAREST)
    return fit_picture(larger)
