"""What is drawn for each image before any pixel is touched: its kind of corruption, tiles, cells, noise.

All of it is small and comes from generators on the host, so that which image takes which corruption is known
without waiting for the device, and is the same on every device.

Sizes are stated for images of any even side S:
- tiles and patches are squares of pixels, counted from the top left; the last ones may be cut;
- cells are squares of bins of the spectrum, one bin being one cycle per image side, counted from zero
  frequency outward; the outermost ones may be cut. Where 2 cells divide S, that is the authors' grid.

Shapes: G cells or tiles along a side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator

from frepa_dist.draws import SampleDraws
from shards.support.errors import ConfigError
from shards.support.settings import Settings

KindName = Literal["histogram", "frequency", "zero", "random_patches", "low_pass", "high_pass", "none"]
Mode = Literal["published", "hermitian"]

KINDS: tuple[KindName, ...] = get_args(KindName)


def _check_range(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"the lower bound {bounds[0]} lies above the upper one {bounds[1]}")
    return bounds


Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareRange = Annotated[tuple[Share, Share], AfterValidator(_check_range)]
Positive = Annotated[float, Field(gt=0)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_check_range)]


class CorruptionConfig(Settings):
    """Settings of `corrupt`; where nothing else is said, the values are those of Frepa (arXiv 2407.14651).

    Attributes:
        kinds: weight of each kind; an image takes one, with the probability weight / sum of weights.
        mode: of the kind `frequency`. `hermitian`: masks and noise are conjugate-symmetric, as the spectrum
            of a real image is, so that each coefficient is either whole or masked, and the share masked is
            the ratio drawn. `published`: as the authors' code does it, where masks are not symmetric and the
            real part is taken in the end, which halves most of what was to be masked and the power of the
            noise. The default is `hermitian`: the numbers of the settings then mean what they say.
        tile: side of the tiles of `histogram` and `zero`, in pixels.
        tile_ratio: range of the probability with which each tile is masked, drawn once for each image.
        cell: side of the cells of `frequency`, in bins.
        cell_ratio: range of the probability with which each cell is masked; the 4 around zero frequency stay.
        fill: what stands in masked cells: `tile`, noise with the mean and deviation of the pixels of the
            square at the same place of the image (the authors' code; near zero on the spectrum's scale, but
            its mean adds up to a bright spot at the first pixel), `zero`, or `by_mode`: `tile` in mode
            `published`, `zero` in mode `hermitian`.
        noise_strength: mean of the deviation of the noise that `frequency` adds at low frequencies, as a
            share of the spectrum's largest magnitude, at 512 pixels. At side S it is multiplied by 512 / S,
            which keeps the noise in the pixels as strong.
        noise_strength_std: deviation of that share between images.
        noise_width: range of the width of the noise's Gaussian envelope, as a share of the bins along a side.
        patch: side of the patches of `random_patches`, in pixels.
        patch_ratio: share of the patches that `random_patches` hides (MAE, arXiv 2111.06377), exactly.
        pass_radius: radius of the disc of `low_pass` and `high_pass`, in cycles per image side (MFM, arXiv
            2206.07706, at 224 pixels).
    """

    kinds: dict[KindName, Weight] = Field(default={"histogram": 0.5, "frequency": 0.5})
    mode: Mode = "hermitian"
    tile: int = Field(default=32, ge=1)
    tile_ratio: ShareRange = (0.5, 0.75)
    cell: int = Field(default=16, ge=1)
    cell_ratio: ShareRange = (0.5, 0.75)
    fill: Literal["by_mode", "tile", "zero"] = "by_mode"
    noise_strength: float = Field(default=5e-4, ge=0)
    noise_strength_std: float = Field(default=1e-4, ge=0)
    noise_width: PositiveRange = (0.15, 0.25)
    patch: int = Field(default=16, ge=1)
    patch_ratio: Share = 0.75
    pass_radius: float = Field(default=16, gt=0)

    @property
    def fills_tiles(self) -> bool:
        """Whether masked cells are filled by noise like that of the pixels."""
        return self.fill == "tile" or (self.fill == "by_mode" and self.mode == "published")

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        if not sum(self.kinds.values()) > 0:
            raise ValueError(f"'kinds' needs a weight above 0 for one of {', '.join(KINDS)}")
        return self


class Plan(NamedTuple):
    """What is drawn on the host for one image.

    Attributes:
        kind: of corruption.
        mask: (G, G) bool, true where a tile, patch or cell (in centered order) is masked; None for kinds
            without any.
        strength: deviation of the noise of `frequency` as a share of the spectrum's largest magnitude.
        width: of the noise's envelope, as a share of the bins along a side.
    """

    kind: KindName
    mask: NDArray[np.bool_] | None = None
    strength: float = 0.0
    width: float = 1.0


def num_tiles(size: int, tile: int) -> int:
    """Count the tiles along a side, a last cut one included."""
    return -(-size // tile)


def num_cells(size: int, cell: int) -> int:
    """Count the cells along a side of the spectrum, the cut ones at both ends included: an even number."""
    return 2 * num_tiles(size // 2, cell)


def check_size(size: int, config: CorruptionConfig) -> None:
    """Refuse image sizes in which a kind that can be drawn has nothing to hide or nothing to leave.

    Raises:
        ConfigError: the side is odd, or too small for the tiles, patches or cells of the settings.
    """
    if size < 2 or size % 2:
        raise ConfigError(f"images of {size} pixels cannot be corrupted", allowed="an even side")
    used = {kind for kind, weight in config.kinds.items() if weight > 0}
    limits: list[tuple[set[KindName], str, int, int]] = [
        ({"histogram", "zero"}, "tile", config.tile, size - 1),
        ({"random_patches"}, "patch", config.patch, size - 1),
        # two cells on each side of zero frequency: the inner ones stay, the outer ones can be masked
        ({"frequency"}, "cell", config.cell, (size - 1) // 2),
    ]
    for kinds, name, side, largest in limits:
        if used & kinds and side > largest:
            raise ConfigError(
                f"{name} {side} leaves nothing to choose from in images of {size} pixels",
                where=f"corruption.{name}",
                allowed=f"at most {largest} at this size",
                fix=f"make '{name}' smaller or the images larger",
            )


def plan_corruptions(draws: SampleDraws, config: CorruptionConfig, size: int, view: int = 0) -> list[Plan]:
    """Draw what each image of a batch undergoes.

    Args:
        draws: of the B samples.
        config: the settings.
        size: side of the images.
        view: numbers independent corruptions of one image.

    Returns:
        B plans.

    Raises:
        ConfigError: the settings do not fit the size.
    """
    check_size(size, config)
    return [_plan(rng, config, size) for rng in draws.generators(f"corruption {view}")]


def _plan(rng: np.random.Generator, config: CorruptionConfig, size: int) -> Plan:
    kind = _draw_kind(rng.random(), config.kinds)
    if kind in ("histogram", "zero"):
        ratio = rng.uniform(*config.tile_ratio)
        return Plan(kind, rng.random((num_tiles(size, config.tile),) * 2) < ratio)
    if kind == "random_patches":
        grid = num_tiles(size, config.patch)
        hidden = rng.permutation(grid * grid) < round(config.patch_ratio * grid * grid)
        return Plan(kind, hidden.reshape(grid, grid))
    if kind == "frequency":
        ratio = rng.uniform(*config.cell_ratio)
        strength = abs(rng.normal(config.noise_strength, config.noise_strength_std)) * 512 / size
        width = rng.uniform(*config.noise_width)
        grid = num_cells(size, config.cell)
        cells = rng.random((grid, grid)) < ratio
        cells[grid // 2 - 1 : grid // 2 + 1, grid // 2 - 1 : grid // 2 + 1] = False
        return Plan(kind, cells, strength, width)
    return Plan(kind)


def _draw_kind(uniform: float, weights: Mapping[KindName, float]) -> KindName:
    """Choose a kind by a number in [0, 1), whatever the order in which a config names them."""
    named = [kind for kind in KINDS if weights.get(kind, 0) > 0]
    edges = np.cumsum([weights[kind] for kind in named])
    place = int(np.searchsorted(edges, uniform * edges[-1], side="right"))
    return named[min(place, len(named) - 1)]
