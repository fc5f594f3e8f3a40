"""Fine-tuning: the encoder learns too, with a linear head on its pooled feature.

As in MAE's and RETFound's recipes: AdamW, a learning rate that falls from layer to layer toward the input
(Clark et al., arXiv 2003.10555), drop path, half a cosine after a warm-up. Their augmentations are stronger.

Shapes: B batch, S image side, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from frepa_dist.evaluate.encoder import Encoder
from frepa_dist.evaluate.heads import HeadTraining, run_steps, seeded
from frepa_dist.evaluate.pictures import Pictures
from frepa_dist.evaluate.scores import Float64, Int64
from shards.support.errors import ConfigError
from shards.support.progress import Progress

# of the masked autoencoder; timm's own networks know their layers
MAE_LAYERS = {
    "stem": r"^cls_token|pos_embed|patch_embed",
    # the norm belongs to the last block; the decoder learns nothing, and is named to be no further layer
    "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|decoder|mask_token", (99999,))],
}


class FineTuning(HeadTraining):
    """How an encoder is fine-tuned; no public source states all of these.

    Attributes:
        learning_rate: of the head.
        encoder_learning_rate: of the encoder's last layer.
        layer_decay: each layer nearer to the input learns by this factor more slowly.
        drop_path: largest probability that a residual branch is left out, rising with depth.
        min_area: of the random crop, as a share of the view; 1 crops nothing.
        flip: mirror every second view.
        brightness: views are made brighter or darker by up to this share.
        balanced: weigh classes in the loss as if all had as many images.
    """

    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    encoder_learning_rate: float = Field(default=5e-4, gt=0)
    layer_decay: float = Field(default=0.65, gt=0, le=1)
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    min_area: float = Field(default=0.7, gt=0, le=1)
    flip: bool = True
    brightness: float = Field(default=0.1, ge=0, lt=1)
    balanced: bool = False


class FineTuned(NamedTuple):
    """An encoder and a head that have learned.

    Attributes:
        encoder: the same object as was given, with other weights, frozen again.
        head: (B, D) -> (B, K).
        num_parameters: that had a gradient.
    """

    encoder: Encoder
    head: nn.Module
    num_parameters: int


def finetune(
    encoder: Encoder, pictures: Pictures, chosen: Int64, y: Int64, num_classes: int, training: FineTuning
) -> FineTuned:
    """Train an encoder in place, and a head on it.

    Args:
        encoder: with its parameters.
        pictures: all of them.
        chosen: numbers of those to learn from.
        y: classes of all pictures.
        num_classes: K.
        training: how.

    Raises:
        ConfigError: the encoder does not show its weights, or its layers are not known.
        DataError: a picture cannot be read.
        DivergedError: the loss is no number.
    """
    module = encoder.module
    if module is None:
        raise ConfigError("this encoder does not show its weights", where=encoder.name)
    scales = layer_scales(module, training.layer_decay, encoder.name)
    weights = class_weights(y[chosen], num_classes).to(encoder.device) if training.balanced else None
    module.requires_grad_(True)
    set_drop_path(module, training.drop_path)
    with seeded(training.seed, encoder.device):
        layer = nn.Linear(encoder.width, num_classes)
        nn.init.trunc_normal_(layer.weight, std=0.01)
        head = nn.Sequential(nn.LayerNorm(encoder.width), layer).to(encoder.device)

        def loss_of(numbers: Int64, rng: np.random.Generator) -> Tensor:
            pixels = torch.from_numpy(pictures.pixels(numbers.tolist(), encoder.image_size))
            views = augment(pixels.to(encoder.device), rng, training)
            logits = head(encoder.pool(encoder.normalize(views), None).float())
            return functional.cross_entropy(logits, torch.from_numpy(y[numbers]).to(encoder.device), weights)

        run_steps([head, module], loss_of, chosen, training, "fine-tune", slow=[module], scales=scales)
    learned = [p for part in (head, module) for p in part.parameters() if p.grad is not None]
    num_parameters = sum(parameter.numel() for parameter in learned)
    module.zero_grad(set_to_none=True)
    module.requires_grad_(False)
    set_drop_path(module, 0.0)
    return FineTuned(encoder, head, num_parameters)


@torch.inference_mode()
def predict(tuned: FineTuned, pictures: Pictures, chosen: Int64, batch_size: int = 64) -> Float64:
    """Logarithms (n, K) of the probabilities of classes, of pictures without augmentation.

    Raises:
        DataError: a picture cannot be read.
    """
    found = []
    with Progress(len(chosen), "test") as progress:
        for start in range(0, len(chosen), batch_size):
            numbers = chosen[start : start + batch_size].tolist()
            pixels = torch.from_numpy(pictures.pixels(numbers, tuned.encoder.image_size))
            logits = tuned.head(tuned.encoder.encode(pixels)).double()
            found.append(logits.log_softmax(dim=1).cpu().numpy())
            progress.update(len(numbers))
    return np.concatenate(found)


def layer_scales(module: nn.Module, decay: float, where: str) -> dict[int, float]:
    """Factor of the learning rate of each parameter, by its `id`: 1 in the last layer.

    Args:
        module: the encoder.
        decay: from a layer to the one before.
        where: name of the encoder, for errors.

    Raises:
        ConfigError: the layers are not known, and decay is wanted.
    """
    from timm.models import group_parameters

    trunk: nn.Module = getattr(module, "trunk", module)
    own = getattr(trunk, "group_matcher", None)
    layers: Mapping[str, int] = group_parameters(
        trunk, MAE_LAYERS if own is None else own(coarse=False), reverse=True
    )
    last = max(layers.values())
    if last == 0 and decay < 1:
        raise ConfigError(
            "the layers of this encoder are not known", where=where, fix="fine-tune with layer_decay=1"
        )
    return {id(p): decay ** (last - layers.get(name, last)) for name, p in trunk.named_parameters()}


def set_drop_path(module: nn.Module, rate: float) -> None:
    """Leave residual branches out at random in training, at a rate that rises from 0 to `rate` with depth.

    It reaches timm's blocks, which are all that our networks are made of; others stay as they are, and so do
    those of a decoder: it does not run, and is no depth of the encoder.
    """
    from timm.layers import DropPath

    blocks = []
    for path, parent in module.named_modules():
        if "decoder" in path:
            continue
        names = [name for name, child in parent.named_children() if _is_drop_path(name, child, DropPath)]
        if names:
            blocks.append((parent, names))
    for depth, (parent, names) in enumerate(blocks):
        share = rate * depth / max(1, len(blocks) - 1)
        for name in names:
            setattr(parent, name, DropPath(share) if share else nn.Identity())


def _is_drop_path(name: str, child: nn.Module, kind: type[nn.Module]) -> bool:
    return name.startswith("drop_path") and isinstance(child, kind | nn.Identity)


def class_weights(y: Int64, num_classes: int) -> Tensor:
    """Weight (K,) float32 of each class, in inverse proportion to its images; their mean over images is 1."""
    counts = np.bincount(y, minlength=num_classes)
    return torch.from_numpy((len(y) / (num_classes * np.maximum(counts, 1))).astype(np.float32))


def augment(pixels: Tensor, rng: np.random.Generator, training: FineTuning) -> Tensor:
    """Crop, mirror and lighten views at random.

    Args:
        pixels: (B, 3, S, S) uint8.
        rng: of the step.
        training: how much.

    Returns:
        (B, 3, S, S) float32 in [0, 1].
    """
    num = len(pixels)
    side = np.sqrt(rng.uniform(training.min_area, 1, num))
    shift = rng.uniform(-1, 1, (2, num)) * (1 - side)  # never beyond the border
    mirror = np.where(rng.random(num) < 0.5, -1, 1) if training.flip else np.ones(num)
    light = rng.uniform(1 - training.brightness, 1 + training.brightness, num)
    theta = np.zeros((num, 2, 3), np.float32)
    theta[:, 0, 0], theta[:, 0, 2] = side * mirror, shift[0]
    theta[:, 1, 1], theta[:, 1, 2] = side, shift[1]
    grid = functional.affine_grid(torch.from_numpy(theta).to(pixels.device), list(pixels.shape), False)
    views = functional.grid_sample(
        pixels.float() / 255, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    factor = torch.from_numpy(light.astype(np.float32)).to(pixels.device)
    return (views * factor[:, None, None, None]).clamp(0, 1)
