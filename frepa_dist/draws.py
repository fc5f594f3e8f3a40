"""Random draws of training samples, keyed by (draw key, purpose) and by nothing else.

A sample's draws do not depend on the batch, the rank or the order in which it is met, and there is no state
to save. Small draws (which corruption, which cells) come from a counter-based generator on the host, so that
they are known without waiting for the device and are the same on every device. Large ones (noise) are made
where they are needed: torch has no generator with a key per row, so one is seeded anew for each sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 16  # numbers made in one go on a CPU, so that what lies between stays in its cache


class SampleDraws:
    """The draws of the B samples of a batch.

    Args:
        keys: the draw key of each sample, in [0, 2**64): `shards.read.draws.draw_key`, a batch's `draw_key`.
        device: where `normal` makes its numbers.
    """

    def __init__(self, keys: Sequence[int], device: torch.device | str) -> None:
        self.keys = [int(key) for key in keys]
        self.device = torch.device(device)

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.keys)

    def select(self, indices: Sequence[int]) -> SampleDraws:
        """Take some samples of the batch; their draws stay what they are."""
        return SampleDraws([self.keys[i] for i in indices], self.device)

    def generators(self, purpose: str) -> list[np.random.Generator]:
        """Create a generator on the host for each sample.

        Args:
            purpose: what the draws are for; two purposes never share numbers.

        Returns:
            B fresh generators: calling twice gives the same numbers twice.
        """
        tag = _hash(purpose.encode())
        return [
            np.random.Generator(np.random.Philox(key=np.array([key, tag], dtype=np.uint64)))
            for key in self.keys
        ]

    def normal(self, purpose: str, shape: Sequence[int], *, out: Tensor | None = None) -> Tensor:
        """Draw standard normal numbers on the device, without waiting for it.

        The numbers are the same for a sample in whatever batch, on one kind of device; CPU and GPU differ.
        On a CPU they are one of 65,536 equally likely values, the middles of as many quantiles (the largest
        is 4.3): a third of the time that torch's generator takes, and noise on pixels needs no finer ones.

        Args:
            purpose: what the draws are for; two purposes never share numbers.
            shape: of one sample's numbers.
            out: (B, *shape) float32 contiguous on the device, filled and returned instead of a new tensor.

        Returns:
            (B, *shape) float32.
        """
        if out is None:
            out = torch.empty((len(self.keys), *shape), dtype=torch.float32, device=self.device)
        assert out.shape == (len(self.keys), *shape)
        if self.device.type == "cpu":
            for row, key in zip(out, self.keys, strict=True):
                _fill_normal(row, key, _hash(purpose.encode()))
            return out
        generator = torch.Generator(device=self.device)
        for row, key in zip(out, self.keys, strict=True):
            generator.manual_seed(_hash(key.to_bytes(8, "little") + purpose.encode()) >> 1)
            row.normal_(generator=generator)
        return out


def _fill_normal(row: Tensor, key: int, tag: int) -> None:
    """Fill a contiguous tensor on the CPU; SFC64 is NumPy's fastest generator."""
    rng = np.random.Generator(np.random.SFC64([key, tag]))
    quantiles, flat = _normal_quantiles(), row.view(-1)
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        words = rng.integers(0, 2**64, size=-(-len(block) // 4), dtype=np.uint64)
        index = words.view(np.uint16)[: len(block)].astype(np.int32)
        torch.index_select(quantiles, 0, torch.from_numpy(index), out=block)


@lru_cache(maxsize=1)
def _normal_quantiles() -> Tensor:
    """The middles of 65,536 quantiles of the normal distribution, scaled to a deviation of 1."""
    share = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    quantiles: Tensor = torch.special.ndtri(share)
    return (quantiles / quantiles.square().mean().sqrt()).float()


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
