"""Frozen encoders, whatever they come from, and the pooled features they give.

The feature of an image is the mean of its patch tokens after the final norm, the class token left out: what
RetMAE's loss works on and what an exported folder gives in timm.

Shapes: B batch, S image side, N patches, K patches kept, D width.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from frepa_dist.evaluate.views import Grid, read_pixels
from frepa_dist.models.init import read_weights
from frepa_dist.models.vit_mae import (
    VIT_SIZES,
    EncoderTrunk,
    create_vit_mae,
    gather_tokens,
    load_mae_checkpoint,
)
from frepa_dist.runs import CONFIG, load_student
from shards.formats.common import Pixels
from shards.support.errors import ConfigError, DataError, EnvironmentFault
from shards.support.progress import Progress

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SOURCES = (
    "a run folder, an exported folder, an official MAE checkpoint (.pth, .safetensors), "
    "timm:NAME, timm:NAME?pretrained, random:tiny|small|base|large[:SEED]"
)
BATCHES_AHEAD = 2  # decoded while the device works


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder.

    Attributes:
        name: the source it was loaded from, with the step of a run.
        pool: normalized images (B, 3, S, S) and patches to keep (B, K) or None -> (B, D).
        width: D.
        image_size: S.
        patch_size: side of a patch in pixels, None where the encoder has no tokens (a convolutional one).
        mean, std: of the channels, of images scaled to [0, 1].
        device: where it runs.
    """

    name: str
    pool: Callable[[Tensor, Tensor | None], Tensor]
    width: int
    image_size: int
    patch_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device

    @property
    def grid(self) -> Grid:
        """Side of images and patches.

        Raises:
            ConfigError: the encoder has no tokens.
        """
        if self.patch_size is None:
            raise ConfigError("this encoder has no tokens", where=self.name, allowed="a vision transformer")
        return Grid(self.image_size, self.patch_size)

    def normalize(self, images: Tensor) -> Tensor:
        """Scale images uint8 (B, 3, S, S) to the mean and spread that the encoder was made for."""
        mean, std = (torch.tensor(v, device=self.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (images.to(self.device).float() / 255 - mean) / std

    @torch.inference_mode()
    def embed(self, normalized: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Embed normalized images (B, 3, S, S), or only their patches `ids_keep` (B, K) -> (B, D) float32."""
        if ids_keep is not None:
            ids_keep = ids_keep.to(self.device)
        return self.pool(normalized.to(self.device), ids_keep).float()

    def encode(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Embed images uint8 (B, 3, S, S), or only their patches `ids_keep` (B, K) -> (B, D) float32."""
        return self.embed(self.normalize(images), ids_keep)


def load_encoder(source: str | Path, device: str | torch.device | None = None) -> Encoder:
    """Load a frozen encoder.

    Args:
        source: see `SOURCES`; a run gives its newest checkpoint.
        device: where it runs; None takes a GPU if there is one.

    Raises:
        ConfigError: the source is none of these, or names a model that does not exist.
        DataError: its weights are missing, damaged or do not fit.
        EnvironmentFault: pretrained weights cannot be fetched.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    text, path = str(source), Path(source)
    kind, _, rest = text.partition(":")
    if kind == "random" and not path.exists():
        return _load_random(text, rest, where)
    if kind == "timm" and not path.exists():
        return _load_timm(text, rest, where)
    if (path / CONFIG).is_file():
        student, config, step = load_student(path)
        settings = config.method.input
        return _from_mae(f"{text}, step {step}", student, settings.mean, settings.std, where)
    if (path / "config.json").is_file():
        return _load_folder(text, path, where)
    if path.is_file():
        return _load_mae_file(text, path, where)
    raise ConfigError("no encoder is there", where=source, allowed=SOURCES)


def _from_mae(
    name: str, model: EncoderTrunk, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> Encoder:
    model = model.eval().requires_grad_(False).to(device)
    return Encoder(name, model.embed, model.width, model.image_size, model.patch_size, mean, std, device)


def _load_random(source: str, rest: str, device: torch.device) -> Encoder:
    size, _, seed = rest.partition(":")
    if size not in VIT_SIZES or not (seed or "0").isdecimal():
        raise ConfigError("no such random encoder", where=source, allowed=SOURCES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed or 0))
        model = create_vit_mae(size)  # type: ignore[arg-type]
    return _from_mae(source, model, IMAGENET_MEAN, IMAGENET_STD, device)


def _load_mae_file(source: str, path: Path, device: torch.device) -> Encoder:
    """Load an official MAE or RETFound checkpoint; its size follows from the shapes."""
    weights = read_weights(path)
    try:
        width, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
        side = math.isqrt(weights["pos_embed"].shape[1] - 1)
        depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
        (size,) = [name for name, known in VIT_SIZES.items() if (known.width, known.depth) == (width, depth)]
    except (KeyError, ValueError, IndexError) as error:
        sizes = ", ".join(f"{name} ({s.width} wide, {s.depth} deep)" for name, s in VIT_SIZES.items())
        raise DataError("not the weights of an MAE vision transformer", where=path, allowed=sizes) from error
    model = create_vit_mae(size, image_size=side * patch_size, patch_size=patch_size)
    load_mae_checkpoint(model, path)
    return _from_mae(source, model, IMAGENET_MEAN, IMAGENET_STD, device)


def _load_folder(source: str, path: Path, device: torch.device) -> Encoder:
    """Load an exported folder, or any other one in timm's hub layout."""
    import timm

    try:
        model = timm.create_model(f"local-dir:{path}", pretrained=True)
    except Exception as error:  # timm, torch and safetensors raise what they like at a damaged folder
        raise DataError(f"not a folder that timm can load: {error}", where=path) from error
    return _from_timm(source, model, device)


def _load_timm(source: str, rest: str, device: torch.device) -> Encoder:
    import timm

    name, _, option = rest.partition("?")
    if option not in ("", "pretrained") or not timm.is_model(name):
        raise ConfigError(
            "timm has no such model", where=source, allowed=f"a name of timm.list_models(); {SOURCES}"
        )
    if not option:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _from_timm(source, timm.create_model(name, pretrained=False), device)
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # OSError, or an HTTP library's own errors, or RuntimeError: none published
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EnvironmentFault(
            f"its pretrained weights cannot be had: {reason}",
            where=source,
            fix="fetch them where there is a network, or name a model that has some",
        ) from error
    return _from_timm(source, model, device)


def _from_timm(name: str, model: nn.Module, device: torch.device) -> Encoder:
    from timm.data import resolve_model_data_config
    from timm.models.vision_transformer import VisionTransformer

    model.reset_classifier(0)  # type: ignore[operator]
    model = model.eval().requires_grad_(False).to(device)
    wanted = resolve_model_data_config(model)
    is_vit = type(model) is VisionTransformer

    def pool(images: Tensor, ids_keep: Tensor | None) -> Tensor:
        if is_vit:
            return _pool_timm_vit(model, images, ids_keep)
        if ids_keep is not None:
            raise ConfigError(
                "this encoder has no tokens to choose from", where=name, allowed="a vision transformer"
            )
        return model(images)  # type: ignore[no-any-return]

    patch_size = model.patch_embed.patch_size[0] if is_vit else None  # type: ignore[union-attr, index]
    size, mean, std = wanted["input_size"][-1], wanted["mean"], wanted["std"]
    return Encoder(name, pool, model.num_features, size, patch_size, tuple(mean), tuple(std), device)  # type: ignore[arg-type]


def _pool_timm_vit(model: Any, images: Tensor, ids_keep: Tensor | None) -> Tensor:
    """Mean patch token of timm's `VisionTransformer`, encoding only some patches if so wished."""
    tokens = model._pos_embed(model.patch_embed(images))
    num_prefix = model.num_prefix_tokens
    if ids_keep is not None:
        tokens = torch.cat([tokens[:, :num_prefix], gather_tokens(tokens[:, num_prefix:], ids_keep)], dim=1)
    tokens = model.norm(model.blocks(model.norm_pre(tokens)))
    return model.fc_norm(tokens[:, num_prefix:].mean(dim=1))  # type: ignore[no-any-return]


def extract_features(
    encoder: Encoder, paths: Sequence[Path], *, batch_size: int = 64, description: str = "features"
) -> npt.NDArray[np.float32]:
    """Embed image files.

    Args:
        encoder: the encoder.
        paths: n files.
        batch_size: images at a time.
        description: of the progress bar.

    Returns:
        (n, D).

    Raises:
        DataError: a file cannot be read, or a feature is not finite.
    """
    features = np.empty((len(paths), encoder.width), np.float32)
    done = 0
    with Progress(len(paths), description) as progress:
        for images in _decode_ahead(paths, encoder.image_size, batch_size):
            features[done : done + len(images)] = encoder.encode(images).cpu().numpy()
            done += len(images)
            progress.update(len(images))
    if not np.isfinite(features).all():
        raise DataError(
            "the features hold NaN or infinity", where=encoder.name, fix="use an earlier checkpoint"
        )
    return features


def _decode_ahead(paths: Sequence[Path], size: int, batch_size: int) -> Iterator[Tensor]:
    """Decode files in threads (the decoders release the interpreter's lock), a bounded number ahead."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        waiting: deque[list[Future[Pixels]]] = deque()
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            waiting.append([pool.submit(read_pixels, path, size) for path in batch])
            if len(waiting) > BATCHES_AHEAD:
                yield _stack(waiting.popleft())
        while waiting:
            yield _stack(waiting.popleft())


def _stack(images: Sequence[Future[Pixels]]) -> Tensor:
    return torch.from_numpy(np.stack([future.result() for future in images]))
