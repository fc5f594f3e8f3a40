"""Random draws keyed by a place in the plan, so that nothing about ranks, workers or restarts enters them.

A generator that is carried along has a state to save and a history that depends on who drew before. A
counter-based generator (Philox, Salmon et al. 2011) has neither: its output is a function of key and counter.
"""

from __future__ import annotations

import hashlib

import numpy as np


def sample_rng(seed: int, epoch: int, position: int, purpose: str) -> np.random.Generator:
    """Create the generator that belongs to one place of the plan and one purpose.

    Args:
        seed: seed of the run, in [0, 2**64).
        epoch: epoch of the plan, not negative.
        position: place in the epoch's plan (batch * global batch size + slot), not negative.
        purpose: what the draws are for, such as "crop"; two purposes never share numbers.

    Returns:
        A generator whose stream overlaps that of no other arguments (2**128 blocks apart).
    """
    tag = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    key = np.array([seed, tag], dtype=np.uint64)
    # Philox counts up from the first word: the two low words are left for the draws themselves
    counter = np.array([0, 0, position, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def draw_key(seed: int, epoch: int, position: int) -> int:
    """Hash a place in the plan to 63 bits: what draws on a device are keyed by (`frepa_dist.draws`).

    Args:
        seed: seed of the run, in [0, 2**64).
        epoch: epoch of the plan, not negative.
        position: place in the epoch's plan, not negative.
    """
    packed = b"".join(value.to_bytes(8, "little") for value in (seed, epoch, position))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1
