"""Dense tasks on a frozen encoder: tiles of images, their maps, and a light decoder that learns on these.

Images keep their size, or are resized to a short side, and are cut into overlapping tiles of the size that
the encoder was made for; each tile is encoded once, and again mirrored, before anything is trained. What is
predicted for tiles is put together again to whole images.

Shapes: H, W of an image, T tiles, S side of a tile, D width, h = w = S / stride, K maps predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn

from frepa_dist.evaluate.encoder import Encoder
from frepa_dist.evaluate.heads import HeadTraining, run_steps
from frepa_dist.evaluate.scores import Int64
from frepa_dist.evaluate.tiles import Corners, cut_tiles, merge_tiles, tile_corners
from shards.formats.common import Pixels
from shards.read.draws import sample_rng
from shards.support.errors import ConfigError

TILES_AT_ONCE = 16

Decode = Callable[[Tensor, Tensor], Tensor]
"""From maps (n, D, h, w) and their tiles uint8 (n, 3, S, S) to what is predicted of them, (n, K, S, S)."""


class DenseTraining(HeadTraining):
    """How a decoder is trained; its items are tiles.

    Attributes:
        short_side: pixels that images are resized to; None keeps their size.
        max_tiles: tiles of a training image, drawn at random where it has more.
        max_all_tiles: of all training images together, as many of each (at least one): bounds the memory.
        head_width: channels of the decoder's first layer.
    """

    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    short_side: int | None = Field(default=None, ge=32)
    max_tiles: int = Field(default=32, ge=1)
    max_all_tiles: int = Field(default=8192, ge=1)
    head_width: int = Field(default=64, ge=8)

    def share_tiles(self, num_images: int) -> Self:
        """The same, with a `max_tiles` that so many images can all have."""
        share = max(1, self.max_all_tiles // num_images)
        return self.model_copy(update={"max_tiles": min(self.max_tiles, share)})


def choose_corners(shape: tuple[int, int], side: int, training: DenseTraining, number: int) -> Corners:
    """Place the tiles of a training image (H, W); which ones are drawn depends on the image's number."""
    corners = tile_corners(*shape, side)
    if len(corners) > training.max_tiles:
        rng = sample_rng(training.seed, 0, number, "tiles")
        corners = corners[np.sort(rng.choice(len(corners), training.max_tiles, replace=False))]
    return corners


def with_mirrored(tiles: npt.NDArray[Any]) -> Tensor:
    """Tiles (T, ..., S, S), and all of them mirrored left to right, (2 T, ..., S, S)."""
    return torch.from_numpy(np.concatenate([tiles, tiles[..., ::-1]]))


@torch.inference_mode()
def encode_maps(encoder: Encoder, tiles: Tensor) -> Tensor:
    """Maps (T, D, h, w) float32 of tiles uint8 (T, 3, S, S), on the host.

    Raises:
        ConfigError: the encoder has no maps.
    """
    if encoder.map is None:
        raise ConfigError("this encoder gives no maps", where=encoder.name, fix="take one that does")
    parts = [encoder.map(encoder.normalize(part)).float().cpu() for part in torch.split(tiles, TILES_AT_ONCE)]
    return torch.cat(parts)


def train_on_tiles(
    head: nn.Module,
    columns: Sequence[Tensor],
    loss_of: Callable[..., Tensor],
    training: DenseTraining,
    device: torch.device,
) -> None:
    """Train a decoder on tiles that lie on the host.

    Args:
        head: what learns; it is on the device.
        columns: tensors of 2 T rows each: maps, targets, and what else the loss needs.
        loss_of: of some rows of all columns, as float32 on the device, a 0-dim loss.
        training: how.
        device: where.

    Raises:
        DivergedError: the loss is no number.
    """

    def step(chosen: Int64, _: np.random.Generator) -> Tensor:
        places = torch.from_numpy(chosen)
        return loss_of(*(column[places].to(device).float() for column in columns))

    run_steps([head], step, np.arange(len(columns[0])), training, "decoder")


@torch.inference_mode()
def predict_image(encoder: Encoder, decode: Decode, image: Pixels) -> npt.NDArray[np.float32]:
    """Predict maps (K, H, W) of an image (3, H, W), tile by tile."""
    shape, side = (image.shape[1], image.shape[2]), encoder.image_size
    corners = tile_corners(*shape, side)
    tiles = torch.from_numpy(cut_tiles(image, corners, side))
    maps = encode_maps(encoder, tiles)
    parts = [
        decode(some.to(encoder.device), seen.to(encoder.device)).cpu()
        for some, seen in zip(
            torch.split(maps, TILES_AT_ONCE), torch.split(tiles, TILES_AT_ONCE), strict=True
        )
    ]
    return merge_tiles(torch.cat(parts).numpy(), corners, shape)
