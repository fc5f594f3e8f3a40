"""What the tests of the loader share: a small stream, and its batches as a method sees them."""

from __future__ import annotations

from pathlib import Path

import torch

from shards.read.order import OrderConfig
from shards.read.stream import MicroBatch, SampleStream, StreamConfig
from shards.read.windows import to_unit_range

ORDER = OrderConfig(global_batch_size=8, num_streams=4, block_shards=2, seed=5)


def stream_of(root: Path, rank: int = 0, world_size: int = 1, micro: int = 2, **settings) -> SampleStream:
    config = StreamConfig(root=str(root), image_size=32, patch_size=8, **settings)
    return SampleStream(config, ORDER, rank, world_size, micro)


def join(micro_batches: list[MicroBatch]) -> dict[str, torch.Tensor | list[str]]:
    """One global batch of its micro-batches, the images as a method sees them."""
    tensors = ("window", "hf_indices", "mask_noise", "position", "slot")
    joined = {name: torch.cat([m[name] for m in micro_batches]) for name in tensors}
    joined["image"] = torch.cat([to_unit_range(m["image"], m["window"]) for m in micro_batches])
    return joined | {"key": [key for m in micro_batches for key in m["key"]]}


def images_by_key(batches: list[list[MicroBatch]]) -> dict[str, torch.Tensor]:
    joined = [join(batch) for batch in batches]
    return {key: image for b in joined for key, image in zip(b["key"], b["image"], strict=True)}


def assert_equal(one: list[list[MicroBatch]], other: list[list[MicroBatch]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(map(join, one), map(join, other), strict=True):
        assert a["key"] == b["key"]
        for name, tensor in a.items():
            assert name == "key" or torch.equal(tensor, b[name]), name
