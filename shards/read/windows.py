"""Windows: which stored values are shown as black and as white.

Images travel to the device as they are stored, 8-bit pictures as uint8 and CT as int16 Hounsfield units (HU);
`to_unit_range` makes both the same there.

Shapes: B images of a micro-batch, C channels (1 or 3), S side of a view in pixels.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from shards.formats.intensity import scale_to_8_bit
from shards.support.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

WindowName = Literal["lung", "soft_tissue", "bone", "brain", "full"]

CT_WINDOWS = MappingProxyType(
    {
        "lung": (-600.0, 1500.0),
        "soft_tissue": (40.0, 400.0),
        "bone": (400.0, 1800.0),
        "brain": (40.0, 80.0),
        "full": (0.0, 2000.0),
    }
)
"""Level and width in HU: common clinical windows, such as Radiopaedia's "Windowing (CT)" lists them (customs
differ from place to place); `full` holds everything between air and hard bone."""

REFERENCE_WINDOW = (-1000.0, 1000.0)
"""`full` as lowest and highest value: what is shown wherever nothing is drawn at random."""

BYTE_WINDOW = (0.0, 255.0)


class WindowConfig(Settings):
    """How the window of a CT view is drawn.

    Attributes:
        names: windows of `CT_WINDOWS`, each as likely as any other; one that is named twice, twice as likely.
        level_jitter: the level moves by up to this share of the width, up or down.
        width_jitter: the width is multiplied by up to 1 + this, or divided by it.
    """

    names: tuple[WindowName, ...] = Field(
        default=("lung", "soft_tissue", "bone", "brain", "full"), min_length=1
    )
    level_jitter: float = Field(default=0.1, ge=0, le=1)
    width_jitter: float = Field(default=0.2, ge=0, le=1)


def draw_window(rng: np.random.Generator, config: WindowConfig) -> tuple[float, float]:
    """Draw a window; the number of draws from `rng` is the same in every case.

    Args:
        rng: the generator of the sample (`shards.read.draws.sample_rng`).
        config: which windows.

    Returns:
        The values in HU that become 0 and 1.
    """
    which = int(rng.integers(len(config.names)))
    up, wider = rng.uniform(-1, 1, size=2)
    level, width = CT_WINDOWS[config.names[which]]
    level += up * config.level_jitter * width
    width *= math.exp(wider * math.log1p(config.width_jitter))
    return level - width / 2, level + width / 2


def to_unit_range(image: Tensor, window: Tensor) -> Tensor:
    """Scale stored values to [0, 1] by each image's window, and repeat grey; nothing waits for the device.

    Args:
        image: (B, C, S, S), uint8 or int16.
        window: (B, 2) float32, the values that become 0 and 1; what lies outside is clipped.

    Returns:
        (B, 3, S, S) float32, exactly value / 255 for the window (0, 255). Grey planes share their memory, so
        that it must not be written to.
    """
    low, high = window[:, 0, None, None, None], window[:, 1, None, None, None]
    scaled = image.float().sub_(low).div_(high - low).clamp_(0, 1)
    return scaled.expand(-1, 3, -1, -1)


def to_bytes(pixels: NDArray[Any], window: tuple[float, float] = REFERENCE_WINDOW) -> NDArray[np.uint8]:
    """Show int16 pixels of any shape as 8-bit ones; those that are 8-bit already stay."""
    return pixels if pixels.dtype == np.uint8 else scale_to_8_bit(pixels, window)
