"""Restoration with a frozen encoder: a light decoder learns clean images from the maps of degraded ones.

By default everything has to go through the encoder: the decoder does not see the degraded image. So the
result says how much fine detail the maps hold, and may well be worse than the degraded image itself, which
stands beside it. With `skip` the decoder sees the degraded image too and learns what to change in it; then
most of what is won is the decoder's own, and only the difference to another encoder says something. In both
cases the control is the same decoder on a random encoder.

An encoder that scales each image to [0, 1] by its own range cannot know that range: it is given back.

Shapes: H, W of an image, T tiles, S side of a tile, D width, h = w = S / stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from frepa_dist.evaluate.degrade import Degradation, crop_to_even, degrade, is_grey
from frepa_dist.evaluate.dense import (
    choose_corners,
    encode_maps,
    predict_image,
    train_on_tiles,
    with_mirrored,
)
from frepa_dist.evaluate.encoder import Encoder
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.heads import seeded
from frepa_dist.evaluate.image_measures import (
    ImageResult,
    mean_over_images,
    name_test,
    shown_places,
    summarize,
    values_by_image,
)
from frepa_dist.evaluate.leakage import check_split
from frepa_dist.evaluate.overlays import Gallery, to_picture
from frepa_dist.evaluate.pairs import load_image, number_patients, read_patients, read_split
from frepa_dist.evaluate.restore_head import RestoreHead, RestoreTraining
from frepa_dist.evaluate.tiles import cut_tiles
from shards.formats.common import Pixels
from shards.read.draws import sample_rng
from shards.support.progress import track


class RestoreResult(ImageResult):
    """What a decoder on a frozen encoder restores.

    Its measures are psnr (decibel), ssim, and rmse (of values in [0, 1]); the psnr is None where the
    restoration equals the image.

    Attributes:
        degradation: what was done to the images.
        degraded_by_image: the measures of the degraded images as they are: the trivial baseline.
        degraded: the means of the baseline.
        num_parameters: of the decoder.
        training: how.
    """

    degradation: Degradation
    degraded_by_image: dict[str, list[float | None]]
    degraded: dict[str, float]
    num_parameters: int
    training: RestoreTraining

    def describe(self) -> str:
        """A few lines for the terminal."""
        sees = "sees the degraded image too" if self.training.skip else "sees the encoder's maps alone"
        lines = [
            f"{self.degradation}; {len(self.names)} test images, {self.num_train} to learn from; the decoder "
            f"{sees}; mean, 95% interval"
        ]
        for name, mean in self.mean.items():
            lines.append(
                f"{name:<5} {mean:7.3f}  [{self.low[name]:.3f}, {self.high[name]:.3f}]  "
                f"the degraded image {self.degraded.get(name, float('nan')):.3f}"
            )
        lines.append(f"leakage: {self.leakage}")
        return "\n".join(lines)


class Tiles(NamedTuple):
    """Training tiles, half of them mirrored.

    Attributes:
        maps: (2 T, D, h, w) float16, of the degraded tiles.
        seen: (2 T, 3, S, S) uint8, the degraded tiles.
        clean: (2 T, 3, S, S) uint8.
    """

    maps: Tensor
    seen: Tensor
    clean: Tensor


def run_restore(
    encoder: str,
    images: Path,
    table: Path | None = None,
    *,
    degradation: Degradation | None = None,
    training: RestoreTraining | None = None,
    num_resamples: int = 1000,
    device: str | None = None,
    gallery: Gallery | None = None,
    chosen: Sequence[int] | None = None,
    allow_leakage: bool = False,
    states: Sequence[Path] = (),
) -> RestoreResult:
    """Train a decoder of images on a frozen encoder, and judge it on images it has not seen.

    Args:
        encoder: see `features.SOURCES`.
        images: folder of the images.
        table: which images, and on which side of the split (see `pairs.read_split`).
        degradation: what is to be undone.
        training: how the decoder is trained; its seed is that of the noise too.
        num_resamples: of the bootstrap.
        device: where it runs, None takes a GPU if there is one.
        gallery: where pictures of the best, the median and the worst test image (by PSNR) are put.
        chosen: places of the test images to put there instead.
        allow_leakage: go on where images were in the run's pretraining data; the result says so.
        states: private folders of the builds of those data, see `leakage.check_leakage`.

    Raises:
        FrepaError: what is wrong with encoder or images.
    """
    degradation, training = degradation or Degradation(), training or RestoreTraining()
    split = read_split(images, table, seed=training.seed)
    to_learn, to_test = (
        _choose([path for path, is_test in split if is_test == part], training, part)
        for part in (False, True)
    )
    used = [*((path, False) for path in to_learn), *((path, True) for path in to_test)]
    leakage = check_split(encoder, used, images, table, allow=allow_leakage, states=states)
    loaded = load_encoder(encoder, device)
    head = train_restorer(loaded, to_learn, degradation, training)
    first = len(to_learn)  # noise is numbered on, so that no test image has that of a training image
    rows, baseline = [], []
    for number, path in track(enumerate(to_test), total=len(to_test), description="restore", unit="image"):
        clean, seen = load_pair(path, degradation, training, first + number)
        rows.append(image_measures(restore_image(loaded, head, seen), clean))
        baseline.append(image_measures(seen, clean))
    groups = number_patients(read_patients(images, table, to_test))
    measures = summarize(rows, num_resamples, training.seed, groups)
    if gallery is not None:
        for word, place in shown_places(measures["by_image"]["psnr"], chosen):
            clean, seen = load_pair(to_test[place], degradation, training, first + place)
            gallery.append(
                [
                    (to_picture(seen), f"degraded: {_words(baseline[place])}"),
                    (to_picture(restore_image(loaded, head, seen)), f"{word}{_words(rows[place])}"),
                    (to_picture(clean), f"clean: {name_test(place)}"),
                ]
            )
    return RestoreResult(
        encoder=loaded.name,
        images=str(images),
        degradation=degradation,
        names=[path.name for path in to_test],
        **measures,
        degraded_by_image=values_by_image(baseline),
        degraded=mean_over_images(baseline),
        num_train=len(to_learn),
        num_parameters=sum(parameter.numel() for parameter in head.parameters()),
        training=training,
        leakage=leakage,
        groups=groups,
    )


def _choose(paths: Sequence[Path], training: RestoreTraining, is_test: bool) -> list[Path]:
    if len(paths) <= training.max_images:
        return list(paths)
    rng = sample_rng(training.seed, 0, int(is_test), "images to restore")
    return [paths[place] for place in np.sort(rng.choice(len(paths), training.max_images, replace=False))]


def _words(row: dict[str, float]) -> str:
    return f"{row['psnr']:.2f} dB, SSIM {row['ssim']:.3f}"


def load_pair(
    path: Path, degradation: Degradation, training: RestoreTraining, number: int
) -> tuple[Pixels, Pixels]:
    """An image and its degraded copy, (3, H, W) each, of even sides.

    Raises:
        DataError: it cannot be read.
    """
    clean = crop_to_even(load_image(path, training.short_side))
    return clean, degrade(clean, degradation, training.seed, number)


def train_restorer(
    encoder: Encoder, paths: Sequence[Path], degradation: Degradation, training: RestoreTraining
) -> RestoreHead:
    """Train the decoder on the maps of degraded images.

    Raises:
        ConfigError: the encoder has no maps.
        DataError: an image cannot be read.
        DivergedError: the loss is no number.
    """
    shown = track(enumerate(paths), total=len(paths), description="encode", unit="image")
    tiling = training.share_tiles(len(paths))
    parts = [
        encode_tiles(encoder, *load_pair(path, degradation, training, number), tiling, number)
        for number, path in shown
    ]
    tiles = Tiles(*(torch.cat(column) for column in zip(*parts, strict=True)))
    stride = tiles.clean.shape[-1] // tiles.maps.shape[-1]
    with seeded(training.seed, encoder.device):
        head = RestoreHead(tiles.maps.shape[1], stride, training, gives_range=encoder.min_max)
        head.standardize_by(tiles.seen)
        head.to(encoder.device)

        def loss_of(maps: Tensor, seen: Tensor, clean: Tensor) -> Tensor:
            return functional.l1_loss(head(maps, seen), clean / 255)

        train_on_tiles(head, tiles, loss_of, training, encoder.device)
    return head


def encode_tiles(
    encoder: Encoder, clean: Pixels, seen: Pixels, training: RestoreTraining, number: int
) -> Tiles:
    """Tiles of a training image (3, H, W) and its degraded copy, each also mirrored."""
    corners = choose_corners((clean.shape[1], clean.shape[2]), encoder.image_size, training, number)
    given, wanted = (with_mirrored(cut_tiles(image, corners, encoder.image_size)) for image in (seen, clean))
    return Tiles(encode_maps(encoder, given).half(), given, wanted)


def restore_image(encoder: Encoder, head: RestoreHead, seen: Pixels) -> Pixels:
    """Restore a degraded image (3, H, W); a grey one stays grey."""
    values = predict_image(encoder, head, seen)
    if is_grey(seen):
        values = np.broadcast_to(values.mean(axis=0), values.shape)
    restored: Pixels = np.clip(np.round(values * 255), 0, 255).astype(np.uint8)
    return restored


def image_measures(restored: Pixels, clean: Pixels) -> dict[str, float]:
    """PSNR, SSIM (with the Gaussian window of Wang et al. 2004) and RMSE of (3, H, W), by scikit-image.

    Returns:
        psnr in decibel, NaN for equal images, which have none; ssim; rmse of values in [0, 1].
    """
    from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

    if is_grey(clean) and is_grey(restored):
        clean, restored = clean[0], restored[0]
    mse = float(mean_squared_error(clean, restored))
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    similarity = structural_similarity(
        clean, restored, data_range=255, channel_axis=0 if clean.ndim == 3 else None, **window
    )
    return {
        "psnr": float(peak_signal_noise_ratio(clean, restored, data_range=255)) if mse else float("nan"),
        "ssim": float(similarity),
        "rmse": mse**0.5 / 255,
    }
