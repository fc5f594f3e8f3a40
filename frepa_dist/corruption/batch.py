"""Corrupt the images of a batch, each by its own draws and at its own cost.

Shapes: B batch, C channels, S image side, W = S // 2 + 1, b images of one kind in one go.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from frepa_dist.corruption.frequency import FrequencyDraws, disc_pass, dual_component_masking
from frepa_dist.corruption.plan import CorruptionConfig, KindName, Plan, plan_corruptions
from frepa_dist.corruption.tiles import noise_masking, spread_tiles, zero_masking
from frepa_dist.draws import SampleDraws
from shards.support.errors import ConfigError

# on a CPU one image of 512 pixels fills the cache; elsewhere a chunk bounds the memory for spectra (0.4 GB)
CPU_CHUNK = 1
DEVICE_CHUNK = 32


class Corrupted(NamedTuple):
    """Images after `corrupt`.

    Attributes:
        images: (B, C, S, S) float32, not clipped to [0, 1].
        kind: what each image underwent; B names, on the host.
        hidden: (B, 1, S, S) bool, the pixels that were replaced; all where frequencies were.
    """

    images: Tensor
    kind: list[str]
    hidden: Tensor


@torch.no_grad()
def corrupt(images: Tensor, draws: SampleDraws, config: CorruptionConfig, *, view: int = 0) -> Corrupted:
    """Corrupt each image in one way, drawn by its key: the same whatever batch it is in.

    Computes in float32 whatever autocast surrounds it, without gradient, and never waits for the device.

    Args:
        images: (B, C, S, S) in [0, 1], on the device of `draws`; S even.
        draws: of the B samples.
        config: kinds and their numbers.
        view: numbers independent corruptions of one image.

    Raises:
        ConfigError: the images are not square, or their side does not fit the settings.
    """
    if images.ndim != 4 or images.shape[-1] != images.shape[-2]:
        raise ConfigError(f"images of shape {tuple(images.shape)} are not square", allowed="(B, C, S, S)")
    assert len(images) == len(draws)
    plans = plan_corruptions(draws, config, images.shape[-1], view)
    groups: dict[KindName, list[int]] = defaultdict(list)
    for i, plan in enumerate(plans):
        groups[plan.kind].append(i)
    images = images.float()
    result = torch.empty_like(images, memory_format=torch.contiguous_format)
    hidden = torch.empty((len(images), 1, *images.shape[-2:]), dtype=torch.bool, device=images.device)
    chunk = CPU_CHUNK if images.device.type == "cpu" else DEVICE_CHUNK
    with torch.autocast(images.device.type, enabled=False):
        for kind, members in groups.items():
            for start in range(0, len(members), chunk):
                indices = members[start : start + chunk]
                rows = _index(indices, images.device)
                chosen = [plans[i] for i in indices]
                room = result[rows] if isinstance(rows, slice) else None  # a view, written in place
                args = (images[rows], chosen, draws.select(indices), config, view, room)
                done, hidden[rows] = _corrupt_kind(kind, *args)
                if done is not room:
                    result[rows] = done
    return Corrupted(result, [plan.kind for plan in plans], hidden)


def _corrupt_kind(
    kind: KindName,
    images: Tensor,
    plans: Sequence[Plan],
    draws: SampleDraws,
    config: CorruptionConfig,
    view: int,
    room: Tensor | None,
) -> tuple[Tensor, Tensor | bool]:
    """Corrupt images (b, C, S, S) that all take one kind, in `room` where that is given and serves.

    The second value says which pixels were hidden.
    """
    if kind == "none":
        return images, False
    if kind == "frequency":
        numbers = draw_frequency(plans, draws, images.shape[1:], config, view)
        return dual_component_masking(images, numbers, config.cell, config.mode), True
    if kind in ("low_pass", "high_pass"):
        return disc_pass(images, config.pass_radius, "low" if kind == "low_pass" else "high"), True
    mask = to_device(_masks(plans), images.device)
    tile = config.patch if kind == "random_patches" else config.tile
    if kind == "histogram":
        noise = draws.normal(f"corruption {view} tiles", images.shape[1:], out=room)
        masked = noise_masking(images, mask, noise, tile)
    else:
        masked = zero_masking(images, mask, tile)
    return masked, spread_tiles(mask, tile, images.shape[-1])[:, None]


def draw_frequency(
    plans: Sequence[Plan], draws: SampleDraws, shape: Sequence[int], config: CorruptionConfig, view: int = 0
) -> FrequencyDraws:
    """Draw the numbers of `dual_component_masking` for images of shape (C, S, S)."""
    channels, size, _ = shape
    half = (channels, size, size // 2 + 1)
    noise = draws.normal(f"corruption {view} noise", (*half, 2 if config.mode == "hermitian" else 1))
    fill = draws.normal(f"corruption {view} fill", half) if config.fills_tiles else None
    numbers = np.array([(plan.strength, plan.width) for plan in plans], dtype=np.float32)
    strength, width = to_device(numbers, draws.device).unbind(1)
    return FrequencyDraws(to_device(_masks(plans), draws.device), strength, width, noise, fill)


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Copy an array to a device without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # only a copy from pinned memory does not wait
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _masks(plans: Sequence[Plan]) -> NDArray[np.bool_]:
    return np.stack([plan.mask for plan in plans if plan.mask is not None])


def _index(indices: Sequence[int], device: torch.device) -> Tensor | slice:
    """Index rows by a view where they follow one another."""
    if list(indices) == list(range(indices[0], indices[0] + len(indices))):
        return slice(indices[0], indices[0] + len(indices))
    return to_device(np.array(indices, dtype=np.int64), device)
